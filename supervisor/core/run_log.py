"""The post-mortem as data, a pure function of the journal; schemas/log-v1.json is its contract."""

from datetime import datetime
from typing import Literal

from msgspec import Struct

from .decide import succeeded
from .effects import Effect, effects
from .events import AnyEvent, AttemptEnded, CheckpointSaved, Finished, OomDetected, Progress, RunResult, StopRequested
from .ladder import describe
from .policy import Settings
from .state import Attempt, State, fold
from .verdict import ExitStatus

SCHEMA_VERSION = 1

RunState = Literal["running", "lost"] | RunResult


class RunSummary(Struct, frozen=True, kw_only=True):
    """One run. `state` is `lost` when it is unfinished and nobody supervises it. Times are RFC 3339, UTC."""

    id: str
    name: str
    policy: str
    dialect: str
    state: RunState
    exit_code: int | None
    global_batch_size: int | None
    steps: int
    target_steps: int | None
    lost_steps: int
    """Optimizer steps done twice, because a restart went back to a checkpoint."""
    lost_s: float
    """Seconds from each failure until training was further than it had been."""
    restoring_s: float
    """The same for the restarts that gave speed back."""
    started: str
    ended: str | None
    elapsed_s: float
    attempts: int
    ooms: int
    memory_budget_bytes: int | None
    settings_at_start: Settings
    settings_at_end: Settings
    why: str
    next_time: str


class AttemptSummary(Struct, frozen=True, kw_only=True):
    n: int
    settings: Settings
    argv: tuple[str, ...]
    argv_changes: tuple[str, ...]
    """Arguments that differ from the attempt before."""
    because: str
    from_step: int
    to_step: int
    peak_bytes: int | None
    exit: ExitStatus | None
    diagnosis: str
    started: str
    ended: str | None


class RunLog(Struct, frozen=True, kw_only=True):
    schema_version: int
    run: RunSummary
    attempts: tuple[AttemptSummary, ...]
    effects: tuple[Effect, ...]
    events: tuple[AnyEvent, ...]


def run_log(events: list[AnyEvent], supervised: bool) -> RunLog:
    """Everything that is known of a run. `supervised`: whether a supervisor holds it now."""
    state = fold(events)
    return RunLog(
        schema_version=SCHEMA_VERSION,
        run=summarize(state, events, supervised),
        attempts=tuple(_attempt(state, attempt) for attempt in state.attempts),
        effects=tuple(effects(state)),
        events=tuple(events),
    )


def summarize(state: State, events: list[AnyEvent], supervised: bool) -> RunSummary:
    run, finished = state.run, state.finished
    assert run is not None
    failures_s, restoring_s = seconds_down(events)
    unfinished: RunState = "running" if supervised else "lost"
    return RunSummary(
        id=run.run_id,
        name=run.name,
        policy=run.policy_name,
        dialect=run.dialect,
        state=finished.result if finished else unfinished,
        exit_code=finished.exit_code if finished else None,
        global_batch_size=state.global_batch_size,
        steps=state.max_step,
        target_steps=state.target_steps,
        lost_steps=state.lost_steps,
        lost_s=round(failures_s, 1),
        restoring_s=round(restoring_s, 1),
        started=state.started_at,
        ended=finished.at if finished else None,
        elapsed_s=round(seconds_between(state.started_at, state.last_at), 1),
        attempts=len(state.attempts),
        ooms=sum(attempt.oom is not None for attempt in state.attempts),
        memory_budget_bytes=run.memory_budget_bytes,
        settings_at_start=run.settings,
        settings_at_end=state.settings,
        why=why(state),
        next_time=next_time(state),
    )


def _attempt(state: State, attempt: Attempt) -> AttemptSummary:
    before = state.attempts[attempt.n - 2].argv if attempt.n > 1 else None
    return AttemptSummary(
        n=attempt.n,
        settings=attempt.settings,
        argv=attempt.argv,
        argv_changes=() if before is None else argv_changes(before, attempt.argv),
        because=attempt.because,
        from_step=attempt.from_step,
        to_step=attempt.step,
        peak_bytes=attempt.peak_bytes,
        exit=attempt.exit,
        diagnosis=attempt.diagnosis,
        started=attempt.planned_at,
        ended=attempt.ended_at or None,
    )


