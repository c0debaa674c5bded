"""Lifetimes: takeover, stopping, leaving, orphans, exit codes. Trainers that need no torch, so that it is quick."""

import json
import os
import signal
import sys
import time

from gpusup.supervisor.loop import AGAIN_S
from program import FAKES, Gpusup, finish, kinds, of_kind, read_until, wait_gone

COOPERATING = str(FAKES / "cooperating.py")


def test_run_to_done_when_the_trainer_succeeds(gpusup: Gpusup) -> None:
    done = gpusup("run", "rtx4070", "--", COOPERATING, "--max_iters=20")
    log = gpusup.log()
    assert done.returncode == 0
    assert "step 20" in done.stdout
    assert (log["run"]["state"], log["run"]["steps"], log["run"]["attempts"]) == ("done", 20, 1)
    assert log["attempts"][0]["exit"] == {"code": 0, "signal": None}


def test_supervisor_killed_then_resume_takes_over_without_a_restart(gpusup: Gpusup) -> None:
    first = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=300")
    read_until(first, b"step 15\n")
    first.kill()
    first.wait()
    assert gpusup.log()["run"]["state"] == "lost"
    second = gpusup.start("resume", "-1")
    code, output = finish(second)
    log = gpusup.log()
    assert code == 0, output
    assert "takeover" in output
    assert (log["run"]["state"], log["run"]["attempts"], log["run"]["lost_steps"]) == ("done", 1, 0)
    assert len(of_kind(log, "attempt_started")) == 1
    stdout = gpusup.attempts()[0] / "stdout.log"
    assert stdout.read_text().split("\n")[:-1] == [f"step {n}" for n in range(1, 301)]


def test_supervisor_killed_and_trainer_finished_meanwhile_then_resume_learns_its_end(gpusup: Gpusup) -> None:
    first = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=30")
    read_until(first, b"step 5\n")
    first.kill()
    first.wait()
    wait_gone(json.loads((gpusup.attempts()[0] / "start.json").read_text())["shim_pid"])
    assert gpusup("resume", "-1").returncode == 0
    assert gpusup.log()["run"]["steps"] == 30


def test_second_supervisor_on_a_supervised_run_is_refused(gpusup: Gpusup) -> None:
    first = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=100000")
    read_until(first, b"step 1\n")
    second = gpusup("resume", "-1")
    assert second.returncode == 125
    assert "another gpusup supervises this run" in second.stderr


def test_ctrl_c_asks_to_save_and_resume_continues_at_the_same_step(gpusup: Gpusup) -> None:
    first = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=200")
    read_until(first, b"step 25\n")
    first.send_signal(signal.SIGINT)
    code, output = finish(first)
    stopped = gpusup.log()
    assert code == 122
    assert f"gpusup resume {stopped['run']['id']}" in output
    assert finish(gpusup.start("resume", "-1"))[0] == 0
    log = gpusup.log()
    assert (log["run"]["state"], log["run"]["lost_steps"], log["run"]["steps"]) == ("done", 0, 200)
    assert log["attempts"][1]["from_step"] == stopped["run"]["steps"] == log["attempts"][0]["to_step"]


def test_sigterm_then_again_kills_a_trainer_that_will_not_leave(gpusup: Gpusup) -> None:
    run = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=100000", "--ignore_term=True")
    read_until(run, b"step 5\n")
    run.send_signal(signal.SIGTERM)
    read_until(run, b"asked to save and leave")
    time.sleep(2 * AGAIN_S)
    run.send_signal(signal.SIGTERM)
    assert finish(run)[0] == 122
    assert gpusup.log()["attempts"][0]["exit"] == {"code": None, "signal": 9}


def test_a_trainer_that_cannot_save_is_not_stopped_by_the_first_ctrl_c(gpusup: Gpusup) -> None:
    script = gpusup.folder / "plain.py"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    run = gpusup.start("run", "default", "--", sys.executable, str(script))
    read_until(run, b"up\n")
    run.send_signal(signal.SIGINT)
    read_until(run, b"cannot save when asked")
    time.sleep(2 * AGAIN_S)
    run.send_signal(signal.SIGINT)
    assert finish(run)[0] == 122
    assert gpusup.log()["attempts"][0]["exit"]["signal"] == 9


