"""The ladder as it would unfold, shown before the night: `decide` itself, fed with one OOM after another."""

from .decide import decide
from .events import (
    AnyEvent,
    AttemptEnded,
    AttemptPlanned,
    AttemptStarted,
    BudgetApplied,
    Finished,
    OomDetected,
    RemediationChosen,
    RemediationSkipped,
    RunCreated,
)
from .state import State, evolve
from .verdict import ExitStatus, OomNumbers

MAX_RUNGS = 200


def unfold(run: RunCreated) -> list[RemediationChosen | RemediationSkipped | Finished]:
    """Every decision of the policy if each attempt ran out of memory, down to giving up."""
    state = evolve(State(), run)
    told: list[RemediationChosen | RemediationSkipped | Finished] = []
    for _ in range(MAX_RUNGS):
        decision = decide(state, run.policy, 0.0)
        if decision is None:
            break
        state = evolve(state, decision)
        if isinstance(decision, (RemediationChosen, RemediationSkipped, Finished)):
            told.append(decision)
        if isinstance(decision, Finished):
            break
        if isinstance(decision, AttemptPlanned):
            for event in _out_of_memory(run, decision.attempt):
                state = evolve(state, event)
    return told


def _out_of_memory(run: RunCreated, n: int) -> list[AnyEvent]:
    """The attempt fails by its own growth, on another request each time, so that no rung looks useless."""
    on_gpu = run.trains_on == "gpu"
    kind = "device_oom" if on_gpu else "host_oom"
    return [
        AttemptStarted(attempt=n, pid=1, start_ticks=1),
        BudgetApplied(attempt=n, where="device" if on_gpu else "host", baseline_bytes=0, limit_bytes=0),
        OomDetected(
            attempt=n,
            diagnosis=kind,
            step=0,
            message="",
            numbers=OomNumbers(tried_to_allocate_bytes=n),
            foreign_bytes=0,
        ),
        AttemptEnded(attempt=n, exit=ExitStatus(code=1), step=0, diagnosis=kind),
    ]
