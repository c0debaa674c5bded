"""Why an attempt ended: exit status, output and kernel counters in, one verdict out; facts go before words."""

import re
from typing import Literal

from msgspec.structs import replace

from . import failures
from .oom_text import (
    CONSEQUENCE,
    Strength,
    clean_line,
    clean_lines,
    count_numbers,
    find_wording,
    parse_numbers,
    squeeze,
    strip_prefixes,
)
from .scene import Anchor, Scene, exception
from .tracebacks import Raised, infer_phase
from .verdict import Cause, Diagnosis, DiagnosisKind, Evidence, ExitStatus, OomNumbers, TrainerFailure

__all__ = [
    "Diagnosis",
    "DiagnosisKind",
    "Evidence",
    "ExitStatus",
    "OomNumbers",
    "TrainerFailure",
    "clean_lines",
    "diagnose",
    "is_fragmentation",
]


def is_fragmentation(numbers: OomNumbers) -> bool:
    """The allocator held enough memory, but not in one piece."""
    tried, idle = numbers.tried_to_allocate_bytes, numbers.reserved_unallocated_bytes
    return tried is not None and idle is not None and idle >= tried


LAST_LINES = 400
"""How far from the end a line outside every traceback can tell the cause."""
LAST_WORDS = 40
"""How far from the end an exception without its traceback counts as what ended a run of which only a log is known."""
FOREIGN_BYTES = 512 << 20
"""Held by others; less is what drivers and displays take."""

PINNING = re.compile(r"in pin memory thread|pin_memory")

_KIND_ORDER = (
    DiagnosisKind.DEVICE_OOM,
    DiagnosisKind.HOST_OOM,
    DiagnosisKind.SHM_OOM,
    DiagnosisKind.HOST_OOM_SUSPECTED,
)


def _effective_signal(status: ExitStatus) -> int | None:
    if status.signal is not None:
        return status.signal
    if status.code is not None and status.code < 0:
        return -status.code
    if status.code is not None and 128 < status.code <= 192:
        return status.code - 128  # a shell in between
    return None


def diagnose(evidence: Evidence) -> Diagnosis:
    """The verdict on what is known of an attempt's end."""
    found = _verdict(evidence)
    return replace(
        found,
        cause=found.cause or _cause_of_shortage(found),
        confidence=_confidence(evidence, found),
        sources=_sources(evidence, found),
    )


def _verdict(evidence: Evidence) -> Diagnosis:
    status = evidence.exit
    if status.code == 0 and not status.signal:
        return Diagnosis(kind=DiagnosisKind.SUCCESS)
    signal = _effective_signal(status)
    scene = Scene(evidence, signal)
    failure = evidence.failure
    said: tuple[DiagnosisKind, Strength] | None = None
    if failure is not None:
        said = _classify_failure(failure, evidence.trains_on)
        if scene.asserted and "CUBLAS" in failure.message:
            said = None  # an index out of range, reported late
        if said is not None and said[1] != "mention":
            return _from_failure(evidence, scene, failure, said)
    reported = failure is not None and not CONSEQUENCE.search(f"{failure.type}: {failure.message}")
    weighed = [(anchor, scene.weigh(anchor, reported)) for anchor in scene.anchors]
    certain = [anchor for anchor, verdict in weighed if verdict == "yes"]
    possible = [anchor for anchor, verdict in weighed if verdict == "suspected"]
    if certain:
        return _from_anchor(scene, certain, "yes", failure)
    if evidence.host_oom_kills > 0:
        died_of_it = signal == 9 or any(
            a.wording.kind in (DiagnosisKind.HOST_OOM_SUSPECTED, DiagnosisKind.HOST_OOM) for a in possible
        )
        if died_of_it or (scene.final is None and not reported and scene.exceptions):
            best = _best(possible) if possible else None
            return Diagnosis(
                kind=DiagnosisKind.HOST_OOM,
                is_oom="yes",
                cause=Cause.KERNEL,
                phase=failure.phase if failure is not None else None,
                rank=best.line.rank if best is not None else None,
                message="the kernel killed a process of this attempt for memory",
                evidence=best.blob[:8] if best is not None else _tail(scene),
            )
    if possible:
        return _from_anchor(scene, possible, "suspected", failure)
    if scene.final is None and not reported and signal == 7:
        return Diagnosis(
            kind=DiagnosisKind.SHM_OOM,
            is_oom="suspected",
            message="ended by SIGBUS: shared memory is full, or a mapped file was cut",
            evidence=_tail(scene),
        )
    if scene.final is None and not reported and (signal == 9 or evidence.host_oom_kills > 0):
        return Diagnosis(
            kind=DiagnosisKind.HOST_OOM_SUSPECTED,
            is_oom="suspected",
            message="killed by SIGKILL" if signal == 9 else "failed while the kernel killed a process for memory",
            evidence=_tail(scene),
        )
    return _not_oom(evidence, scene, signal)


