"""The supervisor killed again and again at any moment: still one trainer, every step once, the right end."""

import json
import os
import random
import select
import signal

import pytest
from program import FAKES, Gpusup, finish, of_kind

COOPERATING = str(FAKES / "cooperating.py")


def be_killed(gpusup: Gpusup, luck: random.Random, first: bool, steps: int) -> bool:
    """Run or resume, and kill the supervisor after 0 to 1 s; whether it was still at work then."""
    words = ("run", "rtx4070", "--", COOPERATING, f"--max_iters={steps}") if first else ("resume", "-1")
    supervisor = gpusup.start(*words)
    assert supervisor.stderr is None
    # What it prints is read, so that a full pipe never holds it up; the time is the stimulus, not a wait for anything.
    left_s = luck.uniform(0.0, 1.0)
    fd = os.pidfd_open(supervisor.pid)
    ended = bool(select.select([fd], [], [], left_s)[0])
    if not ended:
        supervisor.send_signal(signal.SIGKILL)
    finish(supervisor)
    return not ended


def survive(gpusup: Gpusup, kills: int, seed: int) -> None:
    luck = random.Random(seed)
    steps = 100 * kills
    killed = sum(be_killed(gpusup, luck, first=not gpusup.attempts(), steps=steps) for _ in range(kills))
    if not gpusup.attempts():  # killed before there was a run, each time
        gpusup("run", "rtx4070", "--", COOPERATING, f"--max_iters={steps}")
    elif gpusup.log()["run"]["state"] == "lost":
        assert finish(gpusup.start("resume", "-1"))[0] == 0
    log = gpusup.log()
    assert log["run"]["state"] == "done"
    assert log["run"]["attempts"] == 1
    assert len(of_kind(log, "attempt_started")) == 1
    (attempt,) = gpusup.attempts()
    assert (attempt / "stdout.log").read_text().split() == [w for n in range(1, steps + 1) for w in ("step", str(n))]
    assert json.loads((attempt / "exit.json").read_text())["status"] == 0
    assert killed > 0


def test_supervisor_killed_six_times_runs_one_trainer_to_its_end(gpusup: Gpusup) -> None:
    survive(gpusup, kills=6, seed=20)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_supervisor_killed_twenty_times_runs_one_trainer_to_its_end(gpusup: Gpusup, seed: int) -> None:
    survive(gpusup, kills=20, seed=seed)