def test_ctrl_backslash_leaves_the_trainer_running(gpusup: Gpusup) -> None:
    first = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=200")
    read_until(first, b"step 5\n")
    first.send_signal(signal.SIGQUIT)
    code, output = finish(first)
    assert code == 122
    assert "training goes on" in output
    assert finish(gpusup.start("resume", "-1"))[0] == 0
    assert gpusup.log()["run"]["attempts"] == 1


def test_a_closed_terminal_ends_neither_supervision_nor_training(gpusup: Gpusup) -> None:
    run = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=100")
    read_until(run, b"step 5\n")
    assert run.stdout is not None
    run.stdout.close()
    run.stdout = None
    run.send_signal(signal.SIGHUP)
    assert run.wait(60) == 0
    assert gpusup.log()["run"]["state"] == "done"


def test_what_a_trainer_leaves_behind_is_swept(gpusup: Gpusup) -> None:
    done = gpusup("run", "rtx4070", "--", COOPERATING, "--max_iters=3", "--leave_orphan=True")
    assert done.returncode == 0
    marker = f"GPUSUP_RUN_ID={gpusup.log()['run']['id']}".encode()
    assert marker not in environments()


def environments() -> bytes:
    """The environments of all processes that may be read."""
    found = b""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as f:
                found += f.read()
        except OSError:
            continue
    return found


def test_the_environment_promised_to_the_trainer(gpusup: Gpusup) -> None:
    show = "import os; print({k: v for k, v in os.environ.items() if k.startswith(('GPUSUP_', 'PYTHONUNB'))})"
    done = gpusup("run", "default", "--", sys.executable, "-c", show)
    told = done.stdout
    log = gpusup.log()
    assert f"'GPUSUP_RUN_ID': '{log['run']['id']}'" in told
    assert "'GPUSUP_ATTEMPT': '1'" in told
    assert "events.jsonl" in told
    assert "'PYTHONUNBUFFERED': '1'" in told


def test_only_the_first_double_dash_is_ours(gpusup: Gpusup) -> None:
    done = gpusup("run", "default", "--", sys.executable, "-c", "import sys; print(sys.argv[1:])", "--", "-x")
    assert "['--', '-x']" in done.stdout


def test_run_with_only_a_script_is_understood(gpusup: Gpusup) -> None:
    done = gpusup("run", COOPERATING, "--max_iters=3")
    assert done.returncode == 0
    assert "no POLICY was given" in done.stderr


def test_command_that_does_not_exist_is_127(gpusup: Gpusup) -> None:
    done = gpusup("run", "default", "--", "no-such-trainer")
    assert (done.returncode, done.stderr) == (127, "gpusup: no-such-trainer: command not found\n")


def test_file_that_is_not_executable_is_126(gpusup: Gpusup) -> None:
    (gpusup.folder / "thing").write_text("x")
    assert gpusup("run", "default", "--", "./thing").returncode == 126


def test_crash_that_is_not_oom_gives_the_trainers_own_code_and_changes_nothing(gpusup: Gpusup) -> None:
    done = gpusup("run", "rtx4070", "--", sys.executable, "-c", "import sys; sys.stderr.write('no\\n'); sys.exit(7)")
    log = gpusup.log()
    assert done.returncode == 7
    assert log["run"]["attempts"] == 1
    assert not {"oom", "remediation"} & set(kinds(log))


def test_trainer_killed_by_a_signal_gives_128_plus_it(gpusup: Gpusup) -> None:
    done = gpusup("run", "default", "--", sys.executable, "-c", "import os; os.kill(os.getpid(), 11)")
    assert done.returncode == 139


def test_quoted_oom_in_the_output_of_a_successful_trainer_is_no_incident(gpusup: Gpusup) -> None:
    say = "print('RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB')"
    assert gpusup("run", "rtx4070", "--", sys.executable, "-c", say).returncode == 0
    assert "oom" not in kinds(gpusup.log())