def _classify_failure(
    failure: TrainerFailure, trains_on: Literal["gpu", "host"]
) -> tuple[DiagnosisKind, Strength] | None:
    """Whose memory was refused, by the trainer's own words; where it says that some was, they only tell whose."""
    name = failure.type.rpartition(".")[2]
    text = squeeze(clean_line(f"{failure.type}: {failure.message}"[:8000].replace("\n", " ")))
    found = find_wording(text)
    if found is not None and (failure.oom or found[0].strength != "mention"):
        return found[0].kind, "hard" if failure.oom else found[0].strength
    if name == "OutOfMemoryError":
        return DiagnosisKind.DEVICE_OOM, "hard"
    if name.endswith("MemoryError"):
        return DiagnosisKind.HOST_OOM, "hard"
    if failure.oom:
        return DiagnosisKind.HOST_OOM if trains_on == "host" else DiagnosisKind.DEVICE_OOM, "hard"
    return (found[0].kind, found[0].strength) if found is not None else None


def _from_failure(
    evidence: Evidence, scene: Scene, failure: TrainerFailure, said: tuple[DiagnosisKind, Strength]
) -> Diagnosis:
    kind, strength = said
    numbers = parse_numbers(failure.message[:8000])
    same = [anchor for anchor in scene.anchors if anchor.wording.kind == kind]
    best = _best(same) if same else None
    if best is not None and not count_numbers(numbers):
        numbers = best.numbers
    if kind is DiagnosisKind.HOST_OOM_SUSPECTED and evidence.host_oom_kills > 0:
        kind, strength = DiagnosisKind.HOST_OOM, "hard"
    rank = best.line.rank if best is not None else None
    raised = best.line.raised if best is not None else None
    return Diagnosis(
        kind=kind,
        is_oom="yes" if strength == "hard" else "suspected",
        phase=failure.phase or (infer_phase(raised.frames) if raised is not None else None),
        rank=rank if failure.rank is None else failure.rank,
        numbers=numbers,
        message=squeeze(clean_line(f"{failure.type}: {failure.message}".replace("\n", " ")))[:500],
        evidence=best.blob[:8] if best is not None else _tail(scene),
    )


def _best(anchors: list[Anchor]) -> Anchor:
    """By class first, then the most telling message, then the last: never simply the first one printed."""

    def merit(anchor: Anchor) -> tuple[int, int, int, int]:
        framed = exception(anchor) is not None
        return (
            int(framed or anchor.wording.native),
            -_KIND_ORDER.index(anchor.wording.kind),
            count_numbers(anchor.numbers),
            anchor.at,
        )

    return max(anchors, key=merit)


