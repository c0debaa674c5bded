"""What is made of an attempt's files; the trainer's own reports are a stranger's words and may be anything."""

import json
import pickle
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import msgspec
import pytest
from gpusup.supervisor.attempt_watch import AttemptWatch, Echo
from gpusup.supervisor.checkpoints import Keeper
from gpusup.supervisor.core.events import (
    AnyEvent,
    AttemptEnded,
    CheckpointSaved,
    KnobUnavailable,
    Note,
    OomDetected,
    PeakMeasured,
    Progress,
    RunCreated,
    TrainerReported,
)
from gpusup.supervisor.core.policy import Policy
from gpusup.supervisor.core.state import Attempt
from gpusup.supervisor.core.verdict import ExitStatus
from gpusup.supervisor.dialects.detect import DIALECTS
from gpusup.supervisor.process import Ended, TrainerProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_doc import FIELD_TYPES, KINDS

RUN = RunCreated(
    run_id="r",
    name="r",
    policy_name="p",
    policy=Policy(),
    command=("python", "train.py"),
    args_from=2,
    interpreter="python",
    cwd="/my/project",
    dialect="nanogpt",
    settings={"block_size": 64},
)
FAILED = Ended(exit=ExitStatus(code=1))
ALLOCATOR = (
    "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
)


class Watched:
    """An attempt whose process is gone already and whose files are as given."""

    def __init__(self, folder: Path, keeper: Keeper | None = None) -> None:
        self.folder = folder
        self.shown: list[bytes] = []
        self.watch = AttemptWatch(
            RUN,
            folder,
            TrainerProcess(folder, 0, 0, 0, 0),
            DIALECTS["nanogpt"],
            Echo(stdout=self.shown.append, stderr=self.shown.append),
            keeper,
            Attempt(n=1, settings=RUN.settings, argv=(), because=""),
            0,
        )

    def append(self, name: str, text: str) -> None:
        with (self.folder / name).open("a") as f:
            f.write(text)

    def report(self, **content: object) -> None:
        self.append("events.jsonl", json.dumps(content) + "\n")

    def observed(self, interesting: int | None = None) -> list[AnyEvent]:
        return list(self.watch.observe(interesting))

    def concluded(self, ended: Ended = FAILED) -> list[AnyEvent]:
        return list(self.watch.conclude(ended))


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


T = TypeVar("T")


def of_kind(events: list[AnyEvent], kind: type[T]) -> list[T]:
    return [event for event in events if isinstance(event, kind)]


# --- an unmodified trainer --------------------------------------------------------------------------------------------


def test_printed_iterations_are_progress_and_output_is_shown_unchanged(watched: Watched) -> None:
    watched.append(
        "stdout.log", "step 0: train loss 4.2, val loss 4.2\niter 0: loss 4.2, time 20.5ms, mfu -100.00%\nit"
    )
    [progress] = of_kind(watched.observed(), Progress)
    assert (progress.step, progress.loss, progress.step_s, progress.block_size) == (1, 4.2, 0.0205, 64)
    watched.append("stdout.log", "er 4: loss 3.1, time 20.00ms, mfu 3.00%")
    assert of_kind(watched.observed(), Progress) == [], "a line counts when it is complete"
    assert of_kind(watched.concluded(), AttemptEnded)[0].step == 5
    assert b"".join(watched.shown) == (watched.folder / "stdout.log").read_bytes()


def test_step_that_may_change_a_decision_is_reported_at_once(watched: Watched) -> None:
    line = "iter {}: loss 4.2, time 20.5ms, mfu -100.00%\n"
    watched.append("stdout.log", line.format(0))
    watched.observed()
    watched.append("stdout.log", line.format(1))
    assert of_kind(watched.observed(), Progress) == []
    watched.append("stdout.log", line.format(9))
    assert [p.step for p in of_kind(watched.observed(interesting=10), Progress)] == [10]


