"""The end of a log of any size: as far back as what ended the run can stand, in bounded memory.

What a progress bar overwrote is left out, so that a bar of hours does not push the traceback out of sight. Where the
last megabyte tells nothing of a failure, the log is searched backwards for one.
"""

import os
from collections import deque
from pathlib import Path

CHUNK_BYTES = 1 << 20
TAIL_BYTES = 1 << 20  # of what is left after squeezing
WINDOW_BYTES = 128 << 10  # around a failure that stands before the tail
OVERLAP_BYTES = 256  # between chunks, so that no word is cut in two unseen
WIDE_HEADS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16

TELLING = (b"Traceback (m", b"ut of memory", b"MemoryError", b"illed", b"OutOfMem", b"ALLOC_FAILED", b"bad_alloc")
"""Some part of every report of an end. Few and rare, because a healthy log is searched for each of them."""


def read_ending(path: Path) -> bytes:
    """What `clean_lines` is to be given. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if _is_wide(os.pread(file.fileno(), 4096, 0)):
            begin = max(0, size - 4 * TAIL_BYTES) & ~1  # never in mid-character
            return os.pread(file.fileno(), size - begin, begin)
        begin, tail = _tail(file.fileno(), size)
        if any(word in tail for word in TELLING):
            return tail
        found = _search_back(file.fileno(), begin)
        if found is None:
            return tail
        first = max(0, found - WINDOW_BYTES // 2)
        window = os.pread(file.fileno(), min(WINDOW_BYTES, begin - first), first)
        return squeeze(window) + b"\n" + tail


def squeeze(data: bytes) -> bytes:
    """Without what was overwritten on its line, and without the start of lines that are absurdly long."""
    if b"\r" not in data:
        return data
    return b"\n".join(_last_state(line) for line in data.split(b"\n"))


def _last_state(line: bytes) -> bytes:
    if b"\r" not in line:
        return line
    states = [state for state in line.split(b"\r") if state.strip()]
    return states[-1] if states else b""


def _tail(fd: int, size: int) -> tuple[int, bytes]:
    """Where it begins, and the last TAIL_BYTES of the squeezed log, or a little more."""
    kept: deque[bytes] = deque()
    kept_bytes, end, carry = 0, size, b""
    while end > 0 and kept_bytes < TAIL_BYTES:
        begin = max(0, end - CHUNK_BYTES)
        data = os.pread(fd, end - begin, begin) + carry
        cut = data.find(b"\n") + 1 if begin else 0
        # The first line goes on in the chunk before; one without an end is kept as its last state.
        carry, whole = (data[:cut], data[cut:]) if cut else (b"", data)
        if len(carry) > CHUNK_BYTES:
            carry = carry[-CHUNK_BYTES:]
        kept.appendleft(squeeze(whole))
        kept_bytes += len(kept[0])
        end = begin
    kept.appendleft(squeeze(carry))
    return end, b"".join(kept)


def _search_back(fd: int, end: int) -> int | None:
    """The offset of the last telling word before `end`."""
    while end > 0:
        begin = max(0, end - CHUNK_BYTES)
        data = os.pread(fd, end - begin + OVERLAP_BYTES, begin)
        last = max(data.rfind(word) for word in TELLING)
        if last >= 0:
            return begin + last
        end = begin
    return None


def _is_wide(head: bytes) -> bool:
    """UTF-16, as PowerShell 5 redirects."""
    return head[:2] in WIDE_HEADS or (len(head) >= 8 and head.count(0) * 10 >= len(head) * 3)
