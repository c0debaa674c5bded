"""A cooperating trainer's reports, one by one: what they tell, and that docs/trainer-protocol.md says the same."""

import copy
import json
from typing import Any

import pytest
from gpusup.supervisor.core.events import AnyEvent, CheckpointSaved, Note, Progress, TrainerReported
from gpusup.supervisor.core.state import Attempt
from gpusup.supervisor.launch_env import PROTOCOL as ENVIRONMENT_PROTOCOL
from gpusup.supervisor.reports import PROTOCOL, Reports
from gpusup.trainer import hook
from msgspec.structs import replace
from protocol_doc import FIELD_TYPES, KINDS, UNUSED

ATTEMPT = Attempt(n=1, settings={}, argv=(), because="")
SAMPLES: dict[type, Any] = {str: "x", int: 1, float: 0.5, bool: True, dict: {}}


@pytest.fixture
def reports() -> Reports:
    return Reports("/my/project", ATTEMPT, saved_step=-1)


def read(reports: Reports, kind: str, **fields: object) -> list[AnyEvent]:
    return reports.read(json.dumps({"kind": kind, **fields}).encode())


def notes(events: list[AnyEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


# --- the document -----------------------------------------------------------------------------------------------------


class Recording(dict[str, Any]):
    """Remembers which fields were asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def complete(kind: str, leave_out: tuple[str, ...] = ()) -> Recording:
    needed, optional = KINDS[kind]
    names = {"step", *needed, *optional} - {*leave_out}
    return Recording({"kind": kind, **{name: SAMPLES[FIELD_TYPES[name][0]] for name in sorted(names)}})


def told(kind: str, report: dict[str, Any]) -> bool:
    """Whether the report made an event or changed what is known."""
    reports = Reports("/", ATTEMPT, saved_step=-1)
    before = copy.copy(vars(reports))
    return bool(reports.read(json.dumps(report).encode())) or vars(reports) != before


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_are_read_are_in_the_document(kind: str, reports: Reports) -> None:
    report = complete(kind)
    list(reports.events(report))
    needed, optional = KINDS[kind]
    assert report.read - {"kind", "step"} <= needed | optional


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_tell_something_are_those_of_the_document(kind: str) -> None:
    assert told(kind, complete(kind)) == (kind not in UNUSED)


@pytest.mark.parametrize("kind", sorted({*KINDS} - UNUSED))
def test_report_tells_something_without_its_optional_fields_and_nothing_without_a_needed_one(kind: str) -> None:
    needed, optional = KINDS[kind]
    assert told(kind, complete(kind, tuple(optional)))
    for name in needed - {"can_save", "where", "phase"}:  # absent: it cannot, the host, and a phase is not looked at
        assert not told(kind, complete(kind, (name,))), name


def test_every_field_of_the_document_is_in_some_event_and_the_other_way_round() -> None:
    in_events = {name for needed, optional in KINDS.values() for name in needed | optional}
    assert in_events | {"kind", "step"} == set(FIELD_TYPES)


def test_hook_reader_and_environment_agree_on_the_version() -> None:
    assert hook.PROTOCOL == PROTOCOL == ENVIRONMENT_PROTOCOL


# --- version ----------------------------------------------------------------------------------------------------------


def test_reports_in_another_version_are_said_to_be_unread_and_are_not_read(reports: Reports) -> None:
    [text] = notes(read(reports, "start", step=0, protocol=2, can_save=True))
    assert "version 2 of the protocol" in text
    assert read(reports, "checkpoint", step=5, path="x") == []
    assert (reports.step, reports.begun) == (0, True)


def test_null_is_the_same_as_absent(reports: Reports) -> None:
    nothing = dict.fromkeys(KINDS["start"][1] | {"can_save"})
    assert read(reports, "start", step=0, **nothing) == [TrainerReported(attempt=1, step=0)]


def test_start_without_a_version_is_the_first_one(reports: Reports) -> None:
    assert [type(event) for event in read(reports, "start", step=0)] == [TrainerReported]


# --- steps ------------------------------------------------------------------------------------------------------------


def test_step_without_a_loss_is_progress(reports: Reports) -> None:
    """NaN is null in JSON."""
    read(reports, "step", step=7, loss=None, dt_s=None)
    assert reports.progress == Progress(attempt=1, step=7)


def test_allocator_that_frees_its_cache_to_go_on_is_told_once_per_attempt(reports: Reports) -> None:
    """What it did before the first step does not count, and a takeover does not say it again."""
    lines = [{"step": step, "alloc_retries": retries} for step, retries in ((1, 3), (2, 3), (3, 5), (4, 9))]
    events = [event for line in lines for event in read(reports, "step", **line)]
    [note] = [event for event in events if isinstance(event, Note)]
    assert note.text.startswith("the allocator had to free its cache 2 times to go on: memory is nearly exhausted")
    after = Reports("/", replace(ATTEMPT, told=frozenset({note.topic})), saved_step=-1)
    assert [event for line in lines for event in read(after, "step", **line)] == []


def test_first_skipped_update_is_told(reports: Reports) -> None:
    texts = [notes(read(reports, "skipped", step=step, reason="overflow", count=step)) for step in (4, 5)]
    assert texts == [["an update was not applied after step 4: overflow"], []]


# --- checkpoints and failures -----------------------------------------------------------------------------------------


def test_each_save_that_failed_is_told_once(reports: Reports) -> None:
    texts = [
        notes(read(reports, "checkpoint_failed", step=step, message="No space left on device")) for step in (5, 5, 9)
    ]
    assert texts == [
        ["nothing was saved at step 5: No space left on device"],
        [],
        ["nothing was saved at step 9: No space left on device"],
    ]


def refused(reports: Reports, step: int, **fields: object) -> None:
    read(reports, "failed", step=step, **{"type": "E", "message": "no room", "oom": True, **fields})


def lost_a_peer(reports: Reports, step: int) -> None:
    read(reports, "failed", step=step, type="RuntimeError", message="Connection closed by peer", oom=False, rank=0)


@pytest.mark.parametrize("refused_first", [True, False])
def test_rank_whose_memory_was_refused_counts_before_the_ranks_that_lost_it(
    reports: Reports, refused_first: bool
) -> None:
    if refused_first:
        refused(reports, 6, rank=1)
    lost_a_peer(reports, 6)
    if not refused_first:
        refused(reports, 6, rank=1)
    assert reports.failure is not None
    assert (reports.failure.oom, reports.failure.rank) == (True, 1)


def test_failure_after_which_steps_go_on_was_caught(reports: Reports) -> None:
    """One more step may be another rank's."""
    refused(reports, 6)
    read(reports, "step", step=7)
    assert reports.failure is not None
    read(reports, "step", step=8)
    assert reports.failure is None
    [saved] = read(reports, "checkpoint", step=8, path="x")
    assert isinstance(saved, CheckpointSaved)
    assert not saved.emergency


def test_regular_checkpoint_that_becomes_durable_after_an_oom_is_no_emergency(reports: Reports) -> None:
    refused(reports, 6)
    saved = [event for step in (5, 6) for event in read(reports, "checkpoint", step=step, path="x")]
    assert [(e.step, e.emergency) for e in saved if isinstance(e, CheckpointSaved)] == [(5, False), (6, True)]


def test_other_failure_much_later_takes_the_place_of_a_caught_one(reports: Reports) -> None:
    refused(reports, 6)
    read(reports, "failed", step=90, type="ValueError", message="bad sample", oom=False)
    assert reports.failure is not None
    assert reports.failure.type == "ValueError"
