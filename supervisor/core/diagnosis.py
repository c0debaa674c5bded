"""Why an attempt ended: exit status, output and kernel counters in, one verdict out.

Text proves nothing while a process lives, and little after it: a wording counts only if the attempt failed, the line is
a report and not a quotation, and nothing shows that the program caught the error and went on.
"""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from .oom_text import (
    CONSEQUENCE,
    Strength,
    Wording,
    clean_line,
    clean_lines,
    count_numbers,
    find_wording,
    is_advice,
    is_quoted,
    parse_numbers,
    squeeze,
    strip_prefixes,
)
from .tracebacks import Line, Raised, infer_phase, read_output
from .verdict import Diagnosis, DiagnosisKind, Evidence, ExitStatus, OomNumbers, TrainerFailure

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


# --- weighing ---------------------------------------------------------------------------------------------------------


class _Anchor(NamedTuple):
    at: int
    line: Line
    wording: Wording
    blob: tuple[str, ...]
    numbers: OomNumbers


_PROGRESS = re.compile(
    r"(?:^|[^\w/])(step|iter|iteration|epoch|batch|update)s?\W{0,4}(\d{1,9})\b|\b(\d{1,9})/\d{1,9} \[\d", re.IGNORECASE
)
_NOT_PROGRESS = re.compile(r"wandb|oading |checkpoint shards|batch size", re.IGNORECASE)
_HANDLED = re.compile(
    r"[Ss]kipp?(?:ing|ed)? (?:this |the |current )?(?:batch|update|step|sample|micro)|attempting to recover|"
    r"[Rr]etry(?:ing)? (?:with|at|using)|(?:[Rr]educ|[Dd]ecreas|[Hh]alv|[Ll]ower)ing (?:the )?(?:micro[- ]?)?batch|"
    r"[Bb]atch size \d+ failed|[Ff]all(?:ing|s)? back|[Rr]ecovered from|, continuing|will be skipped|"
    r"[Tt]rying batch size"
)
_SEGFAULTED = re.compile(r"exitcode\s{0,4}: -(?:4|6|7|8|11)\b")
_ASSERTED = re.compile(r"device-side assert|Assertion `")
_PINNING = re.compile(r"in pin memory thread|pin_memory")
_ROOTS = frozenset({"<module>", "_run_module_as_main", "_run_code", "_bootstrap", "_bootstrap_inner"})


def _follow(lines: list[Line], index: int, limit: int) -> list[Line]:
    """The lines that continue the message at `index`, other ranks' output between them left out."""
    first = lines[index]
    found: list[Line] = []
    for line in lines[index + 1 : index + 1 + 4 * limit]:
        if line.stream != first.stream or len(found) >= limit:
            break
        if line.speaker == first.speaker:
            if line.role != "text":
                break
            found.append(line)
    return found


def _anchors(lines: list[Line]) -> list[_Anchor]:
    anchors: list[_Anchor] = []
    for index, line in enumerate(lines):
        if line.role not in ("text", "raised"):
            continue
        text = line.text
        found = find_wording(text)
        if found is None or found[0].strength == "mention":
            # rich, loggers and authors break a message into lines.
            joined = " ".join([text, *(more.text.strip() for more in _follow(lines, index, 2))])
            wide = find_wording(joined)
            if wide is not None and wide[1].start() < len(text):
                found = wide
        if found is None:
            continue
        wording, at = found
        if is_quoted(text, at.start()) or (wording.strength == "mention" and is_advice(text, at.start())):
            continue
        blob = [line]
        for more in _follow(lines, index, 12):
            if "out of memory. Tried" in more.text:
                break
            blob.append(more)
        numbers = parse_numbers(" ".join(part.text for part in blob)[:8000])
        anchors.append(_Anchor(index, line, wording, tuple(part.raw for part in blob), numbers))
    return anchors


def _progress(lines: list[Line]) -> list[tuple[int, int, int | None, str, int]]:
    seen: list[tuple[int, int, int | None, str, int]] = []
    for index, line in enumerate(lines):
        if line.role in ("text", "data") and not _NOT_PROGRESS.search(line.text):
            for word, count, bar in _PROGRESS.findall(line.text[-600:]):
                seen.append((index, line.stream, line.speaker, word.lower() or "bar", int(count or bar)))
    return seen


