"""Following a growing file by offset: what was appended since the last look. (Network file systems lack inotify.)"""

import os
from pathlib import Path

MAX_LINE_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20


class Tail:
    """Reads `path` from `offset` on. The file may not exist yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset
        self._fd: int | None = None

    def read(self) -> bytes:
        """What is new, at most `CHUNK_BYTES`; empty when there is nothing."""
        if self._fd is None:
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return b""
        data = os.pread(self._fd, CHUNK_BYTES, self.offset)
        self.offset += len(data)
        return data

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class LineTail(Tail):
    """As `Tail`, in whole lines, ended by a newline or a carriage return (a progress bar)."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        super().__init__(path, offset)
        self._partial = b""

    def lines(self, data: bytes, final: bool = False) -> list[bytes]:
        """The lines completed by `data`; the rest is kept for later, or given out when `final`."""
        pieces = (self._partial + data).replace(b"\r", b"\n").split(b"\n")
        self._partial = pieces.pop()
        if final or len(self._partial) > MAX_LINE_BYTES:
            pieces.append(self._partial)
            self._partial = b""
        return [piece for piece in pieces if piece]


def last_bytes(path: Path, count: int) -> bytes:
    """The last `count` bytes of a file, or all of it."""
    try:
        with path.open("rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - count))
            return f.read()
    except FileNotFoundError:
        return b""
