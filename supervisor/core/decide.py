"""What to do next: `decide(state, policy, now)` gives the next decision, or None to wait.

A decision is an event. The shell journals it, folds it into the state, and only then carries it out; a decision
removes its own reason, so asking again never repeats it. Time comes in as `now`, and waits are deadlines in the state.
"""

from . import ladder
from .events import (
    AnyEvent,
    AttemptPlanned,
    Change,
    Finished,
    RemediationChosen,
    RemediationSkipped,
    RestorationChosen,
    RestorationKept,
    RestorationReverted,
    RestorationSkipped,
    StopHow,
    StopRequested,
)
from .ladder import Not, describe, describe_changes
from .policy import Policy
from .state import TRANSIENT, Attempt, State, inverse
from .verdict import ExitStatus

EXIT_LADDER_EXHAUSTED = 121
EXIT_STOPPED = 122
EXIT_NO_PROGRESS = 123
EXIT_SELF = 125

TERMINATE_GRACE_S = 10.0
KILL_GRACE_S = 30.0

GPU_GONE = {"lost": "the GPU is lost (NVML)", "reset_required": "the GPU must be reset (NVML)"}


def decide(state: State, policy: Policy, now: float) -> AnyEvent | None:
    """The next decision at monotonic time `now` (seconds), or None to wait for an event or `next_deadline`."""
    if state.run is None or state.finished is not None:
        return None
    attempt = state.attempt
    if attempt is not None and not attempt.ended:
        return _while_running(state, policy, attempt, now)
    if state.stop_asked is not None and not (attempt is not None and _complete(state, attempt)):
        return Finished(result="stopped", exit_code=EXIT_STOPPED, why=f"stopped by {state.stop_asked.by}")
    if attempt is not None and not state.decided:
        return _after_attempt(state, policy, attempt)
    if attempt is not None and not state.run.observe and state.waiting_for_memory_s is not None:
        return None
    if attempt is not None and state.run.observe and (attempt.stop is None or attempt.oom is not None):
        return Finished(result="failed", exit_code=exit_code(attempt), why=f"observing only: {attempt.message}")
    return _plan(state, policy)


def next_deadline(state: State) -> float | None:
    """The monotonic time at which `decide` should be asked again even if nothing happens."""
    attempt = state.attempt
    if attempt is None or attempt.ended or attempt.stop is None:
        return None
    return attempt.stop.deadline_mono


def step_of_interest(state: State, policy: Policy) -> int | None:
    """The step whose completion may change a decision, so that the shell reports it without delay."""
    attempt = state.attempt
    if policy.restore is None or attempt is None or attempt.ended:
        return None
    waits = {policy.restore.after_steps, *(ladder.wait_steps(state, policy, lever) for lever in policy.restore.order)}
    due = [attempt.new_from + wait for wait in waits]
    return min((step for step in due if step > attempt.step), default=None)


def succeeded(attempt: Attempt) -> bool:
    return attempt.exit is not None and attempt.exit.code == 0 and attempt.exit.signal is None


def exit_code(attempt: Attempt) -> int:
    """The trainer's own code as a shell would give it; 1 when it is unknown."""
    if attempt.exit is None:
        return 1
    if attempt.exit.signal is not None:
        return 128 + attempt.exit.signal
    return 1 if attempt.exit.code is None else attempt.exit.code


# --- while the trainer runs ------------------------------------------------------------------------------------------


