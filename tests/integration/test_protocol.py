"""Other people's trainers under `gpusup run`: one that uses the hook, and the examples of docs/trainer-protocol.md."""

import re
import shutil
import signal
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from program import FAKES, ROOT, Gpusup, finish, of_kind, read_until

LADDER = "remediations:\n  - step: micro_batch\n"


@pytest.fixture
def hooked(gpusup: Gpusup) -> str:
    """The trainer and its own copy of the hook, away from gpusup's packages."""
    shutil.copy(FAKES / "hooked.py", gpusup.folder)
    shutil.copy(ROOT / "trainer" / "hook.py", gpusup.folder)
    return "hooked.py"


def test_oom_with_a_saved_step_is_resumed_smaller_and_loses_nothing(gpusup: Gpusup, hooked: str) -> None:
    """At step 8 the samples get longer, and no regular checkpoint has been made."""
    done = gpusup("run", gpusup.policy(LADDER), "--", hooked, "--long_from=8", "--memory_mb=40")
    log = gpusup.log()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [attempt["exit"]["code"] for attempt in log["attempts"]] == [75, 0]
    assert [attempt["settings"]["batch_size"] for attempt in log["attempts"]] == [8, 4]
    assert (log["run"]["steps"], log["run"]["lost_steps"], log["run"]["ooms"]) == (30, 0, 1)
    assert [(event["step"], event["emergency"]) for event in of_kind(log, "checkpoint")][:2] == [(7, True), (10, False)]
    assert [event["step"] for event in of_kind(log, "resumed")] == [7]
    [oom] = of_kind(log, "oom")
    assert (oom["phase"], oom["step"], oom["diagnosis"]) == ("forward", 7, "host_oom")
    assert "the trainer saved at step 7 before it left" in done.stderr
    assert "at step 7, no step lost" in done.stderr


def test_saved_step_that_is_damaged_is_not_resumed_from(gpusup: Gpusup, hooked: str) -> None:
    """The event alone is not believed: the regular checkpoint before it is used, and the lost steps are told."""
    script = gpusup.folder / hooked
    source = script.read_text()
    right = "            hook.checkpoint(step, save(step))\n            sys.exit"
    assert source.count(right) == 1
    cut = "            path = save(step)\n            path.write_bytes(path.read_bytes()[:40])\n"
    script.write_text(source.replace(right, f"{cut}            hook.checkpoint(step, path)\n            sys.exit"))
    options = ("--long_from=8", "--memory_mb=40", "--checkpoint_interval=5")
    assert gpusup("run", gpusup.policy(LADDER), "--", hooked, *options).returncode == 0
    log = gpusup.log()
    assert [event["step"] for event in of_kind(log, "checkpoint_rejected")] == [7]
    assert [(event["step"], event["lost_steps"]) for event in of_kind(log, "resumed")] == [(5, 2)]
    assert (log["run"]["steps"], log["run"]["lost_steps"]) == (30, 2)


def test_exit_status_75_alone_is_no_out_of_memory(gpusup: Gpusup) -> None:
    done = gpusup("run", "rtx4070", "--", sys.executable, "-c", "import sys; sys.exit(75)")
    log = gpusup.log()
    assert done.returncode == 75
    assert (log["run"]["attempts"], log["run"]["ooms"]) == (1, 0)


def test_steps_are_exact_and_a_save_is_made_on_request(gpusup: Gpusup, hooked: str) -> None:
    """With no regular checkpoint at all."""
    options = (hooked, "--max_iters=150", "--step_s=0.02", "--checkpoint_interval=1000", "--sample_mb=1")
    first = gpusup.start("run", gpusup.policy(LADDER), "--", *options)
    read_until(first, b"step 12\n")
    first.send_signal(signal.SIGINT)
    code, output = finish(first)
    stopped = gpusup.log()
    assert code == 122, output
    assert stopped["attempts"][0]["exit"] == {"code": None, "signal": signal.SIGTERM}
    assert [event["step"] for event in of_kind(stopped, "checkpoint")] == [stopped["run"]["steps"]]
    assert finish(gpusup.start("resume", "-1"))[0] == 0
    log = gpusup.log()
    assert (log["run"]["steps"], log["run"]["lost_steps"]) == (150, 0)
    printed = "".join((attempt / "stdout.log").read_text() for attempt in gpusup.attempts())
    assert printed == "".join(f"step {n}\n" for n in range(1, 151))


