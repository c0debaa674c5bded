"""Events as sentences for a person, the same live and in `gpusup log`."""

import signal

from .core.events import (
    AnyEvent,
    AttemptEnded,
    AttemptPlanned,
    BudgetApplied,
    CheckpointRejected,
    CheckpointSaved,
    Finished,
    GpuTrouble,
    HangDetected,
    KnobUnavailable,
    MemoryWaited,
    Note,
    OomDetected,
    RemediationChosen,
    RemediationSkipped,
    RestorationChosen,
    RestorationKept,
    RestorationReverted,
    RestorationSkipped,
    Resumed,
    SoftOomDetected,
    StopAsked,
    StopRequested,
    SupervisorStarted,
)
from .core.ladder import describe, describe_changes
from .core.verdict import Cause, ExitStatus, OomNumbers
from .units import count, format_bytes, format_duration

LABEL_WIDTH = 8


def narrate(event: AnyEvent) -> tuple[str, str] | None:
    """A short label and a sentence, or None for events that only feed the figures."""
    match event:
        case SupervisorStarted(takeover=True):
            return "takeover", f"supervisor {event.pid} took the run over"
        case AttemptPlanned():
            start = f"from step {event.resume_step}" if event.resume_step is not None else "from the start"
            return "start", f"attempt {event.attempt} {start}: {describe(event.settings)}"
        case Resumed():
            lost = f"{count(event.lost_steps, 'step')} to do again" if event.lost_steps else "no step lost"
            return "resumed", f"at step {event.step}, {lost}" + (f"; {event.note}" if event.note else "")
        case BudgetApplied():
            over = f" over the {format_bytes(event.baseline_bytes)} in use" if event.baseline_bytes else ""
            budget = format_bytes(event.limit_bytes - event.baseline_bytes)
            return "budget", f"{budget} of {event.where} memory{over}, in force"
        case KnobUnavailable():
            return "note", f"{event.knob} is unavailable: {event.reason}"
        case CheckpointSaved(emergency=True):
            return "saved", f"the trainer saved at step {event.step} before it left"
        case CheckpointRejected():
            return "rejected", f"checkpoint of step {event.step}: {event.why} ({event.path})"
        case OomDetected():
            return "OOM", _oom(event)
        case HangDetected():
            return "hang", f"no step for {format_duration(event.silent_s)} after step {event.step}"
        case SoftOomDetected():
            times = f"{event.step_s / event.usual_s:.1f} times as long as usual"
            return (
                "soft OOM",
                f"steps take {times} after step {event.step}, the GPU's memory is full, and it is not hot",
            )
        case GpuTrouble():
            return "GPU", {
                "lost": "lost",
                "reset_required": "must be reset",
                "driver_replaced": "its driver was replaced",
            }[event.trouble] + " (NVML)"
        case AttemptEnded() if event.diagnosis not in ("success", "device_oom", "host_oom"):
            if event.exit.signal == signal.SIGTERM:
                return "left", f"attempt {event.attempt} at step {event.step} (SIGTERM)"
            told = f"; {event.message}" if event.message else ""
            return "ended", f"attempt {event.attempt} at step {event.step}: {describe_exit(event.exit)}{told}"
        case RemediationChosen():
            verb = "" if event.applied else "would do: "
            wait = f", waiting up to {format_duration(event.wait_for_memory_s)}" if event.wait_for_memory_s else ""
            return "remedy", f"{verb}{event.name}: {describe_changes(event.changes)}{wait} [{event.consent}]"
        case RemediationSkipped():
            return "skipped", f"{event.name}: {event.because}"
        case RestorationChosen():
            word = "undo" if event.reason == "useless" else "restore"
            return word, f"{describe_changes(event.changes)} ({event.because})"
        case RestorationSkipped():
            return "skipped", f"giving back {event.lever}: {event.because}"
        case RestorationKept():
            return "kept", f"{event.lever} passed its probation at step {event.step}"
        case RestorationReverted():
            again = f"; not tried again before {event.next_wait_steps} stable steps"
            return "reverted", f"{describe_changes(event.changes)}: {event.because}{again}"
        case MemoryWaited():
            outcome = "memory was given back" if event.enough else "others still hold the memory"
            return "waited", f"{format_duration(event.waited_s)}: {outcome}"
        case StopAsked():
            return "stop", f"asked by {event.by}" + (" (now)" if event.now else "")
        case StopRequested():
            how = {"save": "asked to save and leave", "terminate": "told to leave", "kill": "killed"}[event.how]
            return "stop", f"trainer {how}: {event.why}"
        case Note():
            return "note", event.text
        case Finished():
            return event.result.replace("_", " "), event.why
        case _:
            return None


def _oom(event: OomDetected) -> str:
    place = f"step {event.step + 1}" + (f", {event.phase}" if event.phase else "")
    if event.block_size is not None:
        place += f", sequence length {event.block_size}"
    if event.rank:
        place += f", rank {event.rank}"
    if event.cause not in ("", Cause.OWN_GROWTH, Cause.REFUSED):
        place += f", {event.cause}"
    return f"{place}: {describe_numbers(event.numbers) or event.message}"


def describe_numbers(numbers: OomNumbers) -> str:
    """`tried 2.30 GiB; 214 MiB free of 12.00 GiB; PyTorch holds 9.61 GiB`, as far as the message told."""
    parts = []
    if numbers.tried_to_allocate_bytes is not None:
        parts.append(f"tried {format_bytes(numbers.tried_to_allocate_bytes)}")
    if numbers.free_bytes is not None:
        total = f" of {format_bytes(numbers.total_bytes)}" if numbers.total_bytes is not None else ""
        parts.append(f"{format_bytes(numbers.free_bytes)} free{total}")
    if numbers.allowed_bytes is not None:
        parts.append(f"{format_bytes(numbers.allowed_bytes)} allowed")
    if numbers.allocated_bytes is not None:
        parts.append(f"PyTorch holds {format_bytes(numbers.allocated_bytes)}")
    if numbers.reserved_unallocated_bytes is not None:
        parts.append(f"{format_bytes(numbers.reserved_unallocated_bytes)} reserved but unallocated")
    return "; ".join(parts)


def describe_exit(status: ExitStatus) -> str:
    """An exit status in words."""
    if status.signal is not None:
        try:
            return f"ended by {signal.Signals(status.signal).name}"
        except ValueError:
            return f"ended by signal {status.signal}"
    return "its exit status is unknown" if status.code is None else f"exit status {status.code}"