def _while_running(state: State, policy: Policy, attempt: Attempt, now: float) -> AnyEvent | None:
    if attempt.stop is not None:
        return _escalate(state, attempt, now)
    if attempt.pid is None:
        return None
    if state.stop_asked is not None:
        return _stop(state, policy, attempt, now, state.stop_asked.by)
    assert state.run is not None
    if state.run.memory_budget_bytes and attempt.budget_limit_bytes is None and attempt.step > attempt.from_step:
        return _stop_request(attempt, "kill", "the memory budget did not take effect", now + KILL_GRACE_S)
    if attempt.hang is not None and not state.run.observe:
        why = f"no step for {attempt.hang.silent_s:.0f} s: it hangs"
        return _stop(state, policy, attempt, now, why)
    if policy.restore is None or state.run.observe:
        return None
    if state.probation is not None:
        if state.probation.attempt > attempt.n:
            return _stop(state, policy, attempt, now, f"to give back {state.probation.lever}")
        if attempt.new_steps >= policy.restore.after_steps:
            return RestorationKept(attempt=attempt.n, lever=state.probation.lever, step=attempt.step)
        return None
    return _restoration(state, policy, attempt)


def _stop(state: State, policy: Policy, attempt: Attempt, now: float, why: str) -> StopRequested:
    if state.stop_asked is not None and state.stop_asked.now:
        return _stop_request(attempt, "kill", why, now + KILL_GRACE_S)
    if attempt.can_save:  # it finishes its optimizer step first, and that may take long
        return _stop_request(attempt, "save", why, now + max(policy.limits.grace_s, 3 * (attempt.step_s or 0.0)))
    return _stop_request(attempt, "terminate", why, now + TERMINATE_GRACE_S)


def _stop_request(attempt: Attempt, how: StopHow, why: str, deadline: float) -> StopRequested:
    return StopRequested(attempt=attempt.n, how=how, why=why, deadline_mono=deadline)


def _escalate(state: State, attempt: Attempt, now: float) -> AnyEvent | None:
    stop = attempt.stop
    assert stop is not None
    hurried = state.stop_asked is not None and state.stop_asked.now and stop.how != "kill"
    if now < stop.deadline_mono and not hurried:
        return None
    if stop.how == "kill":
        why = f"process {attempt.pid} does not end although it was killed; it may wait for a device"
        return Finished(result="failed", exit_code=EXIT_SELF, why=why)
    if stop.how == "save" and not hurried:
        return _stop_request(attempt, "terminate", stop.why, now + TERMINATE_GRACE_S)
    return _stop_request(attempt, "kill", stop.why, now + KILL_GRACE_S)


def _restoration(state: State, policy: Policy, attempt: Attempt) -> AnyEvent | None:
    restore = policy.restore
    assert restore is not None
    if attempt.new_steps < restore.after_steps:
        return None
    for lever in restore.order:
        found = ladder.consider_restoring(state, policy, lever)
        if isinstance(found, Not):
            if found.why and (lever, found.why) not in state.skipped:
                return RestorationSkipped(attempt=attempt.n, lever=lever, because=found.why)
            continue
        remaining = None if state.target_steps is None else state.target_steps - attempt.step
        if remaining is not None and remaining < restore.after_steps:
            why = f"fewer than {restore.after_steps} steps remain"
            if (lever, why) not in state.skipped:
                return RestorationSkipped(attempt=attempt.n, lever=lever, because=why)
            continue
        if len(state.attempts) + 2 > policy.limits.max_attempts:
            why = f"of {policy.limits.max_attempts} attempts none would be left to take it back"
            if (lever, why) not in state.skipped:
                return RestorationSkipped(attempt=attempt.n, lever=lever, because=why)
            continue
        wait = ladder.wait_steps(state, policy, lever)
        if attempt.new_steps >= wait and _at_checkpoint(state, attempt, wait):
            because = f"{attempt.new_steps} optimizer steps without an incident"
            return RestorationChosen(attempt=attempt.n, lever=lever, changes=found, because=because)
        return None  # one lever at a time, in order
    return None


def _at_checkpoint(state: State, attempt: Attempt, wait: int) -> bool:
    """Whether stopping now loses next to nothing: the trainer saves when asked, or has just saved."""
    return attempt.can_save or (state.checkpoint is not None and state.checkpoint.step >= attempt.new_from + wait)