def test_hooked_trainer_that_is_not_supervised_writes_no_events_and_ends_by_sigterm(
    gpusup: Gpusup, hooked: str
) -> None:
    """At once, as it would without the hook: nobody is there to resume it."""
    command = [sys.executable, hooked, "--max_iters=100000", "--memory_mb=1000", "--checkpoint_interval=1000000"]
    before = set(gpusup.folder.iterdir())
    with subprocess.Popen(command, cwd=gpusup.folder, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"step 1\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == -signal.SIGTERM
    assert {path.name for path in set(gpusup.folder.iterdir()) - before} <= {"__pycache__"}


# --- the examples of the document -------------------------------------------------------------------------------------


def example(language: str) -> str:
    text = (ROOT / "docs" / "trainer-protocol.md").read_text()
    [code] = re.findall(rf"```{language}\n# train\..*?```", text, re.DOTALL)
    return code.removeprefix(f"```{language}\n").removesuffix("```")


def write(folder: Path, language: str, step_s: float = 0.01) -> tuple[str, ...]:
    name, program = {"python": ("train.py", sys.executable), "sh": ("train.sh", "/bin/sh")}[language]
    code = example(language)
    assert "0.01" in code
    (folder / name).write_text(code.replace("0.01", str(step_s)))
    return program, name


@pytest.mark.parametrize("language", ["python", "sh"])
def test_example_of_the_document_is_supervised_to_the_step(gpusup: Gpusup, language: str) -> None:
    done = gpusup("run", gpusup.policy(LADDER), "--", *write(gpusup.folder, language))
    log = gpusup.log()
    assert done.returncode == 0, done.stderr
    assert (log["run"]["steps"], log["run"]["target_steps"], log["run"]["state"]) == (100, 100, "done")
    [started] = of_kind(log, "trainer_reported")
    assert started["can_save"]


@pytest.mark.parametrize("language", ["python", "sh"])
def test_example_of_the_document_saves_when_asked_and_ends_by_the_signal(gpusup: Gpusup, language: str) -> None:
    """Steps are slow enough that it cannot be done before."""
    run = gpusup.start("run", gpusup.policy(LADDER), "--", *write(gpusup.folder, language, step_s=0.2))
    read_until(run, b"step 9\n")
    run.send_signal(signal.SIGINT)
    code, output = finish(run)
    log = gpusup.log()
    assert code == 122, output
    assert log["attempts"][0]["exit"] == {"code": None, "signal": signal.SIGTERM}
    assert [event["step"] for event in of_kind(log, "checkpoint")] == [log["run"]["steps"]]


@pytest.mark.parametrize("language", ["python", "sh"])
def test_example_of_the_document_has_ten_lines_about_the_protocol(language: str) -> None:
    lines = re.findall(r"^.*(?:tell|GPUSUP_|TERM\b|asked = ).*$", example(language), re.MULTILINE)
    assert 6 <= len(lines) <= 10


# --- the reference trainer --------------------------------------------------------------------------------------------


def test_reference_trainer_that_runs_out_of_memory_is_resumed_smaller_and_loses_nothing(gpusup: Gpusup) -> None:
    """The context doubles after step 4, and no regular checkpoint has been made by then."""
    data = gpusup.folder / "data"
    data.mkdir()
    for name in ("train.bin", "val.bin"):
        (data / name).write_bytes(array("H", range(200)).tobytes() * 500)
    model = ("--n_layer=1", "--n_head=1", "--n_embd=16", "--vocab_size=32768", "--loss_chunks=1", "--dtype=float32")
    length = ("--block_size=64", "--block_size_start=32", "--block_size_warmup_iters=4", "--max_iters=6")
    batch = ("--batch_size=24", "--gradient_accumulation_steps=1", "--eval_interval=0", "--checkpoint_interval=1000")
    machine = ("--device=cpu", "--compile=False", "--threads=1", f"--data_dir={data}", f"--out_dir={data / 'out'}")
    command = (str(ROOT / "trainer" / "train.py"), *model, *length, *batch, *machine)
    done = gpusup("run", gpusup.policy(LADDER), "--memory-budget", "470MB", "--", *command)
    log = gpusup.log()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [attempt["exit"]["code"] for attempt in log["attempts"]] == [75, 0]
    assert [attempt["settings"]["batch_size"] for attempt in log["attempts"]] == [24, 12]
    assert (log["run"]["steps"], log["run"]["lost_steps"]) == (6, 0)
    assert [(event["step"], event["emergency"]) for event in of_kind(log, "checkpoint")] == [(4, True), (6, False)]
    [oom] = of_kind(log, "oom")
    assert (oom["step"], oom["block_size"]) == (4, 64)
    assert "the trainer saved at step 4 before it left" in done.stderr