class _Scene:
    """Everything the output shows, and how one wording in it relates to the rest."""

    def __init__(self, evidence: Evidence, signal: int | None) -> None:
        self.lines, self.exceptions = read_output((evidence.stdout, evidence.stderr))
        self.anchors = _anchors(self.lines)
        self.progress = _progress(self.lines)
        self.signal = signal
        self.known = evidence.exit.code is not None or evidence.exit.signal is not None
        self.asserted = any(_ASSERTED.search(line.text) for line in self.lines)
        self.segfaulted = any(_SEGFAULTED.search(line.text) for line in self.lines)
        oom_groups = {raised.group for raised in map(_exception, self.anchors) if raised is not None}
        self.rooted_groups = {e.group for e in self.exceptions if _root(e) or not e.header}
        self.final: Raised | None = None
        """The last exception that is neither a shortage nor a consequence of another failure."""
        for raised in self.exceptions:
            if raised.frames and not raised.secondary and raised.group not in oom_groups:
                message = " ".join([raised.text, *(m.text for m in _follow(self.lines, raised.index, 3))])
                if not CONSEQUENCE.search(message):
                    self.final = raised

    def went_on(self, anchor: _Anchor, need: int) -> bool:
        """Whether steps were counted after it; one or two may come from another rank or a buffer."""
        best: dict[str, int] = {}
        grown: dict[str, int] = {}
        for index, stream, speaker, word, value in self.progress:
            after = index > anchor.at and stream == anchor.line.stream and speaker == anchor.line.speaker
            if after and value > best.get(word, -1):
                best[word] = value
                grown[word] = grown.get(word, 0) + 1
        return any(count >= need for count in grown.values())

    def handled_nearby(self, anchor: _Anchor) -> bool:
        around = self.lines[max(0, anchor.at - 3) : anchor.at + 5]
        return any(_HANDLED.search(line.text) for line in around)

    def weigh(self, anchor: _Anchor, failure_elsewhere: bool) -> Literal["yes", "suspected", "no"]:
        wording, line = anchor.wording, anchor.line
        raised = _exception(anchor)
        rooted = raised is not None and raised.group in self.rooted_groups
        if self.asserted and "CUBLAS" in line.text:
            return "no"  # an index out of range, reported late
        if (
            wording.kind is DiagnosisKind.HOST_OOM_SUSPECTED
            and (raised is None or raised.secondary)
            and (self.segfaulted or self.final is not None)
        ):
            return "no"  # a launcher kills the rest of the ranks
        if self.went_on(anchor, 3 if rooted else 2):
            # Bars of many ranks can look like steps, so an uncaught exception with no other in sight is not dismissed.
            return "suspected" if rooted and self.final is None and self.known and self.signal is None else "no"
        if failure_elsewhere and not wording.native and not (rooted and line.speaker is not None):
            return "no"
        final = self.final
        if final is not None and final.index > anchor.at and not wording.native and final.speaker == line.speaker:
            if raised is None:
                return "no"
            if _root(final) and (not rooted or _root(final) == _root(raised)):
                return "no"
        caught = not rooted and not wording.native and (
            self.handled_nearby(anchor) or (raised is None and line.level in ("debug", "info", "warning"))
        )  # fmt: skip
        if caught or wording.strength == "mention":
            return "no" if final is not None or not self.known or self.signal is not None else "suspected"
        if self.signal in (1, 2, 9, 15) and not rooted and not wording.native and wording.strength == "hard":
            return "no"  # a killed process did not die of what its text says
        return "yes" if wording.strength == "hard" else "suspected"


def _exception(anchor: _Anchor) -> Raised | None:
    """The exception that says it, frames and all; a launcher's or a library's line only stands near one."""
    raised, wording = anchor.line.raised, anchor.wording
    if raised is None or not raised.frames:
        return None
    apart = wording.native or wording.kind is DiagnosisKind.HOST_OOM_SUSPECTED
    return None if anchor.line.role == "text" and apart else raised


def _root(raised: Raised) -> str:
    """The script a traceback starts in; empty if it starts inside a function, as a caught and printed one does."""
    if not raised.header or not raised.frames or raised.frames[0].function not in _ROOTS:
        return ""
    for frame in raised.frames:
        if not frame.file.startswith("<frozen") and not frame.file.endswith("runpy.py"):
            return frame.file
    return raised.frames[0].file


# --- verdicts ---------------------------------------------------------------------------------------------------------

_KIND_ORDER = (
    DiagnosisKind.DEVICE_OOM,
    DiagnosisKind.HOST_OOM,
    DiagnosisKind.SHM_OOM,
    DiagnosisKind.HOST_OOM_SUSPECTED,
)

