"""Checkpoints that survive a crash at any moment, and cost training almost nothing.

A checkpoint is a directory, `ckpt-00000030`, of plain data (docs/checkpoint-format.md): loading one cannot run code.
One without a whole manifest does not exist. At least two are kept, because the newest may turn out to be damaged.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isal import isal_zlib  # the CRC-32 of zlib, five times faster
from torch import Tensor

from . import safetensors_file
from .checkpoint_writer import MANIFEST, STACK_BYTES, STATE, VERSION, Write, discard, discard_if_dead
from .errors import TrainerError

NAME = re.compile(r"ckpt-(\d{8,})")


class Damaged(TrainerError):
    """The directory is not a whole checkpoint."""


class SaveFailed(OSError):
    """A checkpoint could not be written; those before it are untouched."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is durable under its final name."""

    step: int
    path: Path
    bytes: int
    write_s: float  # from the call of `save` until it was durable
    stall_s: float  # of that, the time training stood still


@dataclass(frozen=True)
class Loaded:
    """A whole checkpoint. Its tensors are mapped from the file and READ-ONLY: copy what is to be kept."""

    path: Path
    step: int
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `prefix.*`, without the prefix."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }


class Checkpointer:
    """Saves checkpoints into one directory, one at a time, in the background.

    Between `save` and the next `before_update` the tensors given must not change; after it they may.
    """

    def __init__(self, directory: Path, keep_latest_k: int = 2, asynchronous: bool = True) -> None:
        """Raises TrainerError when `keep_latest_k` is below 2."""
        if keep_latest_k < 2:
            raise TrainerError(
                f"keep_latest_k={keep_latest_k} is too few: were the newest checkpoint damaged, nothing would be left; "
                f"use 2 or more"
            )
        self.directory = directory
        self.keep_latest_k = keep_latest_k
        self.asynchronous = asynchronous
        self._write: Write | None = None
        self._thread: threading.Thread | None = None
        self._began_s = self._ended_s = self._stall_s = 0.0
        self._committed: list[Saved] = []

    @property
    def in_flight_step(self) -> int | None:
        """The step of the checkpoint that is being written; None when there is none."""
        return None if self._write is None else self._write.step

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, object]) -> None:
        """Begin to write the checkpoint of `step`; one still in flight is waited for.

        Large tensors are read later, until `before_update`; small ones and `meta` (JSON) are copied now.
        Raises SaveFailed when the one before could not be written, or this one could not be begun.
        """
        began_s = time.monotonic()
        self._settle()
        self._write = Write(self.directory / f"ckpt-{step:08d}", step, tensors, meta)
        self._began_s, self._stall_s = began_s, 0.0
        if not (self.asynchronous and self._start_thread(self._write)):
            self._run(self._write, in_background=False)
        self._stall_s += time.monotonic() - began_s

    def before_update(self) -> None:
        """Must be called before anything changes the tensors given to `save`. Returns when they may change."""
        if self._write is None:
            return
        began_s = time.monotonic()
        self._write.release()
        self._stall_s += time.monotonic() - began_s

    def poll(self) -> list[Saved]:
        """The checkpoints committed since this or `wait` was last called. Raises SaveFailed when one was not."""
        if self._thread is None or not self._thread.is_alive():
            self._settle()
        return self._told()

    def wait(self) -> list[Saved]:
        """As `poll`, once nothing is in flight any more."""
        self._settle()
        return self._told()

    def _told(self) -> list[Saved]:
        committed, self._committed = self._committed, []
        return committed

    def _settle(self) -> None:
        """Wait for the one in flight. Raises SaveFailed."""
        write, self._write = self._write, None
        if write is None:
            return
        if self._thread is not None:
            write.release()  # at this thread's priority
            self._thread.join()
            self._thread = None
        if write.failure is not None:
            raise _save_failed(write.path, write.failure) from write.failure
        write_s = self._ended_s - self._began_s
        self._committed.append(Saved(write.step, write.path, write.size_bytes, write_s, self._stall_s))

    def _start_thread(self, write: Write) -> bool:
        """False when there is no memory even for that."""
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=self._run, args=(write, True), name="checkpoint")
            thread.start()
        except RuntimeError:
            return False
        finally:
            threading.stack_size(before)
        self._thread = thread
        return True

    def _run(self, write: Write, in_background: bool) -> None:
        write.run(in_background)
        self._ended_s = time.monotonic()
        if write.failure is None:
            try:
                self._prune(write.step)
            except OSError as error:
                print(f"an old checkpoint could not be deleted: {error}", file=sys.stderr, flush=True)

    def _prune(self, step: int) -> None:
        """Keep the checkpoint of `step` and those before it that are to be kept.

        Later ones go too: they are of a course this run has left by resuming from an earlier step.
        """
        found = stored(self.directory)
        kept = [path for at, path in found if at <= step][-self.keep_latest_k :]
        for _, path in found:
            if path not in kept:
                discard(path)
        for path in self.directory.glob("ckpt-*.partial"):
            discard_if_dead(path)
        for path in self.directory.glob("ckpt-*"):
            if NAME.fullmatch(path.name) and path.is_dir() and not (path / MANIFEST).exists():
                discard(path)  # of a process killed while it deleted


