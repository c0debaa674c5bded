"""What is so: the state of a run, and `evolve`, the only place where it changes.

State is the fold of the journal, so `gpusup log`, a supervisor that takes over and a replay under another policy all
see the same. `evolve` never decides.
"""

from functools import reduce
from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from .events import (
    AnyEvent,
    AttemptEnded,
    AttemptPlanned,
    AttemptStarted,
    BudgetApplied,
    Change,
    Changes,
    CheckpointRejected,
    CheckpointSaved,
    Finished,
    GpuTrouble,
    HangDetected,
    KnobUnavailable,
    MemoryWaited,
    Note,
    OomDetected,
    PeakMeasured,
    Progress,
    RemediationChosen,
    RemediationSkipped,
    RestorationChosen,
    RestorationKept,
    RestorationReverted,
    RestorationSkipped,
    Resumed,
    RunCreated,
    SoftOomDetected,
    StopAsked,
    StopRequested,
    SupervisorStarted,
    TrainerReported,
)
from .policy import ACCUMULATION, MICRO_BATCH, Settings
from .verdict import Cause, ExitStatus

GROWTH = frozenset({"device_oom", "host_oom"})
"""Diagnoses in which the attempt's own growth ran out of memory: its combination of settings does not fit."""

TRANSIENT = frozenset({Cause.LEAK, Cause.NOT_GIVEN_BACK})
"""Causes that say nothing against the settings: the same ones fit again in a fresh process."""

FOREIGN_BYTES = 256 << 20
"""Less than this in the hands of other processes is a desktop, not a cause."""


def held_by_others(oom: OomDetected) -> bool:
    """Whether other processes held what was missing: then the settings may fit without them."""
    tried, free = oom.numbers.tried_to_allocate_bytes, oom.numbers.free_bytes
    missing = 0 if tried is None else tried - min(free or 0, tried)
    return oom.foreign_bytes is not None and oom.foreign_bytes >= max(missing, FOREIGN_BYTES)


class CheckpointRef(Struct, frozen=True):
    """A checkpoint of this run; `source` is the file to verify and resume from."""

    step: int
    path: str
    copy: str | None = None

    @property
    def source(self) -> str:
        return self.copy or self.path


class Combination(Struct, frozen=True):
    """Settings that ran out of memory. A larger micro-batch with the same rest would, too."""

    micro_batch: int | None
    rest: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, settings: Settings) -> "Combination":
        rest = sorted((k, repr(v)) for k, v in settings.items() if k not in (MICRO_BATCH, ACCUMULATION, "block_size"))
        micro_batch = settings.get(MICRO_BATCH)
        return cls(micro_batch if isinstance(micro_batch, int) else None, tuple(rest))

    def covers(self, other: "Combination") -> bool:
        """Whether `other` must fail because this one did."""
        if self.rest != other.rest:
            return False
        if self.micro_batch is None or other.micro_batch is None:
            return self.micro_batch == other.micro_batch
        return other.micro_batch >= self.micro_batch


class Peak(Struct, frozen=True):
    phase: str
    block_size: int | None
    bytes: int


class Attempt(Struct, frozen=True, kw_only=True):
    """One launch: what was intended, what was seen."""

    n: int
    settings: Settings
    argv: tuple[str, ...]
    because: str
    planned_at: str = ""
    ended_at: str = ""
    resume_step: int | None = None
    resume_path: str | None = None
    from_step: int = 0
    step: int = 0
    new_from: int = 0
    """Steps up to here had been done before: only later ones are new."""
    loss: float | None = None
    step_s: float | None = None
    pid: int | None = None
    start_ticks: int | None = None
    block_size: int | None = None
    can_save: bool = False
    budget_limit_bytes: int | None = None
    """Of its memory in all, confirmed; None without a budget, or before it took effect."""
    peaks: tuple[Peak, ...] = ()
    peak_bytes: int | None = None
    told: frozenset[str] = frozenset()
    """Topics of the notes that are told once in an attempt."""
    stop: StopRequested | None = None
    oom: OomDetected | None = None
    hang: HangDetected | None = None
    exit: ExitStatus | None = None
    diagnosis: str = ""
    message: str = ""

    @property
    def ended(self) -> bool:
        return self.exit is not None

    @property
    def new_steps(self) -> int:
        """Optimizer steps this attempt added to the run, replayed ones not counted."""
        return max(0, self.step - self.new_from)


class Probation(Struct, frozen=True):
    """A speedup on trial, and how to take it back."""

    lever: str
    changes: Changes
    attempt: int
    """The attempt that tries it: the one after the attempt in which it was chosen."""


