"""Tells gpusup how a training run is going, and hears when it is asked to save. Copy this one file into any project.

It needs nothing but the standard library (MIT licence). What is written is described in gpusup's
docs/trainer-protocol.md; without GPUSUP_EVENTS in the environment every call returns at once.

    with Hook.from_environment() as hook:  # an exception that ends the process is reported
        hook.start(step=0, target_steps=1000, can_save=True)
        for step in range(1, 1001):
            loss, dt_s = train_one_step()
            hook.step(step, loss=loss, dt_s=dt_s)
            if hook.save_requested:
                break
        hook.checkpoint(step, path=save(step))
        hook.leave()
"""

import errno
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

PROTOCOL = 1
"""Version of the protocol that is written here."""
EXIT_OOM_SAVED = 75
"""Out of memory, and the last completed step is saved: "start me again with settings that need less" (EX_TEMPFAIL)."""
MESSAGE_CHARS = 2000  # of an exception's text

_REFUSED = re.compile(
    r"(?:CUDA|HIP|XPU|MPS backend) out of memory"
    r"|(?:CUDA|HIP|XPU|CUDA driver) error: out of memory"
    r"|Triton Error \[\w+\]: out of memory"
    r"|UR_RESULT_ERROR_OUT_OF_\w*MEMORY"
    r"|(?:CU|HIP)[A-Z]{2,8}_(?:STATUS_)?ALLOC_FAILED"
    r"|Cuda failure (?:2 )?'out of memory'"
    r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory was refused, on a device or on the host."""
    if isinstance(error, MemoryError) or any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _REFUSED.search(str(error)) is not None


def cuda_memory() -> dict[str, int]:
    """Of PyTorch's CUDA allocator: `peak_bytes` reserved since the last reset, and `alloc_retries` so far.

    Empty where CUDA is not in use. Nothing is imported, and the device is not waited for.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    stats = torch.cuda.memory_stats_as_nested_dict()
    try:
        return {"peak_bytes": stats["reserved_bytes"]["all"]["peak"], "alloc_retries": stats["num_alloc_retries"]}
    except KeyError:  # another allocator, which does not count
        return {}


class StopRequest:
    """Notes SIGTERM, so that the step under way can be finished."""

    def __init__(self) -> None:
        self.asked = False
        self._pid = os.getpid()
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self.obey()  # a forked helper is not asked, it is told
        self.asked = True

    def obey(self) -> NoReturn:
        """End this process by the signal, so that its exit status tells the truth."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)  # reached only where the signal is blocked


class Hook:
    """Appends events to the file at `path`, one line and one `write` each; None: to none.

    Training never ends because of it: a file that cannot be written costs only the events. Any thread may call it.
    Of several ranks (RANK in the environment) the first tells the story, and each its own failure.
    """

    def __init__(self, path: Path | None) -> None:
        """Raises OSError when the file cannot be opened."""
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        rank = os.environ.get("RANK", "")
        self._rank = int(rank) if rank.isdigit() else 0
        self._stop: StopRequest | None = None
        self._target_steps: int | None = None
        self._step = 0  # optimizer steps completed
        self._phase: str | None = None
        self._failure_told = False

    @classmethod
    def from_environment(cls) -> "Hook":
        """The hook that GPUSUP_EVENTS asks for, or one that does nothing."""
        path = os.environ.get("GPUSUP_EVENTS")
        try:
            return cls(Path(path) if path else None)
        except OSError as error:
            print(f"no events will be written: {error}", file=sys.stderr, flush=True)
            return cls(None)

    @property
    def supervised(self) -> bool:
        """Whether somebody reads what is told."""
        return self._file is not None

    @property
    def save_requested(self) -> bool:
        """Whether SIGTERM has come since `start`: finish the step, save, and call `leave`."""
        return self._stop is not None and self._stop.asked

    def start(
        self,
        step: int = 0,
        target_steps: int | None = None,
        can_save: bool = False,
        settings: dict[str, object] | None = None,
        global_batch_size: int | None = None,
    ) -> None:
        """Before the first step. `can_save`: from now on SIGTERM asks to save, and no longer ends the process."""
        if not self.supervised:
            return
        if can_save:
            try:
                self._stop = StopRequest()
            except ValueError:  # only the main thread may listen for signals
                can_save = False
        self._step, self._target_steps = step, target_steps
        batch = {} if global_batch_size is None else {"global_batch_size": global_batch_size}
        target = {} if target_steps is None else {"target_steps": target_steps}
        whole = {"can_save": can_save, "settings": settings or {}, "pid": os.getpid(), "protocol": PROTOCOL}
        self.emit("start", step=step, **target, **whole, **batch)

    def phase(self, name: str, block_size: int | None = None) -> None:
        """A coarse phase begins. A trainer that tells its phases tells their peaks, too."""
        self._phase = name
        self.emit("phase", phase=name, step=self._step, block_size=block_size)

    def step(self, step: int, loss: float | None = None, dt_s: float | None = None, **more: object) -> None:
        """`step` optimizer steps are completed; memory on a CUDA device is added to what is told."""
        self._step, self._failure_told = step, False
        if self.supervised:
            self.emit("step", step=step, loss=loss, dt_s=dt_s, **{**cuda_memory(), **more})

    def peak(self, phase: str, count_bytes: int, block_size: int | None = None, where: str = "cuda") -> None:
        """Peak memory of a phase that was completed; `where`: `cuda` or `host`."""
        self.emit("peak", phase=phase, step=self._step, block_size=block_size, bytes=count_bytes, where=where)

    def eval(self, val_loss: float) -> None:
        """An evaluation is complete."""
        self.emit("eval", step=self._step, val_loss=val_loss)

    def checkpoint_begun(self, step: int) -> None:
        """The state after `step` steps is being saved."""
        self.emit("checkpoint_begun", step=step)

    def checkpoint(self, step: int, path: str | os.PathLike[str], count_bytes: int | None = None) -> None:
        """The checkpoint of `step` is durable under its final name."""
        size = {} if count_bytes is None else {"bytes": count_bytes}
        self.emit("checkpoint", step=step, path=os.fspath(path), **size)

    def checkpoint_failed(self, step: int, message: str) -> None:
        """Nothing was saved at `step`, and training goes on."""
        self.emit("checkpoint_failed", step=step, message=message[:MESSAGE_CHARS])

    def skipped(self, reason: str, count: int) -> None:
        """An update was not applied; `count`: how many so far."""
        self.emit("skipped", step=self._step, reason=reason, count=count)

    def unavailable(self, knob: str, reason: str) -> None:
        """A setting could not be honoured, and training goes on without it."""
        self.emit("unavailable", step=self._step, knob=knob, reason=reason)

    def failed(self, error: BaseException, oom: bool | None = None, **more: object) -> None:
        """What is about to end the process. `oom`: whether memory was refused, if the caller knows better."""
        self._failure_told = True
        told = {
            "step": self._step,
            "phase": self._phase,
            "type": type(error).__name__,
            "message": str(error)[:MESSAGE_CHARS],
            "oom": is_out_of_memory(error) if oom is None else oom,
            "rank": self._rank,
        }
        self.emit("failed", **{**told, **more})

    def leave(self) -> None:
        """After the last step: say `done`; or `stopped`, where a save was requested, and end by the signal."""
        done = self._target_steps is not None and self._step >= self._target_steps
        if self._stop is None or not self._stop.asked or done:
            self.emit("done", step=self._step)
            return
        self.emit("stopped", step=self._step)
        self._stop.obey()

    def emit(self, kind: str, **fields: object) -> None:
        """Append one event."""
        if self._file is None or (self._rank and kind != "failed"):
            return
        line = json.dumps(_plain({"kind": kind, **fields}), allow_nan=False) + "\n"
        try:
            os.write(self._file, line.encode())
        except OSError as error:
            print(f"no more events will be written: {error}", file=sys.stderr, flush=True)
            self._file = None

    def __enter__(self) -> "Hook":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not self._failure_told:
            self.failed(error)


def _plain(value: object) -> object:
    """In JSON's types: a tensor or NumPy number is its value; NaN and the infinities, which JSON lacks, are null."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    try:
        return _plain(value.item())  # type: ignore[attr-defined]
    except (AttributeError, ValueError, RuntimeError):
        return str(value)