def test_bad_policy_is_one_clear_error_and_no_run(gpusup: Gpusup) -> None:
    policy = gpusup.policy("remediations:\n  - sett: {compile: off}\n")
    done = gpusup("run", policy, "--", COOPERATING)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{policy}:3:5: error: ")
    assert "Traceback" not in done.stderr
    assert gpusup("log").stdout.startswith("no runs yet")


def test_log_of_no_such_run_is_3(gpusup: Gpusup) -> None:
    done = gpusup("log", "zzz")
    assert (done.returncode, done.stderr) == (3, "gpusup: no run matches 'zzz'; `gpusup log` lists them\n")


def test_run_files_are_private(gpusup: Gpusup) -> None:
    gpusup("run", "rtx4070", "--", COOPERATING, "--max_iters=3")
    for path in (gpusup.folder / "home").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.name == "events.jsonl", path  # the trainer's own file


def test_log_f_follows_to_the_end_of_the_run(gpusup: Gpusup) -> None:
    run = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=150")
    read_until(run, b"step 1\n")
    follower = gpusup.start("log", "-f")
    assert finish(run)[0] == 0
    code, output = finish(follower)
    assert code == 0
    assert "attempt 1 from the start" in output
    assert "finished with the settings it started with" in output


def test_list_of_runs_is_newest_first_and_names_the_settings(gpusup: Gpusup) -> None:
    for name in ("older", "newer"):
        gpusup("run", "--name", name, "rtx4070", "--", COOPERATING, "--max_iters=2")
    lines = gpusup("log").stdout.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["newer", "older"]
    assert all("micro-batch 8 x 2, float32, compile off" in line for line in lines[1:])
    assert [run["name"] for run in json.loads(gpusup("log", "-o", "json").stdout)["runs"]] == ["newer", "older"]


def test_signals_that_come_together_are_one_request(gpusup: Gpusup) -> None:
    run = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=100000", "--step_s=0.2")
    read_until(run, b"step 3\n")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # `timeout` sends two, a wrapper one more
        run.send_signal(number)
    code, output = finish(run)
    assert (code, gpusup.log()["attempts"][0]["exit"]) == (122, {"code": None, "signal": 15}), output


def test_folder_that_cannot_be_written_is_a_message_and_not_the_trainers_exit_code(gpusup: Gpusup) -> None:
    gpusup.environment["GPUSUP_HOME"] = "/proc/gpusup"
    done = gpusup("run", "rtx4070", "--", COOPERATING)
    assert (done.returncode, "Traceback" in done.stderr) == (125, False)
    assert "/proc/gpusup" in done.stderr


def test_second_run_in_the_same_folder_is_refused(gpusup: Gpusup) -> None:
    first = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=100000")
    read_until(first, b"step 1\n")
    second = gpusup("run", "rtx4070", "--", COOPERATING, "--max_iters=3")
    assert second.returncode == 2
    assert "give this one another out_dir" in second.stderr
    assert gpusup("run", "rtx4070", "--", COOPERATING, "--max_iters=3", "--out_dir=other").returncode == 0


def test_shim_killed_then_the_run_goes_on_from_its_checkpoint_with_the_same_settings(gpusup: Gpusup) -> None:
    run = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=60", "--step_s=0.05")
    read_until(run, b"step 15\n")
    start = json.loads((gpusup.attempts()[0] / "start.json").read_text())
    os.kill(start["shim_pid"], signal.SIGKILL)
    os.kill(start["pid"], signal.SIGKILL)
    code, output = finish(run)
    log = gpusup.log()
    assert code == 0, output
    assert [attempt["from_step"] for attempt in log["attempts"]] == [0, 10]
    assert log["attempts"][0]["exit"] == {"code": None, "signal": None}
    assert log["attempts"][0]["settings"] == log["attempts"][1]["settings"]


def test_log_f_of_a_lost_run_ends_and_says_how_to_go_on(gpusup: Gpusup) -> None:
    run = gpusup.start("run", "rtx4070", "--", COOPERATING, "--max_iters=100000")
    read_until(run, b"step 1\n")
    run.kill()
    run.wait()
    assert "gpusup resume" in gpusup("log", "-f").stderr