# --- after an attempt has ended --------------------------------------------------------------------------------------


def _after_attempt(state: State, policy: Policy, attempt: Attempt) -> AnyEvent:
    run = state.run
    assert run is not None
    unconfirmed = bool(run.memory_budget_bytes) and attempt.budget_limit_bytes is None
    if unconfirmed and (succeeded(attempt) or attempt.oom is not None or attempt.stop is not None):
        why = (
            "the memory budget did not take effect in the trainer (python -I ignores it, and so does a non-Python one)"
        )
        return Finished(result="failed", exit_code=EXIT_SELF, why=why)
    if _complete(state, attempt):
        return Finished(result="done", exit_code=0, why=_success(state))
    if attempt.hang is not None and _hung_before(state, attempt):
        why = "twice in a row it hung, and it got no further; see where with py-spy, then `gpusup resume` tries again"
        return Finished(result="stopped", exit_code=EXIT_NO_PROGRESS, why=why)
    if state.gpu_trouble in GPU_GONE:
        why = f"{GPU_GONE[state.gpu_trouble]}; no setting helps. See to it, then `gpusup resume` goes on"
        return Finished(result="stopped", exit_code=EXIT_STOPPED, why=why)
    if attempt.stop is not None and attempt.oom is None and attempt.hang is None:  # it left because it was told to
        return _plan(state, policy)
    if attempt.exit == ExitStatus() and attempt.oom is None:
        return _unseen_end(state, policy, attempt)
    if state.probation is not None:
        tried = state.probation.attempt <= attempt.n  # or out of memory while leaving, before the try could begin
        wait = ladder.wait_steps(state, policy, state.probation.lever) * (
            policy.restore.backoff if policy.restore and tried else 1
        )
        return RestorationReverted(
            attempt=attempt.n,
            lever=state.probation.lever,
            changes=inverse(state.probation.changes),
            because=_why_reverted(attempt),
            next_wait_steps=round(wait),
        )
    if attempt.hang is not None or _transient(state, attempt):
        return _plan(state, policy)
    if attempt.oom is not None and _covered(state, attempt):
        return _remediation(state, policy, attempt)
    return Finished(result="failed", exit_code=exit_code(attempt), why=_not_covered(state, attempt))


def _complete(state: State, attempt: Attempt) -> bool:
    """Whether training has reached its end; some trainers exit with 0 when they are told to leave before it."""
    left = attempt.stop is not None and state.target_steps is not None and attempt.step < state.target_steps
    return succeeded(attempt) and not left


def _unseen_end(state: State, policy: Policy, attempt: Attempt) -> AnyEvent:
    """A reboot, or the trainer's keeper was killed: not knowing is no reason to change a setting, or to end the run."""
    before = state.attempts[-2] if len(state.attempts) > 1 else None
    if attempt.new_steps == 0 and before is not None and before.exit == attempt.exit:
        why = "twice in a row nobody saw how the trainer ended, and it got no further; `gpusup resume` tries again"
        return Finished(result="stopped", exit_code=EXIT_STOPPED, why=why)
    return _plan(state, policy)


def _why_reverted(attempt: Attempt) -> str:
    if attempt.oom is not None:
        return "it did not fit"
    return "it hung" if attempt.hang is not None else attempt.message or "it failed on probation"


def _hung_before(state: State, attempt: Attempt) -> bool:
    before = state.attempts[-2] if len(state.attempts) > 1 else None
    return attempt.new_steps == 0 and before is not None and before.hang is not None


def _transient(state: State, attempt: Attempt) -> bool:
    """Whether the same settings may fit in a fresh process; twice in a row without a new step they do not."""
    if attempt.oom is None or attempt.oom.cause not in TRANSIENT:
        return False
    before = state.attempts[-2].oom if len(state.attempts) > 1 else None
    return attempt.new_steps > 0 or before is None or before.cause != attempt.oom.cause