def _save_failed(path: Path, failure: BaseException) -> SaveFailed:
    what = f"{path} was not saved, those before it are untouched"
    if isinstance(failure, OSError) and failure.errno is not None:
        return SaveFailed(failure.errno, f"{failure.strerror}: {what}")
    return SaveFailed(f"{type(failure).__name__}: {failure}: {what}")


def load(path: Path) -> Loaded:
    """A checkpoint, every checksum verified.

    Raises Damaged, or TrainerError when it is no checkpoint of ours.
    """
    if not path.is_dir() or not (path / MANIFEST).is_file():
        raise TrainerError(
            f"{path}: no such checkpoint; give the path of a ckpt-* directory with a {MANIFEST} in resume_from"
        )
    manifest = _read_manifest(path)
    if manifest["version"] != VERSION:
        raise TrainerError(f"{path}: a checkpoint of version {manifest['version']}, this trainer reads {VERSION}")
    try:
        for name, expected in manifest["files"].items():
            _verify(path / name, expected["bytes"], int(expected["crc32"], 16))
        tensors = safetensors_file.read(path / STATE)
    except (OSError, ValueError, TrainerError) as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    return Loaded(path, manifest["step"], manifest["meta"], tensors)


def load_newest(directory: Path) -> Loaded:
    """The newest checkpoint that is whole. A damaged one is renamed to *.damaged, with a line about it."""
    for _, path in reversed(stored(directory)):
        try:
            return load(path)
        except Damaged as error:
            aside = _set_aside(path)
            print(f"{error}; set aside as {aside.name}, trying the one before", file=sys.stderr, flush=True)
    raise TrainerError(f"{directory}: no whole checkpoint to resume from; start with --init_from=scratch")


def stored(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in `directory`, oldest step first; none when there is no such directory."""
    if not directory.is_dir():
        return []
    matches = [(NAME.fullmatch(path.name), path) for path in directory.iterdir() if (path / MANIFEST).is_file()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest whose own checksum holds, of whatever version."""
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = json.loads(content)
        before = content[: content.rindex(b'"crc32": ')]
        if int(manifest["crc32"], 16) != isal_zlib.crc32(before):
            raise ValueError("its checksum does not match")
        if manifest["format"] != "gpusup checkpoint":
            raise ValueError("it is of another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is damaged ({MANIFEST}: {error})") from None
    return dict(manifest)


def _verify(path: Path, size_bytes: int, crc32: int) -> None:
    """Raise ValueError when a file is not as it was written."""
    found_bytes, found = 0, 0
    piece = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            found = isal_zlib.crc32(piece[:count], found)
            found_bytes += count
    if found_bytes != size_bytes:
        raise ValueError(f"{path.name} has {found_bytes} bytes, not {size_bytes}")
    if found != crc32:
        raise ValueError(f"the checksum of {path.name} does not match")


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, never onto one set aside before."""
    aside, number = path.with_name(f"{path.name}.damaged"), 2
    while aside.exists():
        aside, number = path.with_name(f"{path.name}.damaged.{number}"), number + 1
    return path.rename(aside)