def test_loss_of_nan_is_progress(watched: Watched) -> None:
    watched.append("stdout.log", "iter 7: loss nan, time 20.5ms, mfu -100.00%\n")
    assert [p.step for p in of_kind(watched.observed(), Progress)] == [8]


def test_number_too_large_to_be_a_step_is_none(watched: Watched) -> None:
    watched.append("stdout.log", f"iter {10**25}: loss 1.0, time 20.5ms, mfu -100.00%\n")
    assert of_kind(watched.observed(), Progress) == []
    assert of_kind(watched.concluded(), AttemptEnded)[0].step == 0


def test_failed_allocation_is_an_incident_with_what_it_needed_at_least(watched: Watched) -> None:
    watched.append(
        "stderr.log", f'Traceback (most recent call last):\n  File "train.py", line 1, in <module>\n{ALLOCATOR}\n'
    )
    events = watched.concluded()
    [oom] = of_kind(events, OomDetected)
    assert oom.diagnosis == "host_oom"
    assert oom.numbers.tried_to_allocate_bytes == 4096
    [ended] = of_kind(events, AttemptEnded)
    assert events[-1] is ended


def test_success_is_no_incident_whatever_was_printed(watched: Watched) -> None:
    watched.append("stderr.log", ALLOCATOR + "\n")
    assert of_kind(watched.concluded(Ended(exit=ExitStatus(code=0))), OomDetected) == []


# --- a cooperating trainer --------------------------------------------------------------------------------------------


def test_reports_of_a_cooperating_trainer_become_events(watched: Watched) -> None:
    watched.report(kind="start", step=5, target_steps=50, can_save=True, global_batch_size=48, settings={"dtype": "x"})
    watched.report(kind="step", step=6, loss=3.5, dt_s=0.25, block_size=128)
    watched.report(kind="peak", phase="train", bytes=1000, where="cuda", block_size=128)
    watched.report(kind="checkpoint", step=6, path="out/ckpt-6.pt", bytes=10)
    watched.report(kind="unavailable", knob="compile", reason="no compiler")
    events = watched.observed()
    assert of_kind(events, TrainerReported)[0].can_save
    assert of_kind(events, Progress)[0].block_size == 128
    assert of_kind(events, PeakMeasured)[0].where == "device"
    assert of_kind(events, CheckpointSaved)[0].path == "/my/project/out/ckpt-6.pt"
    assert of_kind(events, KnobUnavailable)[0].knob == "compile"


def test_printed_lines_of_a_trainer_that_reports_itself_are_not_read(watched: Watched) -> None:
    watched.report(kind="start", step=0)
    watched.append("stdout.log", "iter 99: loss 4.2, time 20.5ms, mfu -100.00%\n")
    assert of_kind(watched.observed(), Progress) == []


def test_reported_failure_tells_phase_step_and_length(watched: Watched) -> None:
    watched.report(kind="start", step=0)
    message = ALLOCATOR.removeprefix("RuntimeError: ")
    watched.report(kind="failed", phase="backward", step=9, block_size=128, type="RuntimeError", message=message)
    watched.append("stderr.log", f"Traceback (most recent call last):\n{ALLOCATOR}\n")
    [oom] = of_kind(watched.concluded(), OomDetected)
    assert (oom.phase, oom.step, oom.block_size) == ("backward", 9, 128)


def test_reported_oom_is_an_incident_though_no_text_says_so(watched: Watched) -> None:
    """In a language of its own, with nothing on stderr."""
    watched.report(kind="failed", step=9, type="AllocError", message="no room", oom=True, phase="backward")
    [oom] = of_kind(watched.concluded(Ended(exit=ExitStatus(code=75))), OomDetected)
    assert (oom.diagnosis, oom.step, oom.phase) == ("host_oom", 9, "backward")


def test_status_75_without_a_report_is_no_incident(watched: Watched) -> None:
    watched.report(kind="step", step=9, loss=1.0, dt_s=0.1)
    assert of_kind(watched.concluded(Ended(exit=ExitStatus(code=75))), OomDetected) == []