class State(Struct, frozen=True, kw_only=True):
    """The whole of a run."""

    run: RunCreated | None = None
    settings: Settings = {}
    """For the next attempt."""
    attempts: tuple[Attempt, ...] = ()
    checkpoints: tuple[CheckpointRef, ...] = ()
    rejected: tuple[CheckpointRef, ...] = ()
    """Found unreadable since this supervisor began; the next one looks again."""
    max_step: int = 0
    lost_steps: int = 0
    target_steps: int | None = None
    global_batch_size: int | None = None
    unavailable: tuple[str, ...] = ()
    failed: tuple[Combination, ...] = ()
    useless_rungs: tuple[int, ...] = ()
    skipped: frozenset[tuple[str, str]] = frozenset()
    """(rung or lever, reason) pairs already told."""
    decided: bool = True
    """Whether the end of the last attempt has been decided upon."""
    last_remediation: RemediationChosen | None = None
    probation: Probation | None = None
    failed_tries: dict[str, int] = {}
    waiting_for_memory_s: float | None = None
    gpu_trouble: str = ""
    """Since this supervisor began; the next one looks again."""
    stop_asked: StopAsked | None = None
    finished: Finished | None = None
    last_seq: int = 0
    started_at: str = ""
    last_at: str = ""

    @property
    def attempt(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def checkpoint(self) -> CheckpointRef | None:
        """The newest checkpoint that has not been rejected."""
        return self.checkpoints[-1] if self.checkpoints else None

    def known_to_fail(self, settings: Settings) -> bool:
        wanted = Combination.of(settings)
        return any(failed.covers(wanted) for failed in self.failed)


def applied(settings: Settings, changes: Changes) -> Settings:
    """Settings after `changes`; a value of None takes the knob off (unknown again)."""
    merged = {**settings, **{knob: change.after for knob, change in changes.items()}}
    return {knob: value for knob, value in merged.items() if value is not None}


def inverse(changes: Changes) -> Changes:
    return {knob: Change(change.after, change.before) for knob, change in changes.items()}


def evolve(state: State, event: AnyEvent) -> State:
    """The state after `event`. Total: every journal that the program wrote folds without an error."""
    if isinstance(event, RunCreated):
        state = State(
            run=event,
            settings=event.settings,
            target_steps=event.target_steps,
            global_batch_size=event.global_batch_size,
            started_at=event.at,
        )
    return replace(_evolve(state, event), last_seq=event.seq, last_at=event.at or state.last_at)


def fold(events: list[AnyEvent]) -> State:
    """The state a journal tells."""
    return reduce(evolve, events, State())


def _evolve(state: State, event: AnyEvent) -> State:
    match event:
        case RunCreated():
            return state
        case Note():
            return _told(state, event)
        case SupervisorStarted():  # taking over a run that was stopped continues it
            again = sorted({*state.checkpoints, *state.rejected}, key=lambda ref: ref.step)
            return replace(state, finished=None, stop_asked=None, checkpoints=tuple(again), rejected=(), gpu_trouble="")
        case StopAsked():
            now = event.now or (state.stop_asked is not None and state.stop_asked.now)
            return replace(state, stop_asked=replace(event, now=now))
        case Finished():
            incident = state.attempt is not None and state.attempt.oom is not None and not state.decided
            return replace(state, finished=event, decided=not incident)  # taken over, an OOM is still to be remedied
        case AttemptPlanned():
            return _planned(state, event)
        case (
            AttemptStarted()
            | Resumed()
            | BudgetApplied()
            | TrainerReported()
            | Progress()
            | PeakMeasured()
            | StopRequested()
            | OomDetected()
            | HangDetected()
            | AttemptEnded()
        ):
            return _attempt_event(state, event)
        case KnobUnavailable():
            return replace(state, unavailable=tuple(dict.fromkeys((*state.unavailable, event.knob))))
        case CheckpointSaved():
            ref = CheckpointRef(event.step, event.path, event.copy)
            kept = [c for c in state.checkpoints if c.step < event.step and c.source != ref.source]
            rejected = tuple(c for c in state.rejected if c.step < event.step)
            state = replace(state, checkpoints=(*kept[-3:], ref), rejected=rejected)
            return _progressed(state, event.attempt, event.step)
        case CheckpointRejected():
            bad = tuple(c for c in state.checkpoints if (c.source, c.step) == (event.path, event.step))
            kept = [c for c in state.checkpoints if c not in bad]
            return replace(state, checkpoints=tuple(kept), rejected=(*state.rejected, *bad))
        case RemediationChosen():
            changed = applied(state.settings, event.changes) if event.applied else state.settings
            return replace(
                state,
                settings=changed,
                last_remediation=event,
                decided=True,
                waiting_for_memory_s=event.wait_for_memory_s if event.applied else None,
            )
        case SoftOomDetected():
            return state
        case GpuTrouble():
            return replace(state, gpu_trouble="" if event.trouble == "none" else event.trouble)
        case MemoryWaited():
            state, waited = replace(state, waiting_for_memory_s=None), state.last_remediation
            if event.enough or waited is None:
                return state
            return replace(state, decided=False, useless_rungs=(*state.useless_rungs, waited.rung))
        case RemediationSkipped():
            return replace(state, skipped=state.skipped | {(f"rung {event.rung}", event.because)})
        case RestorationSkipped():
            return replace(state, skipped=state.skipped | {(event.lever, event.because)})
        case RestorationChosen():
            return _restoring(state, event)
        case RestorationKept():
            return replace(state, probation=None)
        case RestorationReverted():
            tried = state.probation is None or state.probation.attempt <= event.attempt
            tries = state.failed_tries.get(event.lever, 0) + 1
            return replace(
                state,
                settings=applied(state.settings, event.changes),
                probation=None,
                decided=tried,  # else the attempt itself is still to be decided upon
                failed_tries={**state.failed_tries, event.lever: tries} if tried else state.failed_tries,
            )
        case _:
            assert_never(event)


def _planned(state: State, event: AttemptPlanned) -> State:
    from_step = event.resume_step or 0
    attempt = Attempt(
        n=event.attempt,
        settings=event.settings,
        argv=event.argv,
        because=event.because,
        planned_at=event.at,
        resume_step=event.resume_step,
        resume_path=event.resume_path,
        from_step=from_step,
        step=from_step,
        new_from=max(from_step, state.max_step),
        can_save=state.run.checkpoints.can_save_on_request if state.run else False,
    )
    return replace(state, attempts=(*state.attempts, attempt), decided=True)


def _restoring(state: State, event: RestorationChosen) -> State:
    settings = applied(state.settings, event.changes)
    if event.reason == "useless":
        rungs = state.useless_rungs if event.rung is None else (*state.useless_rungs, event.rung)
        return replace(state, settings=settings, useless_rungs=rungs, last_remediation=None)
    return replace(
        state,
        settings=settings,
        probation=Probation(event.lever, event.changes, event.attempt + 1),
    )


def _update(state: State, n: int, **changes: object) -> State:
    attempts = tuple(replace(a, **changes) if a.n == n else a for a in state.attempts)
    return replace(state, attempts=attempts)


def _told(state: State, event: Note) -> State:
    attempt = next((a for a in state.attempts if a.n == event.attempt), None)
    return state if attempt is None else _update(state, attempt.n, told=attempt.told | {event.topic})


def _progressed(state: State, n: int, step: int) -> State:
    state = _update(state, n, step=max(step, next((a.step for a in state.attempts if a.n == n), 0)))
    return replace(state, max_step=max(state.max_step, step))


AttemptEvent = (
    AttemptStarted
    | Resumed
    | BudgetApplied
    | TrainerReported
    | Progress
    | PeakMeasured
    | StopRequested
    | OomDetected
    | HangDetected
    | AttemptEnded
)


def _attempt_event(state: State, event: AttemptEvent) -> State:
    n = event.attempt
    match event:
        case AttemptStarted():
            return _update(state, n, pid=event.pid, start_ticks=event.start_ticks)
        case Resumed():
            before = next(
                (a.step for a in reversed(state.attempts) if a.n < n), 0
            )  # not the furthest: that was counted
            state = replace(state, lost_steps=state.lost_steps + max(0, before - event.step))
            return _update(state, n, from_step=event.step, step=event.step)
        case BudgetApplied():
            return _update(state, n, budget_limit_bytes=event.limit_bytes)
        case TrainerReported():
            state = replace(
                state,
                target_steps=event.target_steps or state.target_steps,
                global_batch_size=event.global_batch_size or state.global_batch_size,
            )
            return _update(state, n, can_save=event.can_save)
        case Progress():
            state = _progressed(state, n, event.step)
            return _update(state, n, loss=event.loss, step_s=event.step_s, block_size=event.block_size)
        case PeakMeasured():
            return _peak(state, event)
        case StopRequested():
            return _update(state, n, stop=event)
        case OomDetected():
            return _out_of_memory(state, event)
        case HangDetected():
            return _update(state, n, hang=event)
        case AttemptEnded():
            state = _progressed(state, n, event.step)
            state = _update(
                state,
                n,
                exit=event.exit,
                diagnosis=event.diagnosis,
                message=event.message,
                ended_at=event.at,
                peak_bytes=event.peak_bytes,
            )
            return replace(state, decided=False)
        case _:
            assert_never(event)


def _peak(state: State, event: PeakMeasured) -> State:
    attempt = next((a for a in state.attempts if a.n == event.attempt), None)
    if attempt is None:
        return state
    known = {(p.phase, p.block_size): p.bytes for p in attempt.peaks}
    key = (event.phase, event.block_size)
    known[key] = max(event.bytes, known.get(key, 0))
    return _update(state, attempt.n, peaks=tuple(Peak(phase, size, b) for (phase, size), b in known.items()))


def _out_of_memory(state: State, event: OomDetected) -> State:
    state = _update(state, event.attempt, oom=event)
    attempt = next((a for a in state.attempts if a.n == event.attempt), None)
    if attempt is None or event.diagnosis not in GROWTH or event.cause in TRANSIENT or held_by_others(event):
        return state
    combination = Combination.of(attempt.settings)
    if combination in state.failed:
        return state
    return replace(state, failed=(*state.failed, combination))
