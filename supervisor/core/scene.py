"""What an attempt's output shows, and what each wording for memory in it is worth.

Text proves nothing while a process lives, and little after it: a wording counts only if the attempt failed, the line is
a report and not a quotation, and nothing shows that the program caught the error and went on.
"""

import re
from typing import Literal, NamedTuple

from .failures import DONE, FINISHED
from .oom_text import (
    CONSEQUENCE,
    Wording,
    find_wording,
    is_advice,
    is_quoted,
    parse_numbers,
)
from .tracebacks import Line, Raised, read_output
from .verdict import DiagnosisKind, Evidence, OomNumbers


class Anchor(NamedTuple):
    at: int
    line: Line
    wording: Wording
    blob: tuple[str, ...]
    numbers: OomNumbers


_PROGRESS = re.compile(
    r"(?:^|[^\w/])(step|iter|iteration|epoch|batch|update|trial)s?\W{0,4}(\d{1,9})\b|\b(\d{1,9})/\d{1,9} \[\d",
    re.IGNORECASE,
)
_NOT_PROGRESS = re.compile(r"wandb|oading |checkpoint shards|batch size", re.IGNORECASE)
_HANDLED = re.compile(
    r"[Ss]kipp?(?:ing|ed)? (?:this |the |current )?(?:batch|update|step|sample|micro)|attempting to recover|"
    r"[Rr]etry(?:ing)? (?:with|at|using)|(?:[Rr]educ|[Dd]ecreas|[Hh]alv|[Ll]ower)ing (?:the )?(?:micro[- ]?)?batch|"
    r"[Bb]atch size \d+ failed|[Ff]all(?:ing|s)? back|[Rr]ecovered from|, continuing|will be skipped|"
    r"[Tt]rying batch size|Using batch-size \d|unloading all loaded models"
)
_SEGFAULTED = re.compile(r"exitcode\s{0,4}: -(?:4|6|7|8|11)\b")
# Python's resource tracker takes a few megabytes: the kernel never chooses it, so its death means that all were killed.
_TRACKER_DIED = re.compile(r"^resource_tracker: process died unexpectedly")
_ASSERTED = re.compile(r"device-side assert|Assertion `")
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


def _anchors(lines: list[Line]) -> list[Anchor]:
    anchors: list[Anchor] = []
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
        anchors.append(Anchor(index, line, wording, tuple(part.raw for part in blob), numbers))
    return anchors


def _progress(lines: list[Line]) -> list[tuple[int, int, int | None, str, int]]:
    seen: list[tuple[int, int, int | None, str, int]] = []
    for index, line in enumerate(lines):
        if line.role in ("text", "data") and not _NOT_PROGRESS.search(line.text):
            for word, count, bar in _PROGRESS.findall(line.text[-600:]):
                seen.append((index, line.stream, line.speaker, word.lower() or "bar", int(count or bar)))
    return seen


class Scene:
    """Everything the output shows, and how one wording in it relates to the rest."""

    def __init__(self, evidence: Evidence, signal: int | None) -> None:
        self.lines, self.exceptions = read_output((*evidence.others, evidence.stdout, evidence.stderr))
        self.anchors = _anchors(self.lines)
        self.progress = _progress(self.lines)
        self.signal = signal
        self.known = evidence.exit.code is not None or evidence.exit.signal is not None
        self.asserted = any(_ASSERTED.search(line.text) for line in self.lines)
        self.torn_down = any(_TRACKER_DIED.search(line.text) for line in self.lines)
        self.segfaulted = any(_SEGFAULTED.search(line.text) for line in self.lines)
        oom_groups = {raised.group for raised in map(exception, self.anchors) if raised is not None}
        self.rooted_groups = {e.group for e in self.exceptions if _root(e) or not e.header}
        self.final: Raised | None = None
        """The last exception that is neither a shortage nor a consequence of another failure."""
        for raised in self.exceptions:
            if raised.frames and not raised.secondary and raised.group not in oom_groups:
                message = " ".join([raised.text, *(m.text for m in _follow(self.lines, raised.index, 3))])
                if not CONSEQUENCE.search(message):
                    self.final = raised

    def went_on(self, at: int, line: Line, need: int) -> bool:
        """Whether steps were counted after line `at`; one or two may come from another rank or a buffer."""
        best: dict[str, int] = {}
        grown: dict[str, int] = {}
        for index, stream, speaker, word, value in self.progress:
            after = index > at and stream == line.stream and speaker == line.speaker
            if after and value > best.get(word, -1):
                best[word] = value
                grown[word] = grown.get(word, 0) + 1
        return any(count >= need for count in grown.values())

    def message_after(self, raised: Raised) -> list[str]:
        """The further lines of an exception's message."""
        return [line.text for line in _follow(self.lines, raised.index, 3)]

    def outlived(self, at: int) -> bool:
        """Whether the run went on, or said that it was finished, after line `at`."""
        line = self.lines[at]
        return self.went_on(at, line, 2) or any(FINISHED.search(later.text) for later in self.lines[at + 1 :])

    def handled_nearby(self, anchor: Anchor) -> bool:
        around = self.lines[max(0, anchor.at - 3) : anchor.at + 8]
        return any(_HANDLED.search(line.text) for line in around)

    def weigh(self, anchor: Anchor, failure_elsewhere: bool) -> Literal["yes", "suspected", "no"]:
        wording, line = anchor.wording, anchor.line
        raised = exception(anchor)
        rooted = raised is not None and raised.group in self.rooted_groups
        if self.asserted and "CUBLAS" in line.text:
            return "no"  # an index out of range, reported late
        if (
            wording.kind is DiagnosisKind.HOST_OOM_SUSPECTED
            and (raised is None or raised.secondary)
            and (self.segfaulted or self.final is not None or self.torn_down)
        ):
            return "no"  # a launcher kills the rest of the ranks, or somebody the whole group
        later = self.lines[anchor.at + 1 :]
        if raised is None and not wording.native and any(DONE.search(more.text) for more in later):
            return "no"
        if self.went_on(anchor.at, line, 3 if rooted else 2):
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


def exception(anchor: Anchor) -> Raised | None:
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