def test_reported_oom_of_a_process_that_succeeded_is_no_incident(watched: Watched) -> None:
    watched.report(kind="failed", step=9, type="E", message="m", oom=True)
    assert of_kind(watched.concluded(Ended(exit=ExitStatus(code=0))), OomDetected) == []


def test_checkpoint_after_a_reported_oom_is_an_emergency_and_no_step_is_lost(watched: Watched) -> None:
    watched.report(kind="checkpoint", step=5, path="ckpt-5")
    watched.report(kind="failed", step=9, type="E", message="m", oom=True)
    watched.report(kind="checkpoint", step=9, path="ckpt-9")
    events = watched.concluded(Ended(exit=ExitStatus(code=75)))
    assert [(e.step, e.emergency) for e in of_kind(events, CheckpointSaved)] == [(5, False), (9, True)]
    assert of_kind(events, AttemptEnded)[0].step == 9


def test_peak_of_a_trainer_that_tells_steps_but_no_phases_is_taken_from_its_steps(watched: Watched) -> None:
    watched.report(kind="start", step=0)
    watched.report(kind="step", step=1, peak_bytes=900)
    assert of_kind(watched.observed(interesting=1), PeakMeasured) == [], "the first step may not have it all yet"
    watched.report(kind="step", step=2, peak_bytes=800)
    assert [p.bytes for p in of_kind(watched.observed(interesting=2), PeakMeasured)] == [900]
    watched.report(kind="phase", step=2, phase="train")
    watched.report(kind="step", step=3, peak_bytes=1000)
    assert of_kind(watched.observed(interesting=3), PeakMeasured) == [], "it tells its phases' peaks itself"


def test_half_a_report_waits_for_its_other_half(watched: Watched) -> None:
    watched.append("events.jsonl", '{"kind":"unavailable","knob":"com')
    assert watched.observed() == []
    watched.append("events.jsonl", 'pile","reason":"x"}\n')
    assert of_kind(watched.observed(), KnobUnavailable)[0].knob == "compile"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
FIELDS = sorted(FIELD_TYPES)
KINDS_AND_NEW = (*KINDS, "new")
VALID = {"step": 3, "loss": 1.0, "dt_s": 1.0, "phase": "train", "bytes": 5, "path": "p", "knob": "k", "reason": "r"}
REPORTS = st.builds(
    lambda kind, strange: {"kind": kind, **VALID, "type": "RuntimeError", "message": ALLOCATOR, **strange},
    st.sampled_from(KINDS_AND_NEW),
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(REPORTS | ANYTHING, max_size=3))
def test_no_report_however_strange_breaks_the_supervision_or_the_journal(reports: list[object]) -> None:
    with TemporaryDirectory() as folder:
        watched = Watched(Path(folder))
        watched.append("events.jsonl", "".join(json.dumps(report) + "\n" for report in reports))
        watched.append("stderr.log", f"Traceback (most recent call last):\n{ALLOCATOR}\n")
        for event in watched.observed() + watched.concluded():
            msgspec.json.decode(msgspec.json.encode(event), type=AnyEvent)


def test_checkpoint_that_cannot_be_copied_is_told_once_and_used_where_it_is(tmp_path: Path) -> None:
    source = tmp_path / "ckpt.pt"
    (tmp_path / "copies").touch()  # no folder can be made here
    watched = Watched(tmp_path, Keeper(source, tmp_path / "copies", not_before=0))
    for step in (10, 20):
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("ckpt/data.pkl", pickle.dumps({"iter_num": step}, protocol=2))
        events = list(watched.watch.observe(None, final=True))
        [saved] = [event for event in events if isinstance(event, CheckpointSaved)]
        assert (saved.step, saved.path, saved.copy) == (step, str(source), None)
        assert [isinstance(event, Note) for event in events].count(True) == (step == 10)


def test_report_nested_without_end_tells_nothing(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.append("events.jsonl", "[" * 200_000 + "\n")
    assert watched.observed() == []
