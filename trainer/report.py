"""What the trainer tells a supervisor: one JSON object per line, appended to the file named by GPUSUP_EVENTS.

Without that variable nothing is written and nothing is measured. docs/cooperation.md lists the kinds and their fields.
"""

import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import torch

STEPS_BEFORE_PEAK = 2  # a first step may not have everything in memory yet
MESSAGE_CHARS = 2000  # of an exception's text


class PeakMeter:
    """Peak memory since the last reset: the kernel's high-water mark, or the CUDA allocator's reserved bytes."""

    def __init__(self) -> None:
        self.cuda = False

    @property
    def where(self) -> str:
        return "cuda" if self.cuda else "host"

    def reset(self) -> None:
        """Start again from what is in use now."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # 5: reset VmHWM to the present VmRSS

    def read_bytes(self) -> int:
        """The peak in bytes."""
        if self.cuda:
            return torch.cuda.max_memory_reserved()
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise OSError("/proc/self/status has no VmHWM")


class Reporter:
    """Appends events and keeps the peak memory of every (phase, block size) this process has been through."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        self._meter: PeakMeter | None = PeakMeter() if path else None
        self._peaks_bytes: dict[tuple[str, int], int] = {}
        self._completed: Counter[tuple[str, int]] = Counter()  # how often each (phase, block size) was gone through
        self._now = ("", 0)  # the (phase, block size) under way; none yet
        self.step = 0  # optimizer steps completed
        self.part = ""  # for `failed`: the part of an optimizer step under way, forward, backward or optimizer
        self.compiling = False  # for `failed`: a graph is being compiled

    @classmethod
    def from_environment(cls) -> "Reporter":
        """The reporter the environment asks for; a file that cannot be opened only costs the events."""
        path = os.environ.get("GPUSUP_EVENTS")
        try:
            return cls(Path(path) if path else None)
        except OSError as error:
            print(f"no events will be written: {error}", file=sys.stderr, flush=True)
            return cls(None)

    def emit(self, kind: str, **fields: object) -> None:
        """Append one event; `step` defaults to the steps completed. Training never ends because this failed."""
        if self._file is None:
            return
        event = {"kind": kind, "step": self.step, **fields}
        line = json.dumps({name: _finite(value) for name, value in event.items()}, allow_nan=False) + "\n"
        try:
            os.write(self._file, line.encode())
        except OSError as error:
            print(f"no more events will be written: {error}", file=sys.stderr, flush=True)
            self._file = None

    def measure_cuda(self) -> None:
        """Measure the CUDA allocator from now on, not the host."""
        if self._meter is not None:
            self._meter.cuda = True

    def enter(self, phase: str, block_size: int) -> None:
        """Begin a phase; the one before is complete. Nothing happens when it is under way already."""
        if self._now == (phase, block_size):
            return
        self.leave()
        self._now = (phase, block_size)
        self.part = ""
        self.emit("phase", phase=phase, block_size=block_size)
        self._measure(reset=True)

    def leave(self) -> None:
        """Complete the phase under way and report its peak."""
        phase = self._now[0]
        if not phase:
            return
        if phase != "train":
            self._completed[self._now] += 1
        if self._completed[self._now] >= (STEPS_BEFORE_PEAK if phase == "train" else 1):
            self._emit_peak()

    def stepped(self) -> None:
        """One more optimizer step is complete in the phase under way."""
        self.step += 1
        if self._now[0] == "train":
            self._completed[self._now] += 1
            if self._completed[self._now] == STEPS_BEFORE_PEAK:
                self._emit_peak()

    def failed(self, error: Exception) -> None:
        """Say what is about to end the process, and in which part of which phase."""
        phase, block_size = self._now
        self.emit(
            "failed",
            phase="compile" if self.compiling else self.part or phase or "load",
            block_size=block_size,
            type=type(error).__name__,
            message=str(error)[:MESSAGE_CHARS],
            peak_bytes=self._measure(),
        )

    def _emit_peak(self) -> None:
        peak_bytes = self._measure()
        if self._meter is None or peak_bytes is None:
            return
        phase, block_size = self._now
        self.emit("peak", phase=phase, block_size=block_size, bytes=peak_bytes, where=self._meter.where)

    def _measure(self, reset: bool = False) -> int | None:
        """The highest peak of this (phase, block size) so far, in bytes; None when it cannot be measured."""
        if self._meter is None:
            return None
        try:
            if reset:
                self._meter.reset()
            peak_bytes = max(self._meter.read_bytes(), self._peaks_bytes.get(self._now, 0))
        except OSError as error:
            print(f"peak memory cannot be measured: {error}", file=sys.stderr, flush=True)
            self._meter = None
            return None
        self._peaks_bytes[self._now] = peak_bytes
        return peak_bytes


def _finite(value: object) -> object:
    """JSON has no NaN and no infinities: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