def _from_anchor(
    scene: Scene, anchors: list[Anchor], verdict: Literal["yes", "suspected"], failure: TrainerFailure | None
) -> Diagnosis:
    best = _best(anchors)
    kind, cause = best.wording.kind, Cause.NONE
    if kind is DiagnosisKind.HOST_OOM and best.wording.native and "llocat" not in best.line.text:
        cause = Cause.KERNEL
    raised = best.line.raised
    frames = raised.frames if raised is not None else []
    if kind is DiagnosisKind.DEVICE_OOM and not count_numbers(best.numbers):
        near = [line.text for line in scene.lines[max(0, best.at - 12) : best.at + 1]]
        if any(map(PINNING.search, near)) or any(PINNING.search(frame.function) for frame in frames[-3:]):
            kind, cause = DiagnosisKind.HOST_OOM, Cause.PINNED  # page-locked host memory, though the driver says CUDA
    phase = (failure.phase if failure is not None else None) or infer_phase(frames)
    text = squeeze(" ".join(strip_prefixes(clean_line(raw)).text for raw in best.blob))
    last = frames[-1:]
    where = tuple(f'File "{frame.file}", in {frame.function}: {frame.source}'[:300] for frame in last)
    return Diagnosis(
        kind=kind,
        is_oom=verdict,
        cause=cause,
        phase=phase,
        rank=best.line.rank,
        numbers=best.numbers,
        message=text[:500],
        evidence=where + tuple(raw[:1000] for raw in best.blob[:8]),
    )


def _cause_of_shortage(found: Diagnosis) -> Cause:
    """What the numbers and the phase tell of a shortage; more is known only of a run that was watched."""
    if found.kind is DiagnosisKind.HOST_OOM:
        return Cause.REFUSED
    if found.kind is not DiagnosisKind.DEVICE_OOM:
        return Cause.NONE
    numbers = found.numbers
    if is_fragmentation(numbers):
        return Cause.FRAGMENTATION
    total, free, own = numbers.total_bytes, numbers.free_bytes, numbers.process_in_use_bytes
    if total is not None and free is not None and own is not None:
        missing = (numbers.tried_to_allocate_bytes or 0) - free
        if total - free - own >= max(FOREIGN_BYTES, missing):
            return Cause.FOREIGN
    by_phase = {"eval": Cause.EVALUATION, "resume": Cause.RESUME}
    startup = dict.fromkeys(("load", "compile", "optimizer"), Cause.STARTUP)
    return {**by_phase, **startup}.get(found.phase or "", Cause.OWN_GROWTH)


def _confidence(evidence: Evidence, found: Diagnosis) -> Literal["high", "medium", "low"]:
    if found.is_oom == "suspected" or found.kind is DiagnosisKind.UNKNOWN:
        return "low"
    seen = evidence.exit != ExitStatus()
    if evidence.failure is not None or (seen and found.evidence) or found.kind is DiagnosisKind.SUCCESS:
        return "high"
    return "medium"


def _sources(evidence: Evidence, found: Diagnosis) -> tuple[str, ...]:
    said = {
        **({evidence.failure.source: True} if evidence.failure is not None else {}),
        "kernel counters": evidence.host_oom_kills > 0,
        "output": bool(found.evidence),
        "exit status": evidence.exit != ExitStatus(),
    }
    return tuple(name for name, used in said.items() if used)


def _tail(scene: Scene, count: int = 5) -> tuple[str, ...]:
    last = [line.raw[:1000] for line in scene.lines if line.role != "blank"][-count:]
    return tuple(last)


