"""The main job on a trainer with nanoGPT's interface: real allocation failures under a real memory limit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from program import FAKES, ROOT, Gpusup, finish, kinds, of_kind, read_until

NANOGPT = str(FAKES / "nanogpt_like" / "train.py")
BASE = ("--device=cpu", "--compile=False", "--eval_interval=5", "--batch_size=12", "--gradient_accumulation_steps=4")
LADDER = "remediations:\n  - set: {compile: off}\n  - set: {dtype: float16}\n  - step: micro_batch\n"


def batches(log: dict[str, Any]) -> list[tuple[int, int]]:
    return [(a["settings"]["batch_size"], a["settings"]["gradient_accumulation_steps"]) for a in log["attempts"]]


def test_oom_after_progress_is_remediated_resumed_and_explained(gpusup: Gpusup) -> None:
    """From step 8 on a row takes 80 MB: of 12, 8 and 6 rows only the last fit into 600 MB."""
    growth = ("--row_mb=10", "--late_row_mb=80", "--late_step=8", "--max_iters=20")
    done = gpusup("run", gpusup.policy(LADDER), "--memory-budget", "600MB", "--", NANOGPT, *BASE, *growth)
    log = gpusup.log()
    assert done.returncode == 0, done.stderr
    assert log["run"]["state"] == "done"
    assert batches(log) == [(12, 4), (8, 6), (6, 8)]
    assert {micro * accumulation for micro, accumulation in batches(log)} == {48} == {log["run"]["global_batch_size"]}
    resumed = of_kind(log, "resumed")
    assert [event["step"] for event in resumed] == [5, 5]
    assert all("first batches again" in event["note"] for event in resumed)
    first = of_kind(log, "oom")[0]
    assert (first["step"], first["numbers"]["tried_to_allocate_bytes"]) == (8, 12 * 80 * 1_000_000)
    assert "--batch_size=6" in log["attempts"][-1]["argv"]
    assert log["attempts"][-1]["argv"].count("--init_from=resume") == 1
    assert "nanoGPT ignores its dtype on a CPU" in json.dumps(of_kind(log, "remediation_skipped"))
    assert "--batch_size=6 --gradient_accumulation_steps=8" in log["run"]["next_time"]
    assert log["run"]["lost_steps"] == 6


def test_log_keeps_to_its_schema(gpusup: Gpusup) -> None:
    gpusup(
        "run", gpusup.policy(LADDER), "--memory-budget", "600MB", "--", NANOGPT, *BASE, "--row_mb=80", "--max_iters=2"
    )
    schemas = ROOT / "supervisor" / "schemas"
    jsonschema.validate(gpusup.log(), json.loads((schemas / "log-v1.json").read_text()))
    event_schema = json.loads((schemas / "journal-v1.json").read_text())
    journal = next((gpusup.folder / "home" / "runs").glob("*/journal.jsonl"))
    for line in journal.read_text().splitlines():
        jsonschema.validate(json.loads(line), event_schema)


def test_ladder_exhausted_is_121_and_says_so(gpusup: Gpusup) -> None:
    done = gpusup("run", gpusup.policy(LADDER), "--memory-budget", "300MB", "--", NANOGPT, *BASE, "--row_mb=400")
    log = gpusup.log()
    assert done.returncode == 121
    assert log["run"]["state"] == "gave_up"
    assert batches(log)[-1] == (1, 48)
    assert "nothing that was tried fits" in gpusup("log", "-1").stdout


def test_observing_changes_nothing_and_says_what_it_would_have_done(gpusup: Gpusup) -> None:
    command = ("--", NANOGPT, *BASE, "--row_mb=80")
    done = gpusup("run", "--observe", gpusup.policy(LADDER), "--memory-budget", "600MB", *command)
    log = gpusup.log()
    assert done.returncode == 1
    assert len(log["attempts"]) == 1
    assert [event["applied"] for event in of_kind(log, "remediation")] == [False]
    assert "would do: " in done.stderr


def test_restart_before_the_first_checkpoint_begins_at_zero_and_says_so(gpusup: Gpusup) -> None:
    growth = ("--row_mb=10", "--late_row_mb=60", "--late_step=3", "--max_iters=6")
    done = gpusup("run", gpusup.policy(LADDER), "--memory-budget", "600MB", "--", NANOGPT, *BASE, *growth)
    resumed = of_kind(gpusup.log(), "resumed")
    assert done.returncode == 0, done.stderr
    assert [(event["step"], event["lost_steps"]) for event in resumed] == [(0, 3)]
    assert "there is no checkpoint yet, so it starts from zero" in done.stderr
    assert "no checkpoint exists before step 5" in done.stderr


def test_a_checkpoint_of_another_run_in_the_same_folder_is_not_resumed(gpusup: Gpusup) -> None:
    gpusup("run", gpusup.policy(LADDER), "--", NANOGPT, *BASE, "--max_iters=6")
    growth = ("--row_mb=10", "--late_row_mb=60", "--late_step=3", "--max_iters=4")
    gpusup("run", gpusup.policy(LADDER), "--memory-budget", "600MB", "--", NANOGPT, *BASE, *growth)
    assert [event["step"] for event in of_kind(gpusup.log(), "resumed")] == [0]


def test_checkpoint_torn_by_a_kill_is_replaced_by_the_verified_copy(gpusup: Gpusup) -> None:
    """The trainer is killed in mid-save; the takeover finds the copy of the save before, and keeps the torn file."""
    slow = ("--step_s=0.5", "--eval_interval=2", "--torn_at=8", "--max_iters=10")
    run = gpusup.start("run", gpusup.policy(LADDER), "--", NANOGPT, *BASE[:2], *BASE[3:], *slow)
    code, output = finish(run)
    log = gpusup.log()
    assert code == 137, output
    saved = [event["step"] for event in of_kind(log, "checkpoint")]
    assert saved[-1] == 6
    copy = Path(of_kind(log, "checkpoint")[-1]["copy"])
    assert copy.is_file()
    assert log["run"]["why"]


def test_budget_that_does_not_take_effect_is_refused(gpusup: Gpusup) -> None:
    script = gpusup.folder / "steps.py"
    script.write_text("import torch\nprint('up')\n")
    done = gpusup("run", "--memory-budget", "100MB", "default", "--", sys.executable, "-I", str(script))
    assert done.returncode == 125
    assert "the memory budget did not take effect" in done.stderr


def test_budget_is_confirmed_by_the_kernel(gpusup: Gpusup) -> None:
    script = gpusup.folder / "show.py"
    script.write_text(
        "import torch, resource\nprint(resource.getrlimit(resource.RLIMIT_DATA)[0])\nprint(len(open(0).read()))\n"
    )
    run = gpusup.start("run", "--memory-budget", "100MB", "default", "--", sys.executable, str(script))
    _, output = finish(run)
    (applied,) = of_kind(gpusup.log(), "budget_applied")
    assert applied["limit_bytes"] - applied["baseline_bytes"] == 100_000_000
    assert str(applied["limit_bytes"]) in output


def test_supervisor_killed_during_the_ladder_then_resume_goes_on(gpusup: Gpusup) -> None:
    growth = ("--row_mb=10", "--late_row_mb=60", "--late_step=8", "--max_iters=20", "--step_s=0.1")
    command = ("--", NANOGPT, *BASE, *growth)
    first = gpusup.start("run", gpusup.policy(LADDER), "--memory-budget", "600MB", *command)
    read_until(first, b"attempt 2 from step 5")
    first.kill()
    first.wait()
    code, output = finish(gpusup.start("resume", "-1"))
    log = gpusup.log()
    assert code == 0, output
    assert batches(log) == [(12, 4), (8, 6)]
    assert kinds(log).count("attempt_planned") == 2


def test_cadence_is_changed_by_consent_and_recorded(gpusup: Gpusup) -> None:
    done = gpusup(
        "run", "--checkpoint-every", "3", gpusup.policy(LADDER), "--", NANOGPT, *BASE, "--max_iters=4", "--step_s=0.01"
    )
    log = gpusup.log()
    assert done.returncode == 0
    assert "--eval_interval=3" in log["attempts"][0]["argv"]
    assert "checkpoint_every 3, as agreed" in done.stderr


def test_missing_module_in_the_trainer_stops_at_once(gpusup: Gpusup) -> None:
    script = gpusup.folder / "train.py"
    script.write_text("import no_such_module_at_all\n")
    done = gpusup("run", "--memory-budget", "100MB", "rtx4070", "--", str(script))
    assert done.returncode == 1
    assert gpusup.log()["run"]["attempts"] == 1
    assert "No module named 'no_such_module_at_all'" in gpusup("log", "-1").stdout


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["log", "--help"], ["policy", "check", "--help"]])
def test_help_ends_with_an_example(gpusup: Gpusup, arguments: list[str]) -> None:
    assert "Example" in gpusup(*arguments).stdout


def test_schemas_are_those_of_the_program() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_schemas.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 0, made.stdout + made.stderr


def test_restoration_of_a_trainer_that_cannot_save_waits_for_its_checkpoint_and_is_reverted_when_it_fails(
    gpusup: Gpusup,
) -> None:
    """Micro-batch 12 fails at step 8; 8 fits; 12 is tried again at a checkpoint, as the policy says, and taken back."""
    growth = ("--row_mb=10", "--late_row_mb=60", "--late_step=8", "--max_iters=30", "--step_s=0.05")
    policy = gpusup.policy(
        "remediations: [{step: micro_batch}]\n"
        "restore: {after_steps: 4, order: [micro_batch], retry_failed: on, max_tries: 1}\n"
    )
    done = gpusup("run", policy, "--memory-budget", "600MB", "--", NANOGPT, *BASE, *growth)
    log = gpusup.log()
    assert done.returncode == 0, done.stderr
    assert batches(log) == [(12, 4), (8, 6), (12, 4), (8, 6)]
    (restored,) = of_kind(log, "restoration")
    saved = max(e["step"] for e in of_kind(log, "checkpoint") if e["seq"] < restored["seq"])
    assert log["attempts"][2]["from_step"] >= saved >= 8 + 4
    (reverted,) = of_kind(log, "restoration_reverted")
    assert reverted["next_wait_steps"] == 8
    assert log["run"]["settings_at_end"]["batch_size"] == 8


def test_command_that_resumes_by_itself_starts_at_its_checkpoint_and_loses_nothing(gpusup: Gpusup) -> None:
    gpusup("run", gpusup.policy(LADDER), "--", NANOGPT, *BASE, "--max_iters=11")
    growth = ("--row_mb=10", "--late_row_mb=60", "--late_step=12", "--max_iters=14", "--init_from=resume")
    done = gpusup("run", gpusup.policy(LADDER), "--memory-budget", "600MB", "--", NANOGPT, *BASE, *growth)
    log = gpusup.log()
    assert done.returncode == 0, done.stderr
    assert [attempt["from_step"] for attempt in log["attempts"]] == [10, 10]
    assert log["run"]["lost_steps"] == 2