_CAUSES: tuple[tuple[re.Pattern[str], DiagnosisKind], ...] = (
    (re.compile(r"^KeyboardInterrupt\b"), DiagnosisKind.USER_INTERRUPT),
    (re.compile(r"No space left on device|[Dd]isk quota exceeded|unexpected pos \d+ vs \d+"), DiagnosisKind.DISK_FULL),
    (
        re.compile(r"uncorrectable (?:NVLink|ECC)|[Ff]allen off the bus|GPU is lost|cudaErrorECC"),
        DiagnosisKind.GPU_LOST,
    ),
    (
        re.compile(
            r"(?:CUDA|HIP) error: (?:an illegal|device-side|unspecified launch|misaligned|the launch|unknown)|"
            r"CUDA driver error: (?:unknown|device not ready)|"
            r"cudaErrorIllegalAddress|cudaErrorLaunchFailure|CUDA_ERROR_ILLEGAL_ADDRESS"
        ),
        DiagnosisKind.CUDA_CONTEXT,
    ),
    (re.compile(r"exitcode\s{0,4}: -(?:4|6|7|8|11)\b"), DiagnosisKind.SIGNAL),
    (
        re.compile(
            r"Dist(?:Backend|Network|Store)Error|NCCL error|Watchdog caught collective|[Cc]onnection closed by peer|"
            r"Connection reset by peer|\b[Gg]loo\b.{0,200}(?:[Tt]imeout|[Cc]onnect)"
        ),
        DiagnosisKind.DISTRIBUTED,
    ),
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
    status = evidence.exit
    if status.code == 0 and not status.signal:
        return Diagnosis(kind=DiagnosisKind.SUCCESS)
    signal = _effective_signal(status)
    scene = _Scene(evidence, signal)
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
    evidence: Evidence, scene: _Scene, failure: TrainerFailure, said: tuple[DiagnosisKind, Strength]
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


def _best(anchors: list[_Anchor]) -> _Anchor:
    """By class first, then the most telling message, then the last: never simply the first one printed."""

    def merit(anchor: _Anchor) -> tuple[int, int, int, int]:
        framed = _exception(anchor) is not None
        return (
            int(framed or anchor.wording.native),
            -_KIND_ORDER.index(anchor.wording.kind),
            count_numbers(anchor.numbers),
            anchor.at,
        )

    return max(anchors, key=merit)


def _from_anchor(
    scene: _Scene, anchors: list[_Anchor], verdict: Literal["yes", "suspected"], failure: TrainerFailure | None
) -> Diagnosis:
    best = _best(anchors)
    kind = best.wording.kind
    raised = best.line.raised
    frames = raised.frames if raised is not None else []
    if kind is DiagnosisKind.DEVICE_OOM and not count_numbers(best.numbers):
        near = [line.text for line in scene.lines[max(0, best.at - 12) : best.at + 1]]
        if any(map(_PINNING.search, near)) or any(_PINNING.search(frame.function) for frame in frames[-3:]):
            kind = DiagnosisKind.HOST_OOM  # page-locked host memory, though the driver says CUDA
    phase = (failure.phase if failure is not None else None) or infer_phase(frames)
    text = squeeze(" ".join(strip_prefixes(clean_line(raw)).text for raw in best.blob))
    last = frames[-1:]
    where = tuple(f'File "{frame.file}", in {frame.function}: {frame.source}'[:300] for frame in last)
    return Diagnosis(
        kind=kind,
        is_oom=verdict,
        phase=phase,
        rank=best.line.rank,
        numbers=best.numbers,
        message=text[:500],
        evidence=where + tuple(raw[:1000] for raw in best.blob[:8]),
    )


def _tail(scene: _Scene, count: int = 5) -> tuple[str, ...]:
    last = [line.raw[:1000] for line in scene.lines if line.role != "blank"][-count:]
    return tuple(last)


def _not_oom(evidence: Evidence, scene: _Scene, signal: int | None) -> Diagnosis:
    failure, status = evidence.failure, evidence.exit
    if failure is not None:
        message = squeeze(clean_line(f"{failure.type}: {failure.message}".replace("\n", " ")))[:500]
        said = _cause([message]) or DiagnosisKind.ERROR
        return Diagnosis(kind=said, phase=failure.phase, message=message, evidence=_tail(scene))
    final = scene.final
    shown = final or (scene.exceptions[-1] if scene.exceptions else None)
    phase = infer_phase(final.frames) if final is not None else None
    if final is not None:
        texts = [raised.text for raised in scene.exceptions if raised.group == final.group]
    else:
        texts = [line.text for line in scene.lines[-400:] if line.role in ("text", "raised")]
    kind = DiagnosisKind.USER_INTERRUPT if signal == 2 else _cause(texts)
    if kind is None:
        if final is not None:
            kind = DiagnosisKind.ERROR
        elif signal is not None:
            kind = DiagnosisKind.SIGNAL
        elif status.code in (126, 127) and shown is None:
            kind = DiagnosisKind.EXEC_FAILED
        elif status.code is not None or shown is not None:
            kind = DiagnosisKind.ERROR
        else:
            kind = DiagnosisKind.UNKNOWN
    message = shown.text if shown is not None else (_tail(scene, 1) or ("",))[0]
    if kind is DiagnosisKind.SIGNAL and signal is not None:
        message = f"ended by signal {signal}"
    return Diagnosis(
        kind=kind,
        phase=phase,
        rank=shown.rank if shown is not None else None,
        message=squeeze(message)[:500],
        evidence=_tail(scene),
    )


def _cause(texts: Iterable[str]) -> DiagnosisKind | None:
    texts = list(texts)
    for pattern, kind in _CAUSES:
        if any(pattern.search(text) for text in texts):
            return kind
    return None
