"""Down and up: which rung of the ladder applies to an incident, and which speedup can be given back.

A considered rung or lever yields the changes it would make, or the reason why not, which the journal tells once.
"""

from msgspec import Struct

from .batch import accumulation_for, exact_micro_batches
from .events import Change, Changes, RemediationChosen
from .policy import ACCUMULATION, MICRO_BATCH, Policy, Remediation, Settings
from .state import State, applied, held_by_others


class Not(Struct, frozen=True):
    """Not applicable. `why` is told once; empty means there is nothing worth telling."""

    why: str = ""


# --- down ------------------------------------------------------------------------------------------------------------


def consider_rung(state: State, index: int, rung: Remediation) -> Changes | Not:
    """The changes rung `index` would make now, or why it does not apply."""
    if rung.wait_for_memory_s is not None:
        in_vain = Not("it was waited for in this run, and others kept the memory")
        return in_vain if index in state.useless_rungs else _consider_waiting(state)
    if rung.set is not None and all(state.settings.get(knob) == target for knob, target in rung.set.items()):
        return Not()
    for knob, wanted in rung.when.items():
        if knob in state.settings and state.settings[knob] != wanted:
            return Not(f"it is for {knob} {show(wanted)}, and {knob} is {show(state.settings[knob])}")
    if index in state.useless_rungs:
        return Not("it was tried in this run and the very same request failed again")
    return _consider_step(state, rung) if rung.set is None else _consider_set(state, rung.set)


def _consider_waiting(state: State) -> Changes | Not:
    oom = state.attempt.oom if state.attempt else None
    if oom is None or oom.diagnosis != "device_oom":
        return Not("it is for GPU memory held by other processes")
    if oom.foreign_bytes is None:
        return Not("what other processes hold could not be observed")
    return {} if held_by_others(oom) else Not()


def _consider_set(state: State, wanted: Settings) -> Changes | Not:
    run = state.run
    assert run is not None
    changes: Changes = {}
    for knob, target in wanted.items():
        if knob not in run.origins:
            return Not(f"the {run.dialect} dialect has no {knob} to set")
        if knob in run.no_effect:
            return Not(run.no_effect[knob])
        if knob == "compile" and knob in state.unavailable:
            return Not("compile is unavailable here, so it is off already")
        if state.settings.get(knob) != target:
            changes[knob] = Change(state.settings.get(knob), target)
    if state.known_to_fail(applied(state.settings, changes)):
        return Not(f"{describe(applied(state.settings, changes))} ran out of memory in this run already")
    return changes


def _consider_step(state: State, rung: Remediation) -> Changes | Not:
    current = state.settings.get(MICRO_BATCH)
    held = state.global_batch_size
    if not isinstance(current, int) or held is None:
        return Not("the micro-batch or its accumulation is unknown, so the global batch could not be held")
    for smaller in reversed(_exact(state)):
        if rung.min <= smaller < current:
            changes = _to_micro_batch(state, smaller)
            if not state.known_to_fail(applied(state.settings, changes)):
                return changes
    return Not(f"no smaller micro-batch than {current} holds the global batch of {held}, or all of them failed")


def useless(state: State, policy: Policy) -> RemediationChosen | None:
    """The remediation just tried, when the same request failed again in the same phase: proof that it freed nothing."""
    tried = state.last_remediation
    if tried is None or len(state.attempts) < 2 or not policy.remediations[tried.rung].undo_if_useless:
        return None
    before, after = state.attempts[-2], state.attempts[-1]
    if (
        before.n != tried.attempt
        or before.oom is None
        or after.oom is None
        or policy.remediations[tried.rung].set is None
    ):
        return None
    same = (
        _same_request(before.oom.numbers.tried_to_allocate_bytes, after.oom.numbers.tried_to_allocate_bytes)
        and after.oom.phase == before.oom.phase
        and after.oom.block_size == before.oom.block_size
        and not held_by_others(after.oom)
    )
    return tried if same else None