def _covered(state: State, attempt: Attempt) -> bool:
    """A policy covers memory that training itself asked for: the GPU's, or the host's when it trains there."""
    assert state.run is not None
    return attempt.diagnosis == "device_oom" or (attempt.diagnosis == "host_oom" and state.run.trains_on == "host")


def _not_covered(state: State, attempt: Attempt) -> str:
    cause = {
        "host_oom": "the host's memory ran out, not the GPU's: fewer data workers or less pinned memory help, "
        "a smaller micro-batch does not",
        "host_oom_suspected": "it was killed (SIGKILL), perhaps by the kernel for lack of memory; nothing proves it",
        "shm_oom": "shared memory (/dev/shm) ran out: fewer data workers or a larger /dev/shm help",
    }.get(attempt.diagnosis, "the policy does not cover this failure, so no setting was changed")
    return f"{cause}. {attempt.message}".rstrip()


def _remediation(state: State, policy: Policy, attempt: Attempt) -> AnyEvent:
    assert attempt.oom is not None
    tried = ladder.useless(state, policy)
    if tried is not None:
        because = "the same request failed again in the same phase: it had freed nothing"
        return RestorationChosen(
            attempt=attempt.n,
            lever=tried.lever,
            changes=inverse(tried.changes),
            because=because,
            reason="useless",
            rung=tried.rung,
        )
    assert state.run is not None
    for index, rung in enumerate(policy.remediations):
        found = ladder.consider_rung(state, index, rung)
        if isinstance(found, Not):
            if found.why and (f"rung {index}", found.why) not in state.skipped:
                return RemediationSkipped(attempt=attempt.n, rung=index, name=rung.name, because=found.why)
            continue
        return RemediationChosen(
            attempt=attempt.n,
            rung=index,
            name=rung.name,
            lever=rung.lever,
            consent=rung.consent,
            changes=found,
            because=attempt.oom.message,
            applied=not state.run.observe,
            wait_for_memory_s=rung.wait_for_memory_s,
        )
    why = f"every remediation of the policy was used and {describe(state.settings)} still does not fit"
    if not policy.remediations:
        why = "out of memory, and the policy has no remediations"
    return Finished(result="gave_up", exit_code=EXIT_LADDER_EXHAUSTED, why=why)


def _success(state: State) -> str:
    assert state.run is not None
    if state.settings == state.run.settings:
        return "finished with the settings it started with"
    changes = [describe(state.run.settings), describe(state.settings)]
    return f"finished with {changes[1]}; it had started with {changes[0]}"


def _plan(state: State, policy: Policy) -> AnyEvent:
    n = len(state.attempts) + 1
    if n > policy.limits.max_attempts:
        why = f"{policy.limits.max_attempts} attempts were made, the limit of the policy"
        return Finished(result="gave_up", exit_code=EXIT_LADDER_EXHAUSTED, why=why)
    assert state.run is not None
    if state.checkpoint is None and state.rejected:
        why = f"none of its {len(state.rejected)} checkpoints can be read, the newest {state.rejected[0].source}; "
        why += "it is not started over: see to the files, then `gpusup resume` looks again"
        return Finished(result="stopped", exit_code=EXIT_STOPPED, why=why)
    checkpoint = state.checkpoint if state.run.checkpoints.place else None  # else it cannot be told to resume
    return AttemptPlanned(
        attempt=n,
        settings=state.settings,
        because=_because(state),
        resume_step=checkpoint.step if checkpoint else None,
        resume_path=checkpoint.source if checkpoint else None,
    )


def _because(state: State) -> str:
    attempt = state.attempt
    if attempt is None:
        return "first attempt"
    changed = {
        knob: Change(attempt.settings.get(knob), state.settings.get(knob))
        for knob in sorted({*attempt.settings, *state.settings})
        if attempt.settings.get(knob) != state.settings.get(knob)
    }
    return describe_changes(changed) if changed else "the same settings again"
