"""Checkpoints: verified without torch, copied when the trainer rewrites its only one in place.

A `torch.save` file is a zip; a torn one has no central directory, a damaged one fails its CRCs. nanoGPT's step is read
from the pickle's opcodes, which executes nothing. A directory is what its manifest says (docs/checkpoint-format.md).
"""

import fcntl
import json
import os
import queue
import re
import threading
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from .journal import sync_directory

if TYPE_CHECKING:
    from zipfile import ZipFile

FICLONE = 0x40049409
COPIES_KEPT = 2
REST_S = 0.3
"""A file that has not changed for so long is worth copying; the copy is verified all the same."""
MAX_PICKLE_BYTES = 64 << 20
INTEGERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4")
MEMO = ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT")
NAME = re.compile(r"ckpt-(\d+)(?:\.pt)?")
MANIFEST = "manifest.json"
FORMAT, VERSION = "gpusup checkpoint", 1
PIECE_BYTES = 1 << 20


class Checked(Struct, frozen=True, kw_only=True):
    """A checkpoint, a file or a directory, as found. `problem` is empty when it is whole."""

    path: Path
    step: int | None = None
    bytes: int = 0
    problem: str = ""


def check(path: Path) -> Checked:
    """Read all of it: every checksum, and the step it was saved at."""
    try:
        return _check_directory(path) if path.is_dir() else _check_zip(path)
    except FileNotFoundError as error:
        missing = Path(error.filename or path)
        return Checked(path=path, problem="it does not exist" if missing == path else f"its {missing.name} is missing")
    except Exception as error:  # whatever damage makes of the readers of a zip, a pickle or a manifest
        return Checked(path=path, problem=f"it is torn or damaged ({error})")


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of the latest step in `folder`; where none is whole, the latest, so that it can be told."""
    named = [(int(match[1]), path) for path in folder.glob("ckpt-*") if (match := NAME.fullmatch(path.name))]
    complete = [path for _, path in sorted(named, reverse=True) if path.is_file() or (path / MANIFEST).exists()]
    return next((path for path in complete if not check(path).problem), complete[0] if complete else None)


def _check_directory(path: Path) -> Checked:
    content = (path / MANIFEST).read_bytes()
    manifest = json.loads(content)
    signed = content[: content.rindex(b'"crc32": ')]
    if int(manifest["crc32"], 16) != zlib.crc32(signed):
        return Checked(path=path, problem=f"{MANIFEST} inside it is damaged")
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
        return Checked(
            path=path, problem=f"it is of a format unknown here ({manifest['format']} {manifest['version']})"
        )
    total_bytes = 0
    for name, expected in manifest["files"].items():
        if (size_bytes := (path / name).stat().st_size) != expected["bytes"]:
            return Checked(path=path, problem=f"{name} inside it has {size_bytes} bytes, not {expected['bytes']}")
        if _crc32(path / name) != int(expected["crc32"], 16):
            return Checked(path=path, problem=f"{name} inside it is damaged")
        if name.endswith(".safetensors"):
            _check_safetensors(path / name, size_bytes)
        total_bytes += size_bytes
    return Checked(path=path, step=int(manifest["step"]), bytes=total_bytes)


def _crc32(path: Path) -> int:
    found, piece = 0, memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            found = zlib.crc32(piece[:count], found)
    return found


def _check_safetensors(path: Path, size_bytes: int) -> None:
    """Raise ValueError when the header's tensors are not what follows it, whoever wrote the manifest."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > size_bytes - 8:
            raise ValueError(f"the header of {path.name} is longer than the file")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
    spans = sorted(tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
    end = 0
    for begin, next_end in spans:
        if begin != end or next_end < begin:
            raise ValueError(f"the tensors of {path.name} overlap or leave gaps")
        end = next_end
    if 8 + header_bytes + end != size_bytes:
        raise ValueError(f"the tensors of {path.name} do not fill it")


def _check_zip(path: Path) -> Checked:
    import zipfile  # not needed before there is a checkpoint

    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            return Checked(path=path, problem=f"{damaged} inside it is damaged")
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            return Checked(path=path, problem="its contents are missing")
        step = _step_in_name(path)
        return Checked(path=path, step=_step_in_pickle(archive) if step is None else step, bytes=size)


def _step_in_name(path: Path) -> int | None:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match and path.suffix else None


def _step_in_pickle(archive: "ZipFile") -> int | None:
    """The integer that follows the key `iter_num`."""
    import pickletools

    entry = next((e for e in archive.infolist() if e.filename.endswith("/data.pkl")), None)
    if entry is None or entry.file_size > MAX_PICKLE_BYTES:
        return None
    key_seen = False
    for opcode, value, _ in pickletools.genops(archive.read(entry)):
        if key_seen and isinstance(value, int) and opcode.name in INTEGERS:
            return value
        if opcode.name not in MEMO:
            key_seen = value == "iter_num"
    return None


def copy_file(source: Path, target: Path) -> None:
    """A durable copy under `target`'s final name; shares the blocks where the file system can (reflink)."""
    temporary = target.with_name(f".{target.name}.part")
    with source.open("rb") as reading, temporary.open("wb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), FICLONE, reading.fileno())
        except OSError:
            while chunk := reading.read(1 << 20):
                writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())
    temporary.rename(target)
    sync_directory(target.parent)


def keep(source: Path, folder: Path) -> Checked:
    """A verified copy of `source` in `folder`, named for its step; of our copies the newest `COPIES_KEPT` stay."""
    incoming = folder / "incoming.pt"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        copy_file(source, incoming)
    except OSError as error:
        return Checked(path=source, problem=f"it could not be copied ({error.strerror})")
    checked = check(incoming)
    if checked.problem or checked.step is None:
        return Checked(path=source, problem=checked.problem or "its step is not recorded in it")
    target = folder / f"ckpt-{checked.step:08d}.pt"
    incoming.rename(target)
    for old in sorted(folder.glob("ckpt-*.pt"))[:-COPIES_KEPT]:
        if old != target:
            old.unlink()  # gpusup's own copies, never the trainer's file
    return Checked(path=target, step=checked.step, bytes=checked.bytes)


class Keeper:
    """Keeps verified copies of one file that a trainer rewrites in place.

    `poll` notices that the file has changed and come to rest, and copies it in a thread; `finish` settles what is left
    once the trainer is gone. A hard link would not do: the trainer rewrites the same inode.
    """

    def __init__(self, source: Path, folder: Path, not_before: float) -> None:
        """Args: `not_before`: epoch seconds; an older file is another run's and is left alone."""
        self.source = source
        self.folder = folder
        self._not_before = not_before
        self._seen: tuple[int, int] | None = None
        self._seen_at = 0.0
        self._handled: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._done: queue.SimpleQueue[Checked] = queue.SimpleQueue()

    def poll(self) -> list[Checked]:
        """Copies completed since the last call. Cheap; call it often."""
        version, now = self._version(), time.monotonic()
        if version != self._seen:
            self._seen, self._seen_at = version, now
        resting = version is not None and version != self._handled and now - self._seen_at >= REST_S
        if resting and (self._thread is None or not self._thread.is_alive()):
            self._handled = version
            self._thread = threading.Thread(target=self._keep, daemon=True)
            self._thread.start()
        return self._collected()

    def finish(self) -> list[Checked]:
        """As `poll`, when nobody writes any more: waits for the copy under way and takes the newest version."""
        if self._thread is not None:
            self._thread.join()
        version = self._version()
        if version is not None and version != self._handled:
            self._handled = version
            self._keep()
        return self._collected()

    def _version(self) -> tuple[int, int] | None:
        try:
            status = self.source.stat()
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_size) if status.st_mtime >= self._not_before else None

    def _keep(self) -> None:
        kept = keep(self.source, self.folder)
        self._done.put(kept)
        if kept.problem:  # without a copy the trainer's own file is still better than to start from zero
            theirs = check(self.source)
            if not theirs.problem and theirs.step is not None:
                self._done.put(theirs)

    def _collected(self) -> list[Checked]:
        found = []
        while not self._done.empty():
            found.append(self._done.get())
        return found


def place_for_resume(copy: Path, target: Path, aside: str) -> str:
    """Make `target` the same checkpoint as our verified `copy`, for a trainer that resumes from one fixed name.

    A whole file of the same step is left as it is. Otherwise the trainer's file is renamed, never deleted.
    Returns what was done, for the person; empty when nothing was.
    """
    wanted, found = check(copy), check(target)
    if not found.problem and found.step == wanted.step:
        return ""
    done = f"{target.name} put back from gpusup's verified copy of step {wanted.step}"
    if target.exists():
        moved, number = target.with_name(f"{target.name}.{aside}"), 2
        while moved.exists():  # of an earlier run in the same folder
            moved, number = target.with_name(f"{target.name}.{aside}.{number}"), number + 1
        target.rename(moved)
        done += f" (it {found.problem.removeprefix('it ') or f'was of step {found.step}'}; kept as {moved.name})"
    copy_file(copy, target)
    return done