def _not_oom(evidence: Evidence, scene: Scene, signal: int | None) -> Diagnosis:
    failure, status = evidence.failure, evidence.exit
    if failure is not None:
        message = squeeze(clean_line(f"{failure.type}: {failure.message}".replace("\n", " ")))[:500]
        kind, cause = failures.of([message]) or (DiagnosisKind.ERROR, failures.of_error([message]))
        return Diagnosis(kind=kind, cause=cause, phase=failure.phase, message=message, evidence=_tail(scene))
    final = scene.final
    if evidence.text_only and final is not None and scene.outlived(final.index):
        final = None
    shown = final or (scene.exceptions[-1] if scene.exceptions and not evidence.text_only else None)
    told = _of_exception(scene, final) if final is not None else _of_lines(evidence, scene, signal)
    if signal == 2:
        told = DiagnosisKind.USER_INTERRUPT, Cause.NONE
    readable = evidence.text_only and bool(scene.lines)
    kind, cause = told or _of_status(status, signal, shown is not None, readable)
    message = shown.text if shown is not None else (_tail(scene, 1) or ("",))[0]
    if kind in (DiagnosisKind.SIGNAL, DiagnosisKind.STOPPED) and signal is not None:
        message = f"ended by signal {signal}"
    return Diagnosis(
        kind=kind,
        cause=cause,
        phase=infer_phase(final.frames) if final is not None else None,
        rank=shown.rank if shown is not None else None,
        message=squeeze(message)[:500],
        evidence=_tail(scene),
    )


def _of_exception(scene: Scene, final: Raised) -> tuple[DiagnosisKind, Cause]:
    texts = [raised.text for raised in scene.exceptions if raised.group == final.group]
    told = failures.of(texts) or failures.of(scene.message_after(final))
    if told is None and any(map(failures.STOPPED.search, texts)):
        return DiagnosisKind.STOPPED, Cause.NONE
    if told is None and scene.asserted and any("CUBLAS" in text or "CUDA error" in text for text in texts):
        return DiagnosisKind.CUDA_CONTEXT, Cause.ASSERT
    if told is not None and told[0] is DiagnosisKind.CUDA_CONTEXT:  # the kernel may have said why
        said = failures.of(line.text for line in scene.lines)
        return said if said is not None and said[0] is DiagnosisKind.GPU_LOST else told
    return told or (DiagnosisKind.ERROR, failures.of_error(texts))


def _of_lines(evidence: Evidence, scene: Scene, signal: int | None) -> tuple[DiagnosisKind, Cause] | None:
    """What lines outside every traceback tell, of which a run may only have been warned."""
    first = max(0, len(scene.lines) - LAST_LINES)
    lines = [
        (at, line)
        for at, line in enumerate(scene.lines[first:], first)
        if line.role in ("text", "raised") and not (line.raised is not None and line.raised.secondary)
    ]
    if evidence.text_only:
        lines = [(at, line) for at, line in lines if not scene.outlived(at)]
    texts = [line.text for _, line in lines]
    told = failures.of(texts)
    if told is not None:
        return told
    if scene.asserted and any("CUBLAS" in text for text in texts):
        return DiagnosisKind.CUDA_CONTEXT, Cause.ASSERT
    if signal is None and any(map(failures.CRASHED.search, texts)):
        return DiagnosisKind.SIGNAL, Cause.CRASH
    if signal is None and any(map(failures.STOPPED.search, texts)):
        return DiagnosisKind.STOPPED, Cause.NONE
    cause = failures.of_error(texts)
    last = [line for _, line in lines[-LAST_WORDS:]]
    said = any(
        line.role == "raised" or failures.SAID.search(line.text) or failures.LAUNCHER.search(line.text) for line in last
    )
    if signal is None and ((cause is not Cause.PROGRAM and scene.known) or (said and evidence.text_only)):
        return DiagnosisKind.ERROR, cause
    return None


def _of_status(status: ExitStatus, signal: int | None, raised: bool, readable: bool) -> tuple[DiagnosisKind, Cause]:
    """Where no word tells a cause. `readable`: there is a log, and nothing besides."""
    if signal is not None:
        return (DiagnosisKind.STOPPED, Cause.NONE) if signal in (1, 15) else (DiagnosisKind.SIGNAL, Cause.CRASH)
    if status.code in (126, 127) and not raised:
        return DiagnosisKind.EXEC_FAILED, Cause.NONE
    if status.code is not None or raised:
        return DiagnosisKind.ERROR, Cause.PROGRAM
    return (DiagnosisKind.NO_FAILURE if readable else DiagnosisKind.UNKNOWN), Cause.NONE
