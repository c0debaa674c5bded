"""Real trainers through the real shim: how they start, what they inherit, how their end is known, what they leave."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gpusup.supervisor import shim
from gpusup.supervisor.core.verdict import ExitStatus
from gpusup.supervisor.process import Ended, TrainerProcess, adopt, launch, open_pidfd

TIMEOUT_S = 30.0


class Told:
    """A FIFO through which a trainer says something, so that nothing has to be waited for by time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR)

    def line(self) -> str:
        heard = b""
        while not heard.endswith(b"\n"):
            assert select.select([self._fd], [], [], TIMEOUT_S)[0], f"nothing more was said after {heard!r}"
            heard += os.read(self._fd, 1)
        return heard.decode().strip()

    def say(self, text: str) -> None:
        os.write(self._fd, text.encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    fifo = Told(tmp_path / "told")
    yield fifo
    fifo.close()


@pytest.fixture
def ordered(tmp_path: Path) -> Iterator[Told]:
    """The other direction: what the test tells the trainer."""
    fifo = Told(tmp_path / "ordered")
    yield fifo
    fifo.close()


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Path]:
    """An attempt's directory; whatever still runs in it is ended."""
    directory = tmp_path / "attempts" / "001"
    yield directory
    started = directory / "start.json"
    if started.exists():
        content = json.loads(started.read_bytes())
        for pid, ticks in (("pid", "start_ticks"), ("shim_pid", "shim_start_ticks")):
            fd = open_pidfd(content[pid], content[ticks])
            if fd is not None:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                os.close(fd)


def run(attempt: Path, script: str, *arguments: object) -> TrainerProcess | Ended:
    """A trainer that is a shell script; it may have ended already."""
    argv = ("/bin/sh", "-c", script, "trainer", *map(str, arguments))
    return launch(attempt, argv, str(attempt.parent.parent), dict(os.environ))


def start(attempt: Path, script: str, *arguments: object) -> TrainerProcess:
    """A trainer that cannot have ended already."""
    started = run(attempt, script, *arguments)
    assert isinstance(started, TrainerProcess)
    return started


def end_of(trainer: TrainerProcess | Ended) -> Ended:
    if isinstance(trainer, Ended):
        return trainer
    deadline = time.monotonic() + TIMEOUT_S
    while (ended := trainer.poll()) is None:
        fd = trainer.wait_fd
        assert fd is not None
        assert select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0], "the trainer does not end"
    return ended


def has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 3, 127, 255])
def test_exit_code_is_recorded(attempt: Path, code: int) -> None:
    assert end_of(run(attempt, "exit $1", code)).exit == ExitStatus(code=code)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_signal_that_ended_the_trainer_is_recorded(attempt: Path, number: signal.Signals) -> None:
    ended = end_of(run(attempt, "kill -$1 $$; sleep 60", int(number)))
    assert ended.exit == ExitStatus(signal=int(number))


def test_end_is_durable_and_found_again_by_a_supervisor_that_comes_later(attempt: Path) -> None:
    ended = end_of(run(attempt, "exit 9"))
    assert ended.user_s is not None
    assert not list(attempt.glob(".*")), "nothing temporary is left"
    assert adopt(attempt) == ended


def test_output_goes_to_two_files_of_the_attempt(attempt: Path) -> None:
    end_of(run(attempt, "echo out; echo err >&2"))
    assert (attempt / "stdout.log").read_text() == "out\n"
    assert (attempt / "stderr.log").read_text() == "err\n"
    assert all((attempt / name).stat().st_mode & 0o077 == 0 for name in ("stdout.log", "stderr.log"))


def test_trainer_runs_in_its_directory_with_its_environment(attempt: Path, tmp_path: Path) -> None:
    argv = ("/bin/sh", "-c", "pwd; echo $MARK")
    end_of(launch(attempt, argv, str(tmp_path), {**os.environ, "MARK": "a b"}))
    assert (attempt / "stdout.log").read_text() == f"{tmp_path}\na b\n"


# --- what it inherits -------------------------------------------------------------------------------------------------


def test_trainer_has_default_signals_whatever_gpusup_ignores(attempt: Path) -> None:
    names = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in names}
    try:
        trainer = run(attempt, "exec cat /proc/self/status")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    end_of(trainer)
    status = dict(line.split(":\t", 1) for line in (attempt / "stdout.log").read_text().splitlines() if ":\t" in line)
    ordinary = 0x7FFFFFFF  # 32 and up are the C library's own; who started the tests may have touched them
    assert int(status["SigIgn"], 16) & ordinary == 0
    assert int(status["SigBlk"], 16) & ordinary == 0


def test_trainer_leads_a_session_of_its_own_and_reads_nothing(attempt: Path) -> None:
    end_of(run(attempt, "cut -d' ' -f1,5,6 < /proc/$$/stat; readlink /proc/$$/fd/0; ls /proc/$$/fd | wc -l"))
    pid = json.loads((attempt / "start.json").read_bytes())["pid"]
    ids, stdin, descriptors = (attempt / "stdout.log").read_text().splitlines()
    assert ids == f"{pid} {pid} {pid}"
    assert stdin == os.devnull
    assert int(descriptors) == 3, "a lock or a pipe of the shim leaked into the trainer"