def argv_changes(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[str, ...]:
    """Arguments of `after` that were not in `before`; an option that is gone is shown as `(without --x=y)`."""
    added = [token for token in after if token not in before]
    keys = {token.partition("=")[0] for token in after}
    gone = [f"(without {token})" for token in before if token not in after and token.partition("=")[0] not in keys]
    return (*added, *gone)


def seconds_between(start: str, end: str) -> float:
    if not start or not end:
        return 0.0
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def seconds_down(events: list[AnyEvent]) -> tuple[float, float]:
    """Time in which training got no further than it had been: after failures, and while giving speed back.

    Counted from an attempt's end to the first step that is new: restarts, replayed steps and failed tries.
    """
    failures_s = restoring_s = 0.0
    down_since, restoring, furthest = "", False, 0
    told_to_leave: set[int] = set()
    for event in events:
        match event:
            case Progress() | CheckpointSaved() if event.step > furthest:
                down_s = seconds_between(down_since, event.at) if down_since else 0.0
                failures_s, restoring_s = failures_s + down_s * (not restoring), restoring_s + down_s * restoring
                down_since, furthest = "", event.step
            case StopRequested():
                told_to_leave.add(event.attempt)
            case AttemptEnded():
                furthest = max(furthest, event.step)
                if event.exit.code != 0 and not down_since:
                    down_since, restoring = event.at, event.attempt in told_to_leave
            case Finished():  # what comes after a stop was the person's own time
                down_since = ""
    return failures_s, restoring_s


# --- in one sentence -------------------------------------------------------------------------------------------------


def why(state: State) -> str:
    """Why it failed, or that it did not."""
    ooms = [attempt.oom for attempt in state.attempts if attempt.oom is not None]
    if state.finished is not None and (not ooms or state.finished.result == "failed"):
        return state.finished.why
    if not ooms:
        return "no incident so far"
    first = ooms[0]
    attempt = next(a for a in state.attempts if a.n == first.attempt)
    place = [first.phase] if first.phase else []
    place += [f"sequence length {first.block_size}"] if first.block_size else []
    where = f" ({', '.join(place)})" if place else ""
    return f"{describe(attempt.settings)} ran out of memory at step {first.step + 1}{where}: {_refused(first, attempt)}"


def _refused(oom: OomDetected, attempt: Attempt) -> str:
    tried = oom.numbers.tried_to_allocate_bytes
    refused = f"{_gib(tried)} more were refused" if tried is not None else "an allocation was refused"
    allowed = oom.numbers.allowed_bytes or attempt.budget_limit_bytes
    if allowed is not None:
        return f"{refused}, and {_gib(allowed)} were allowed in all"
    total = oom.numbers.total_bytes
    return refused if total is None else f"{refused} by a device of {_gib(total)}"


def next_time(state: State) -> str:
    """What to start with, from what fitted last."""
    fitted = [a for a in state.attempts if a.oom is None and (a.new_steps > 0 or succeeded(a))]
    if not any(a.oom for a in state.attempts):
        return "" if state.finished is None or state.finished.result != "failed" else "mend the cause and start again"
    if not fitted:
        return "nothing that was tried fits: a shorter sequence, a smaller model or more memory is needed"
    assert state.run is not None
    last = fitted[-1]
    if last.settings == state.run.settings:
        return "the same settings; they fitted in the end"
    added = [
        t for t in argv_changes(state.run.command, last.argv) if not t.startswith(("--init_from", "--resume_from"))
    ]
    return (
        f"start with {describe(last.settings)} ({' '.join(added)})"
        if added
        else f"start with {describe(last.settings)}"
    )


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.2f} GiB"
