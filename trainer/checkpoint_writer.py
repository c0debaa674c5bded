"""Writing a checkpoint while training goes on, with no second copy of the model in memory.

Parameters and optimizer state change only inside an optimizer step. So a thread of low priority writes straight
from them during the forward and backward passes that follow, past the page cache. Whoever is about to change them
calls `release` first, which writes or copies what is still missing.
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from isal import isal_zlib
from torch import Tensor

from . import safetensors_file
from .durable import sync_directory
from .host_memory import headroom_bytes

VERSION = 1
STATE = "state.safetensors"
MANIFEST = "manifest.json"
PIECE_BYTES = 1 << 20  # small enough to stay in a core's cache from the copy through the checksum to the disk
DIRECT_BYTES = 16 << 20  # of one write without a copy: few writes, and an update waits for no more than one
BLOCK_BYTES = 4096  # what direct writes are aligned to, in memory and in the file
SMALL_BYTES = 64 << 10  # tensors up to this size are copied at once
PATIENCE_S = 0.3  # how long an update helps writing before it copies the rest instead
NICENESS = 10  # of the thread: a tenth of a core where training wants all of it
STACK_BYTES = 1 << 20  # of the thread; the default of 8 MiB counts against a memory limit


class Source:
    """The bytes of some tensors, one after another, read as late as possible from the tensors themselves."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        """Tensors of up to SMALL_BYTES are copied now; `device` is where the large ones are."""
        self._rest = deque(_flat(tensor) for tensor in tensors if tensor.nbytes)
        self.left_bytes = sum(flat.nbytes for flat in self._rest)
        self._stream = None
        if device.type == "cuda":
            # Beside the computation, after what was queued so far.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def take(self, piece: Tensor) -> tuple[Tensor, int]:
        """The next bytes, and their number: a tensor's own memory where the disk can be written from it.

        Otherwise they are copied into `piece` (uint8, on the host), which only the last time may stay less than full.
        """
        if direct_bytes := self._direct_bytes():
            return self._next(direct_bytes), direct_bytes
        filled = 0
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            while self.left_bytes and filled < piece.nbytes:
                if filled % BLOCK_BYTES == 0 and self._direct_bytes():
                    break
                flat = self._next(piece.nbytes - filled)
                place = piece[filled : filled + flat.nbytes]
                if flat.is_cuda:
                    place.copy_(flat, non_blocking=True)
                else:  # by NumPy, which does not wake PyTorch's threads for it
                    place.numpy()[:] = flat.numpy()
                filled += flat.nbytes
        if self._stream:
            self._stream.synchronize()
        return piece, filled

    def _direct_bytes(self) -> int:
        """How many of the next bytes can be written from where they are; 0 when they have to be copied."""
        if not self._rest or self._rest[0].is_cuda or self._rest[0].data_ptr() % BLOCK_BYTES:
            return 0
        whole_bytes = self._rest[0].nbytes - self._rest[0].nbytes % BLOCK_BYTES
        return min(whole_bytes, DIRECT_BYTES)

    def _next(self, most_bytes: int) -> Tensor:
        """Take the next bytes of one tensor, at most so many."""
        flat = self._rest.popleft()
        if flat.nbytes > most_bytes:
            self._rest.appendleft(flat[most_bytes:])
            flat = flat[:most_bytes]
        self.left_bytes -= flat.nbytes
        return flat

    def copy_rest(self) -> None:
        """Hold copies on the host of what is left, so that the tensors may change."""
        self._rest = deque(torch.empty(flat.shape, dtype=flat.dtype).copy_(flat) for flat in self._rest)


class SequentialFile:
    """A file written from its beginning to its end, past the page cache where the file system allows it."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.crc32 = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems refuse only after they have made it
            self._fd = os.open(path, flags, 0o666)
        try:
            os.posix_fallocate(self._fd, 0, size_bytes)  # a full disk is found now
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                self.close()
                raise

    def write(self, piece: memoryview, used: int) -> None:
        """Append the first `used` bytes of `piece`; all but the last are whole blocks, and that is written as some."""
        self.crc32 = isal_zlib.crc32(piece[:used], self.crc32)
        end = used + -used % BLOCK_BYTES  # what is too much is cut off in `finish`
        done = 0
        while done < end:
            try:
                done += os.write(self._fd, piece[done:end])
            except OSError as error:
                flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                    raise
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)  # stricter alignment than ours

    def finish(self) -> None:
        """Make it durable, with exactly the bytes it should have."""
        os.ftruncate(self._fd, self.size_bytes)
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class Write:
    """One checkpoint on its way to disk: `ckpt-N.partial`, which becomes `ckpt-N` once everything in it is durable.

    The directory is locked until then, so that nobody takes it for the leftover of a dead process.
    """

    def __init__(self, path: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, object]) -> None:
        """Begin. `path` is the final one. Raises ValueError when `meta` is not JSON."""
        self.path, self.step = path, step
        self.failure: BaseException | None = None
        self._meta = json.dumps(meta, allow_nan=False)  # now, because it may change
        head, ordered = safetensors_file.layout(tensors)
        device = next((tensor.device for tensor in ordered if tensor.is_cuda), torch.device("cpu"))
        self._source = Source([head, *ordered], device)
        self.size_bytes = self._source.left_bytes
        self._pinned = device.type == "cuda"
        self._partial = path.with_name(f"{path.name}.partial")
        self._lock = threading.RLock()  # whoever holds it writes the next piece
        self._file: SequentialFile | None = None
        self._locked_fd = -1

    def run(self, in_background: bool) -> None:
        """Write everything and give it its name. What goes wrong is left in `failure`, and nothing on disk."""
        if in_background:
            _be_nice()
        while self._write_piece():
            pass
        try:
            if self.failure is None:
                self._commit()
        except Exception as error:
            self.failure = error
        finally:
            self._close()

    def release(self) -> None:
        """Let the tensors change: help writing for a moment, then copy what is left, or write on where that won't fit.

        Failures are the writer's, not the caller's.
        """
        copy_at_s = time.monotonic() + PATIENCE_S
        with self._lock:  # the thread waits: taking turns would cost more than it saves
            while self._write_piece():
                if time.monotonic() < copy_at_s:
                    continue
                with contextlib.suppress(RuntimeError):  # PyTorch's, when the copy does not fit after all
                    if self._source.left_bytes <= headroom_bytes():
                        self._source.copy_rest()
                        return
                copy_at_s = float("inf")

    def _write_piece(self) -> bool:
        """Write the next piece; False when there is none, or no sense in it."""
        with self._lock:
            if self.failure is not None:
                return False
            try:
                if self._file is None:
                    self._open()
                    self._file = SequentialFile(self._partial / STATE, self.size_bytes)
                piece, used = self._source.take(self._piece)
                if used:
                    self._file.write(piece.numpy().data, used)
            except BaseException as error:  # an interrupt leaves a hole
                self.failure = error
                if not isinstance(error, Exception):
                    raise
            return self.failure is None and self._source.left_bytes > 0

    def _open(self) -> None:
        """Make the directory and lock it."""
        discard_if_dead(self._partial)  # the same step, by a process that was killed
        self._partial.mkdir(parents=True)
        self._locked_fd = os.open(self._partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # where directories cannot be locked, leftovers stay
            fcntl.flock(self._locked_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mapped = mmap.mmap(-1, PIECE_BYTES)
        piece = torch.frombuffer(mapped, dtype=torch.uint8)
        self._piece = piece.pin_memory() if self._pinned else piece

    def _commit(self) -> None:
        """Manifest last, then the name."""
        file = cast(SequentialFile, self._file)
        file.finish()
        entry = {"bytes": file.size_bytes, "crc32": f"{file.crc32:08x}"}
        _write_durably(self._partial / MANIFEST, manifest(self.step, {STATE: entry}, self._meta))
        os.fsync(self._locked_fd)
        if self.path.exists():  # of a course this run has left by resuming from an earlier step, or damaged
            discard(self.path)
        self._partial.rename(self.path)
        sync_directory(self.path.parent)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._locked_fd >= 0:
            if self.failure is not None:
                shutil.rmtree(self._partial, ignore_errors=True)
            os.close(self._locked_fd)


def manifest(step: int, files: Mapping[str, object], meta: str) -> bytes:
    """A manifest's text. Its last line holds the CRC-32 of all the bytes before that line."""
    text = (
        f'{{\n"format": "gpusup checkpoint",\n"version": {VERSION},\n"step": {step},\n'
        f'"files": {json.dumps(files)},\n"meta": {meta},\n'
    ).encode()
    return text + f'"crc32": "{isal_zlib.crc32(text):08x}"}}\n'.encode()


def discard(path: Path) -> None:
    """Delete a checkpoint: its manifest first, so that it is none from then on."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def discard_if_dead(partial: Path) -> None:
    """Delete an unfinished checkpoint unless the process that writes it is alive."""
    try:
        fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(partial, ignore_errors=True)
    except OSError:
        pass  # locked by its writer, or locks are not known here
    finally:
        os.close(fd)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flat(tensor: Tensor) -> Tensor:
    """A tensor's bytes: its own memory when it is large, a copy on the host when it is small or scattered."""
    if tensor.nbytes <= SMALL_BYTES:
        tensor = tensor.detach().to("cpu", copy=True)
    return safetensors_file.bytes_of(tensor.contiguous())


def _be_nice() -> None:
    """Let training come first, but not so that a busy machine keeps the checkpoint from ever being finished."""
    with contextlib.suppress(OSError):  # a container may forbid it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