def _same_request(before_bytes: int | None, after_bytes: int | None) -> bool:
    """Libraries pad and allocators round: a thousandth is no difference."""
    if before_bytes is None or after_bytes is None:
        return False
    return abs(before_bytes - after_bytes) * 1000 <= before_bytes


# --- up --------------------------------------------------------------------------------------------------------------


def wait_steps(state: State, policy: Policy, lever: str) -> int:
    """Stable optimizer steps before `lever` is tried, longer after each failed try."""
    assert policy.restore is not None
    return round(policy.restore.after_steps * policy.restore.backoff ** state.failed_tries.get(lever, 0))


def consider_restoring(state: State, policy: Policy, lever: str) -> Changes | Not:
    """The changes that would give `lever` back, one step of it, or why not."""
    restore, run = policy.restore, state.run
    assert restore is not None
    assert run is not None
    options = _micro_batches_up(state) if lever == "micro_batch" else _knob_back(state, lever)
    if not options:
        return Not()
    for changes in options:
        candidate = applied(state.settings, changes)
        if not restore.retry_failed and state.known_to_fail(candidate):
            continue
        if state.failed_tries.get(lever, 0) >= restore.max_tries:
            return Not(f"it failed {restore.max_tries} times in this run")
        return changes
    return Not(f"{describe(applied(state.settings, options[0]))} ran out of memory in this run already")


def _knob_back(state: State, knob: str) -> list[Changes]:
    assert state.run is not None
    initial, current = state.run.settings.get(knob), state.settings.get(knob)
    if initial == current or knob in state.unavailable:
        return []
    return [{knob: Change(current, initial)}]


def _micro_batches_up(state: State) -> list[Changes]:
    """Larger micro-batches up to the initial one, the next larger first."""
    assert state.run is not None
    initial, current = state.run.settings.get(MICRO_BATCH), state.settings.get(MICRO_BATCH)
    if not isinstance(initial, int) or not isinstance(current, int) or state.global_batch_size is None:
        return []
    return [_to_micro_batch(state, m) for m in _exact(state) if current < m <= initial]


# --- shared ----------------------------------------------------------------------------------------------------------


def _exact(state: State) -> list[int]:
    assert state.run is not None
    assert state.global_batch_size is not None
    return exact_micro_batches(state.global_batch_size, state.run.accumulation_multiple)


def _to_micro_batch(state: State, micro_batch: int) -> Changes:
    assert state.global_batch_size is not None
    return {
        MICRO_BATCH: Change(state.settings.get(MICRO_BATCH), micro_batch),
        ACCUMULATION: Change(state.settings.get(ACCUMULATION), accumulation_for(state.global_batch_size, micro_batch)),
    }


def show(value: object) -> str:
    """A knob's value as a person says it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "unknown" if value is None else str(value)


def describe(settings: Settings) -> str:
    """Settings in one line: `micro-batch 8 x 6, bfloat16, compile on`."""
    parts = []
    if MICRO_BATCH in settings:
        parts.append(f"micro-batch {settings[MICRO_BATCH]} x {settings.get(ACCUMULATION, '?')}")
    if "dtype" in settings:
        parts.append(str(settings["dtype"]))
    if "compile" in settings:
        parts.append(f"compile {show(settings['compile'])}")
    return ", ".join(parts) or "its own settings"


def describe_changes(changes: Changes) -> str:
    """`compile on -> off`, or `micro-batch 12 x 4 -> 8 x 6`."""
    parts = []
    if MICRO_BATCH in changes and ACCUMULATION in changes:
        micro, accumulation = changes[MICRO_BATCH], changes[ACCUMULATION]
        parts.append(
            f"micro-batch {show(micro.before)} x {show(accumulation.before)} -> {micro.after} x {accumulation.after}"
        )
    for knob, change in changes.items():
        if knob not in (MICRO_BATCH, ACCUMULATION):
            parts.append(f"{knob} {show(change.before)} -> {show(change.after)}")
    return ", ".join(parts) or "no change of settings"