def test_kernel_short_of_memory_prefers_the_trainer_to_its_keepers(attempt: Path) -> None:
    end_of(run(attempt, "cat /proc/self/oom_score_adj; cat /proc/$PPID/oom_score_adj"))
    own, keeper = (int(line) for line in (attempt / "stdout.log").read_text().split())
    assert own > keeper


# --- commands that cannot run -----------------------------------------------------------------------------------------


def could_not_run(attempt: Path, *argv: str, cwd: str = "/") -> Ended:
    return end_of(launch(attempt, argv, cwd, dict(os.environ)))


def test_command_that_does_not_exist_is_127(attempt: Path) -> None:
    ended = could_not_run(attempt, "no-such-command-anywhere")
    assert ended.exit == ExitStatus(code=127)
    assert ended.exec_error is not None
    assert "No such file" in ended.exec_error[1]


def test_file_that_is_not_executable_is_126(attempt: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    ended = could_not_run(attempt, str(script))
    assert ended.exit == ExitStatus(code=126)
    assert ended.exec_error is not None
    assert ended.exec_error[1] == "Permission denied"


def test_command_that_could_not_run_is_not_tried_again_by_a_takeover(attempt: Path) -> None:
    ended = could_not_run(attempt, "no-such-command-anywhere")
    assert adopt(attempt) == ended


# --- exactly one ------------------------------------------------------------------------------------------------------


def test_starting_twice_starts_once(attempt: Path, told: Told, ordered: Told) -> None:
    script = "echo $$ > $1; read order < $2; exit 5"
    first = start(attempt, script, told.path, ordered.path)
    assert told.line() == str(first.pid)
    second = start(attempt, script, told.path, ordered.path)
    assert (second.pid, second.start_ticks) == (first.pid, first.start_ticks)
    ordered.say("go")
    assert end_of(first).exit == end_of(second).exit == ExitStatus(code=5)


def test_starting_at_the_same_time_starts_once(attempt: Path, tmp_path: Path) -> None:
    script = f"echo started >> {tmp_path / 'starts'}; exec sleep 60"
    attempt.mkdir(parents=True)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: start(attempt, script), range(4)))
    assert len({(trainer.pid, trainer.start_ticks) for trainer in found}) == 1
    found[0].signal(signal.SIGTERM)
    for trainer in found:
        assert end_of(trainer).exit == ExitStatus(signal=15)
    assert (tmp_path / "starts").read_text() == "started\n"


def test_used_directory_is_refused_even_when_its_trainer_is_gone(attempt: Path, tmp_path: Path) -> None:
    marker = tmp_path / "starts"
    end_of(run(attempt, f"echo started >> {marker}; exit 4"))
    again = launch(attempt, ("/bin/sh", "-c", f"echo started >> {marker}"), "/", dict(os.environ))
    assert isinstance(again, Ended)
    assert again.exit == ExitStatus(code=4)
    assert marker.read_text() == "started\n"
    command = [sys.executable, shim.__file__, str(attempt), "/", "/bin/true"]
    assert subprocess.run(command, timeout=TIMEOUT_S).returncode == shim.USED


def test_busy_directory_is_refused(attempt: Path) -> None:
    trainer = start(attempt, "exec sleep 60")
    command = [sys.executable, shim.__file__, str(attempt), "/", "/bin/true"]
    assert subprocess.run(command, timeout=TIMEOUT_S).returncode == shim.BUSY
    trainer.signal(signal.SIGKILL)
    assert end_of(trainer).exit == ExitStatus(signal=9)


# --- adopting ---------------------------------------------------------------------------------------------------------


def test_attempt_never_started_cannot_be_adopted(attempt: Path) -> None:
    assert adopt(attempt) is None


def test_running_attempt_is_adopted_and_its_end_is_seen(attempt: Path, told: Told, ordered: Told) -> None:
    start(attempt, "echo up > $1; read order < $2; exit 6", told.path, ordered.path)
    told.line()
    adopted = adopt(attempt)
    assert isinstance(adopted, TrainerProcess)
    assert adopted.poll() is None
    ordered.say("go")
    assert end_of(adopted).exit == ExitStatus(code=6)


def test_supervisor_killed_with_its_whole_group_leaves_the_trainer_and_its_record_alone(
    attempt: Path, told: Told, ordered: Told
) -> None:
    supervisor = """
import os, sys
from pathlib import Path
from gpusup.supervisor.process import launch
launch(Path(sys.argv[1]), ("/bin/sh", "-c", sys.argv[2]), "/", dict(os.environ))
sys.stdin.read()
"""
    script = f"echo up > {told.path}; read order < {ordered.path}; echo still here; exit 7"
    with subprocess.Popen(
        [sys.executable, "-c", supervisor, str(attempt), script], stdin=subprocess.PIPE, start_new_session=True
    ) as process:
        assert told.line() == "up"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT_S)
    adopted = adopt(attempt)
    assert isinstance(adopted, TrainerProcess)
    ordered.say("go")
    assert end_of(adopted).exit == ExitStatus(code=7)
    assert (attempt / "stdout.log").read_text() == "still here\n"


