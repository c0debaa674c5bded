"""What a cooperating trainer reports of itself (docs/trainer-protocol.md), turned into events.

These are a stranger's words: a report that does not keep to the protocol tells nothing, and none can break the run.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from .core.events import (
    AnyEvent,
    CheckpointSaved,
    KnobUnavailable,
    Note,
    PeakMeasured,
    Progress,
    TrainerReported,
)
from .core.state import Attempt
from .core.verdict import TrainerFailure
from .units import count

PROTOCOL = 1
PAUSES = ("load", "compile", "eval", "checkpoint", "resume")
LARGEST = 2**53
"""The largest number of steps or bytes that any reader of JSON holds exactly."""


class Reports:
    """The reports of one attempt, and what they say so far."""

    def __init__(self, cwd: str, known: Attempt, saved_step: int) -> None:
        """`known` and `saved_step` (of the newest checkpoint) are what the journal has already, after a takeover."""
        self.step = known.step
        """Optimizer steps completed, whoever told it."""
        self.progress: Progress | None = None  # the newest, until it is taken
        self.failure: TrainerFailure | None = None
        self.peak_bytes: int | None = None
        """The highest that a step or the failure told, of where it trains."""
        self.count = 0
        """Changes with every step that is told, whatever its number."""
        self.pauses = False
        """Whether the trainer says that it does something else between its steps."""
        self.target_steps: int | None = None
        self._told_step = -1
        self.begun = False
        self.tells_peaks = False
        self._n, self._cwd = known.n, Path(cwd)
        self._saved_step = saved_step
        self._told = set(known.told)
        self._first_retries: int | None = None
        self._understood = True

    def read(self, line: bytes) -> list[AnyEvent]:
        """The events that a line makes."""
        try:
            return [_as_journalled(event) for event in self.events(parse_object(line))]
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, msgspec.MsgspecError):
            return []

    def advance(self, step: int, loss: float | None, step_s: float | None, block_size: object) -> None:
        """`step` optimizer steps are completed."""
        if step > LARGEST:
            return
        self.count += step != self._told_step
        self._told_step, self.pauses = step, False
        self._reached(step)
        length = block_size if isinstance(block_size, int) and 0 < block_size <= LARGEST else None
        self.progress = Progress(attempt=self._n, step=step, loss=loss, step_s=step_s, block_size=length)
        if self.failure is not None and self._went_on(self.failure, step):
            self.failure = None

    def events(self, report: dict[str, Any]) -> Iterator[AnyEvent]:
        """What one report tells. Unknown kinds and fields tell nothing.

        Raises:
            Whatever reading a value of a wrong type does.
        """
        kind = report.get("kind")
        if kind == "start":
            yield from self._start(report)
        if not self._understood:
            return
        match kind:
            case "phase":
                self.tells_peaks = True
                self.pauses = report.get("phase") in PAUSES
            case "step":
                yield from self._stepped(report)
            case "peak":
                where = "device" if report.get("where") == "cuda" else "host"
                size, length = int(report["bytes"]), report.get("block_size")
                phase = str(report["phase"])
                self.tells_peaks = True
                yield PeakMeasured(attempt=self._n, phase=phase, bytes=size, block_size=length, where=where)
            case "checkpoint":
                yield from self._saved(report)
            case "checkpoint_failed":
                step = _count(report["step"])
                why = str(report["message"])[:300]
                yield from self._once(f"checkpoint_failed {step}", f"nothing was saved at step {step}: {why}")
            case "skipped":
                yield from self._once(
                    "skipped",
                    f"an update was not applied after step {_count(report['step'])}: {report['reason']}"[:300],
                )
            case "unavailable":
                yield KnobUnavailable(attempt=self._n, knob=str(report["knob"]), reason=str(report["reason"])[:300])
            case "failed":
                self._failed(report)
            case "stopped" | "done":
                self._reached(_count(report["step"]))
            case _:
                pass

    def _start(self, report: dict[str, Any]) -> Iterator[AnyEvent]:
        self.begun, version = True, report.get("protocol") or PROTOCOL
        self._understood = version == PROTOCOL
        if not self._understood:
            theirs = f"the trainer reports in version {str(version)[:20]} of the protocol"
            yield from self._once("protocol", f"{theirs}, and gpusup reads version {PROTOCOL}: it is only watched")
            return
        settings, target = report.get("settings") or {}, report.get("target_steps")
        self.target_steps = target if isinstance(target, int) else None
        yield TrainerReported(
            attempt=self._n,
            step=int(report["step"]),
            target_steps=report.get("target_steps"),
            can_save=bool(report.get("can_save")),
            global_batch_size=report.get("global_batch_size"),
            settings={k: v for k, v in settings.items() if isinstance(v, (bool, int, float, str))},
        )

    def _stepped(self, report: dict[str, Any]) -> Iterator[AnyEvent]:
        loss, dt_s = report.get("loss"), report.get("dt_s")
        self.advance(
            _count(report["step"]),
            None if loss is None else float(loss),
            None if dt_s is None else float(dt_s),
            report.get("block_size"),
        )
        self._peaked(report.get("peak_bytes"))
        retries = report.get("alloc_retries")
        if retries is None:
            return
        if self._first_retries is None:
            self._first_retries = _count(retries)
        freed = _count(retries) - self._first_retries
        if freed > 0:
            text = f"the allocator had to free its cache {count(freed, 'time')} to go on: memory is nearly exhausted"
            yield from self._once("alloc_retries", f"{text} at these settings")

    def _saved(self, report: dict[str, Any]) -> Iterator[AnyEvent]:
        step, path = _count(report["step"]), self._cwd / str(report["path"])
        self._reached(step)
        if step > self._saved_step:
            self._saved_step = step
            failure = self.failure
            emergency = failure is not None and failure.oom and step >= (failure.step or 0)
            size = _count(report.get("bytes"))
            yield CheckpointSaved(attempt=self._n, step=step, path=str(path), bytes=size, emergency=emergency)

    def _failed(self, report: dict[str, Any]) -> None:
        """Of several ranks' failures the one for memory counts: the others lost a peer."""
        step = _count(report["step"])
        fields = {name: report.get(name) for name in ("phase", "block_size", "type", "message", "rank")}
        failure = msgspec.convert({**fields, "step": step, "oom": report.get("oom") or False}, TrainerFailure)
        self._reached(step)
        if self.failure is None or failure.oom or not self.failure.oom or self._went_on(self.failure, step):
            self.failure = failure
        self._peaked(report.get("peak_bytes"))

    def _peaked(self, peak: object) -> None:
        if peak is not None:
            self.peak_bytes = max(_count(peak), self.peak_bytes or 0)

    def _went_on(self, failure: TrainerFailure, step: int) -> bool:
        """Whether it was caught: another rank may finish the step under way, no rank can finish the next."""
        return step > (failure.step or 0) + 1

    def _reached(self, step: int) -> None:
        self.step = max(self.step, _count(step))

    def _once(self, topic: str, text: str) -> Iterator[Note]:
        if topic not in self._told:
            self._told.add(topic)
            yield Note(text=text, attempt=self._n, topic=topic)


def _as_journalled(event: AnyEvent) -> AnyEvent:
    """The event as it will be read again; fails where the journal would."""
    return msgspec.json.decode(msgspec.json.encode(event), type=type(event))


def _count(value: object) -> int:
    """A number of steps or bytes that a journal can hold; 0 for None."""
    number = int(value or 0)  # type: ignore[call-overload]
    if not 0 <= number <= LARGEST:
        raise ValueError(f"{number} counts nothing")
    return int(number)


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; an empty one when it is anything else."""
    try:
        content = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
