"""What the trainer tells a supervisor: the hook's events, and the peak memory of every phase at every block size.

Without GPUSUP_EVENTS nothing is written and nothing is measured. docs/trainer-protocol.md lists the kinds and fields.
"""

import os
import sys
from collections import Counter
from pathlib import Path

import torch

from .hook import PROTOCOL, Hook, cuda_memory

STEPS_BEFORE_PEAK = 2  # a first step may not have everything in memory yet


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

    def __init__(self, hook: Hook | None) -> None:
        self._hook = hook or Hook(None)
        self._meter: PeakMeter | None = PeakMeter() if self._hook.supervised else None
        self._peaks_bytes: dict[tuple[str, int], int] = {}
        self._completed: Counter[tuple[str, int]] = Counter()  # how often each (phase, block size) was gone through
        self._now = ("", 0)  # the (phase, block size) under way; none yet
        self.step = 0  # optimizer steps completed
        self.part = ""  # for `failed`: the part of an optimizer step under way, forward, backward or optimizer
        self.compiling = False  # for `failed`: a graph is being compiled

    @classmethod
    def from_environment(cls) -> "Reporter":
        """The reporter the environment asks for; a file that cannot be opened only costs the events."""
        return cls(Hook.from_environment())

    def emit(self, kind: str, **fields: object) -> None:
        """Append one event; `step` defaults to the steps completed. Training never ends because this failed."""
        self._hook.emit(kind, **{"step": self.step, **fields})

    def start(self, target_steps: int, settings: dict[str, object], global_batch_size: int) -> None:
        """Announce the run: its settings as they are really in effect. It saves when it is asked to."""
        self.emit(
            "start",
            target_steps=target_steps,
            can_save=True,
            settings=settings,
            global_batch_size=global_batch_size,
            pid=os.getpid(),
            protocol=PROTOCOL,
        )

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

    def step_fields(self) -> dict[str, int]:
        """For `step`: the peak of the phase so far in bytes and, on CUDA, the allocator's retries. Costs 20 us."""
        if self._meter is None:
            return {}
        if self._meter.cuda:
            return cuda_memory()
        peak_bytes = self._measure()
        return {} if peak_bytes is None else {"peak_bytes": peak_bytes}

    def failed(self, error: BaseException, oom: bool | None = None) -> None:
        """Say what is about to end the process, and in which part of which phase.

        `oom`: whether memory was refused; None: as the hook recognises it.
        """
        phase, block_size = self._now
        self._hook.failed(
            error,
            oom,
            step=self.step,
            phase="compile" if self.compiling else self.part or phase or "load",
            block_size=block_size,
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