def test_shim_killed_leaves_the_trainer_running_and_its_exit_unknown(attempt: Path, told: Told, ordered: Told) -> None:
    trainer = start(attempt, "echo up > $1; read order < $2; echo on > $1; exit 0", told.path, ordered.path)
    told.line()
    os.kill(json.loads((attempt / "start.json").read_bytes())["shim_pid"], signal.SIGKILL)
    adopted = adopt(attempt)
    assert isinstance(adopted, TrainerProcess)
    assert adopted.poll() is None
    ordered.say("go")
    assert told.line() == "on"
    assert end_of(adopted).exit == ExitStatus(), "unknown is not success"
    assert end_of(trainer).exit == ExitStatus()


def test_another_process_with_the_same_pid_is_not_taken_for_the_trainer(attempt: Path) -> None:
    trainer = start(attempt, "exec sleep 60")
    file = attempt / "start.json"
    content = json.loads(file.read_bytes())
    file.write_text(json.dumps({**content, "start_ticks": content["start_ticks"] - 1, "shim_start_ticks": 1}))
    assert adopt(attempt) == Ended(exit=ExitStatus())
    file.write_text(json.dumps({**content, "boot_id": "another boot"}))
    assert adopt(attempt) == Ended(exit=ExitStatus(), rebooted=True)
    file.write_text(json.dumps(content))
    assert trainer.poll() is None, "and it was not touched"
    trainer.signal(signal.SIGKILL)
    end_of(trainer)


def test_signal_to_a_trainer_that_is_gone_reaches_nobody(attempt: Path, ordered: Told) -> None:
    trainer = start(attempt, "read order < $1", ordered.path)
    ordered.say("go")
    end_of(trainer)
    trainer.signal(signal.SIGTERM)
    trainer.signal(signal.SIGKILL)


# --- what it leaves ---------------------------------------------------------------------------------------------------

LEAVES_DAEMONS = """
import os, signal, sys
told = sys.argv[1]
for obeys in (True, False):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            if not obeys:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with open(told, "w") as f:
                f.write(f"{os.getpid()}\\n")
            signal.pause()
        os._exit(0)
open(sys.argv[2]).readline()
os._exit(3)
"""


def test_daemons_the_trainer_leaves_are_ended_obedient_or_not(attempt: Path, told: Told, ordered: Told) -> None:
    argv = (sys.executable, "-I", "-S", "-c", LEAVES_DAEMONS, str(told.path), str(ordered.path))
    trainer = launch(attempt, argv, "/", dict(os.environ))
    assert isinstance(trainer, TrainerProcess)
    daemons = [os.pidfd_open(int(told.line())) for _ in range(2)]
    ordered.say("go")
    ended = end_of(trainer)
    assert ended.exit == ExitStatus(code=3), "the trainer's own, not its daemons'"
    assert all(has_ended(daemon) for daemon in daemons), "the attempt is over only when nothing is left"
    for daemon in daemons:
        os.close(daemon)
    assert json.loads((attempt / "swept.json").read_bytes())["processes"] == 2


def test_kill_takes_the_trainers_whole_process_group(attempt: Path, told: Told) -> None:
    trainer = start(attempt, "(echo started > $1; exec sleep 60) & wait", told.path)
    told.line()
    trainer.signal(signal.SIGKILL)
    assert end_of(trainer).exit == ExitStatus(signal=9)
    assert not (attempt / "swept.json").exists(), "nothing was left to sweep"


def test_trainer_that_is_stopped_can_still_be_killed(attempt: Path, told: Told) -> None:
    trainer = start(attempt, "echo up > $1; kill -STOP $$; exit 1", told.path)
    told.line()
    trainer.signal(signal.SIGKILL)
    assert end_of(trainer).exit == ExitStatus(signal=9)


def test_shim_ignores_what_ends_a_login_session(attempt: Path, told: Told, ordered: Told) -> None:
    trainer = start(attempt, "echo up > $1; read order < $2; exit 8", told.path, ordered.path)
    told.line()
    keeper = json.loads((attempt / "start.json").read_bytes())["shim_pid"]
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGPIPE):
        os.kill(keeper, number)
    ordered.say("go")
    assert end_of(trainer).exit == ExitStatus(code=8)


def test_process_whose_name_is_no_text_is_found_all_the_same() -> None:
    renames = (
        "import ctypes, time; ctypes.CDLL(None).prctl(15, b'\\xff\\xfe) (', 0, 0, 0); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", renames], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            assert shim.start_ticks(child.pid) > 0
        finally:
            child.kill()
