"""The journal of a run: one JSON object per line, one writer, append only.

Facts that matter are fsynced before anything is done about them. A torn last line is dropped (and cut off before the
next append); any other damage is a `JournalError` that names the line.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec.structs import replace

from .core.events import JOURNAL_VERSION, AnyEvent, Note, PeakMeasured, Progress
from .errors import GpusupError, JournalError, RunLocked

_ENCODER = msgspec.json.Encoder()
_DECODER: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)

NOT_SYNCED = (Progress, PeakMeasured, Note)
"""Losing the last of these to a power cut loses nothing that a decision rests on."""


def read(path: Path) -> list[AnyEvent]:
    """Every event in the journal at `path`; without the last line if that is torn.

    Raises:
        JournalError: a line before the last is damaged, a sequence number is missing, or a newer version wrote it.
    """
    return [event for event, _ in _events(path)]


def _events(path: Path) -> Iterator[tuple[AnyEvent, int]]:
    """Events with the offset at which each one's line ends."""
    data = path.read_bytes()
    offset, number = 0, 0
    while offset < len(data):
        end = data.find(b"\n", offset)
        if end < 0:
            return
        number += 1
        line, last = data[offset:end], end == len(data) - 1
        offset = end + 1
        try:
            event = _DECODER.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if last and not isinstance(error, msgspec.ValidationError):
                return
            raise JournalError(_damage(path, number, line, error)) from None
        if event.seq != number:
            raise JournalError(
                f"{path}:{number}: expected event {number} and found {event.seq}; the journal is damaged"
            )
        yield event, offset


def _damage(path: Path, number: int, line: bytes, error: Exception) -> str:
    try:
        version = msgspec.json.decode(line).get("v", 0)
    except (msgspec.DecodeError, AttributeError):
        return f"{path}:{number}: this line is damaged ({error}); the journal cannot be trusted"
    if isinstance(version, int) and version > JOURNAL_VERSION:
        return f"{path}:{number}: written by a newer gpusup (journal version {version}); upgrade gpusup to read it"
    return f"{path}:{number}: not an event this version knows ({error}); it may be written by a newer gpusup"


def utc_now() -> str:
    """Wall-clock time for people; decisions use the monotonic clock."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Journal:
    """The writer. Holds the run's lock for as long as it lives, so there is never a second one."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal at `path`.

        Raises:
            RunLocked: another supervisor holds it.
            JournalError: it is damaged.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise RunLocked(
                f"another gpusup supervises this run ({path.parent.name}); `gpusup log -f` follows it"
            ) from None
        self.events: list[AnyEvent] = []
        end = 0
        for event, end_of_line in _events(path):
            self.events.append(event)
            end = end_of_line
        os.ftruncate(self._fd, end)
        self._seq = len(self.events)
        sync_directory(path.parent)

    def append(self, event: AnyEvent) -> AnyEvent:
        """Write `event`, stamped; durable on return unless it is one of `NOT_SYNCED`.

        Raises:
            GpusupError: it could not be written (a full disk, say); the journal is left as it was.
        """
        stamped: AnyEvent = replace(event, seq=self._seq + 1, at=utc_now(), mono=round(time.monotonic(), 3))
        self._write(_ENCODER.encode(stamped) + b"\n")
        if not isinstance(stamped, NOT_SYNCED):
            os.fdatasync(self._fd)
        self._seq += 1
        return stamped

    def _write(self, line: bytes) -> None:
        end = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            while written < len(line):  # the disk is nearly full: the next write says so, or goes on
                written += os.write(self._fd, line[written:])
        except OSError as error:
            os.ftruncate(self._fd, end)
            raise GpusupError(
                f"{self.path}: the journal cannot be written ({error.strerror}); the trainer, if any, goes on. "
                f"`gpusup resume {self.path.parent.name}` takes over once that is mended"
            ) from None

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)


def sync_directory(path: Path) -> None:
    """Make names created in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a supervisor holds the journal at `path` now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
