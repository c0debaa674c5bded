"""The loop between attempts: signals there, and taking over what was planned and not yet started."""

import os
import signal
import zipfile
from pathlib import Path

import pytest
from gpusup.supervisor import process
from gpusup.supervisor.console import supervise
from gpusup.supervisor.core.decide import EXIT_STOPPED
from gpusup.supervisor.core.events import (
    AnyEvent,
    AttemptEnded,
    AttemptPlanned,
    AttemptStarted,
    CheckpointPlan,
    CheckpointSaved,
    Note,
    Progress,
    Resumed,
    RunCreated,
    StopRequested,
)
from gpusup.supervisor.core.policy import Policy
from gpusup.supervisor.core.verdict import ExitStatus
from gpusup.supervisor.dialects.detect import DIALECTS
from gpusup.supervisor.errors import GpusupError
from gpusup.supervisor.journal import Journal
from gpusup.supervisor.loop import Detached, Supervisor, Tell
from gpusup.supervisor.run_store import RunDirectory
from gpusup.supervisor.sampler import Sampler


def supervisor(folder: Path, dialect: str, *command: str, events: tuple[AnyEvent, ...] = ()) -> Supervisor:
    """One whose journal says `events` already."""
    directory = RunDirectory(folder / "r")
    (directory.path / "attempts").mkdir(parents=True)
    (directory.path / "created").touch()
    run = RunCreated(
        run_id="r",
        name="r",
        policy_name="p",
        policy=Policy(),
        command=command,
        args_from=len(command),
        interpreter="",
        cwd=str(folder),
        dialect=dialect,
        settings={},
        checkpoints=CheckpointPlan(place="" if dialect == "generic" else str(folder / "out")),
    )
    journal = Journal(directory.journal)
    for event in (run, *events):
        journal.events.append(journal.append(event))
    return Supervisor(directory, journal, DIALECTS[dialect], Tell())


def recorded(run: Supervisor) -> list[AnyEvent]:
    return run.directory.events()


def while_waiting(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """`number` arrives while the loop waits for memory to be given back, and no attempt is under way."""
    waits = []

    def wait(run: Supervisor) -> None:
        waits.append(run)
        assert len(waits) < 3, "the signal is not looked at"
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Supervisor, "_await_given_back", wait)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_a_start_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    while_waiting(monkeypatch, number)
    run = supervisor(tmp_path, "generic", "true")
    assert run.run() == EXIT_STOPPED
    assert not run.state.attempts


def test_person_can_leave_before_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    while_waiting(monkeypatch, signal.SIGQUIT)
    run = supervisor(tmp_path, "generic", "true")
    with pytest.raises(Detached):
        run.run()
    assert run.state.finished is None
    assert not run.state.attempts


def checkpoint(path: Path, step: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ckpt/data.pkl", f"step {step}")
    return path


@pytest.mark.parametrize("place", ["torn", "missing"])
def test_start_that_was_only_planned_gets_its_checkpoint_first(tmp_path: Path, place: str) -> None:
    copy = checkpoint(tmp_path / "copies" / "ckpt-00000040.pt", 40)
    theirs = checkpoint(tmp_path / "out" / "ckpt.pt", 40)
    theirs.unlink() if place == "missing" else theirs.write_bytes(copy.read_bytes()[:50])
    command = ("cmp", str(theirs), str(copy))
    planned = AttemptPlanned(attempt=2, settings={}, because="", resume_step=40, resume_path=str(copy), argv=command)
    run = supervisor(
        tmp_path,
        "nanogpt",
        "false",
        events=(
            AttemptPlanned(attempt=1, settings={}, because=""),
            AttemptStarted(attempt=1, pid=1, start_ticks=1),
            CheckpointSaved(attempt=1, step=40, path=str(theirs), copy=str(copy)),
            Progress(attempt=1, step=47),
            StopRequested(attempt=1, how="terminate", why=""),
            AttemptEnded(attempt=1, exit=ExitStatus(signal=15), step=47, diagnosis="signal"),
            planned,
        ),
    )
    assert run.run() == 0, "the trainer does not find the verified checkpoint in its place"
    resumed = [event for event in recorded(run) if isinstance(event, Resumed)]
    assert [(event.attempt, event.step, event.lost_steps) for event in resumed] == [(2, 40, 7)]


def test_trainer_that_cannot_be_told_to_resume_is_not_said_to_resume(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path / "ckpt-00000040.pt", 40)
    run = supervisor(
        tmp_path,
        "generic",
        "true",
        events=(
            AttemptPlanned(attempt=1, settings={}, because=""),
            AttemptStarted(attempt=1, pid=1, start_ticks=1),
            CheckpointSaved(attempt=1, step=40, path=str(kept)),
            StopRequested(attempt=1, how="save", why=""),
            AttemptEnded(attempt=1, exit=ExitStatus(signal=15), step=40, diagnosis="signal"),
        ),
    )
    assert run.run() == 0
    assert run.state.attempts[1].resume_path is None
    assert not [event for event in recorded(run) if isinstance(event, Resumed)]
    assert any("starts over" in event.text for event in recorded(run) if isinstance(event, Note))


def test_defect_of_gpusup_says_that_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Supervisor) -> None:
        raise OSError("no more open files")

    monkeypatch.setattr(Supervisor, "_observe", fail)
    run = supervisor(tmp_path, "generic", "true")
    with pytest.raises(GpusupError, match="the trainer, if any, goes on"):
        supervise(run.directory, run.journal, run.dialect, quiet=True)


def test_memory_of_a_trainer_taken_over_is_not_what_was_held_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampler, "device_used", lambda sampler: 11 << 30)
    plan = AttemptPlanned(attempt=1, settings={}, because="", argv=("sleep", "60"))
    run = supervisor(tmp_path, "generic", "sleep", "60", events=(plan,))
    trainer = process.launch(run.directory.attempt(1), plan.argv, str(tmp_path), dict(os.environ))
    assert isinstance(trainer, process.TrainerProcess)
    try:
        run._adopt()
        assert run.sampler.held_before is None
    finally:
        trainer.signal(signal.SIGKILL)
