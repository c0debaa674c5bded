"""The cause of a shortage, as the history of the run shows it. What the message alone tells is `diagnosis`'s."""

from .events import OomDetected
from .growth import Growth
from .state import State, held_by_others
from .verdict import Cause

SETTLED_STEPS = 10
"""Before, memory grows because a model is loaded and caches fill."""


def cause_of(oom: OomDetected, state: State, growth: Growth | None, held_at_start: bool) -> str:
    """The cause to record. `held_at_start`: a trainer before this one had not given its memory back."""
    attempt = state.attempt
    steps = oom.step - attempt.from_step if attempt is not None else 0
    held_at_start = held_at_start and steps <= 0  # later it would have been given back
    if held_by_others(oom):
        return Cause.NOT_GIVEN_BACK if held_at_start else Cause.FOREIGN
    if held_at_start:
        return Cause.NOT_GIVEN_BACK
    if attempt is not None and attempt.resume_step is not None and steps <= 0:
        before = [other for other in state.attempts[:-1] if other.settings == attempt.settings]
        if any(other.step > other.from_step for other in before):
            return Cause.RESUME  # it fitted, until it had to be loaded
    if steps >= SETTLED_STEPS and oom.cause in (Cause.OWN_GROWTH, Cause.REFUSED) and growth in ("leak", "spike"):
        return Cause(growth)
    return oom.cause
