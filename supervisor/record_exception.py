"""Writes down the exception that ends a Python process, for the supervisor. Loaded only when that happens.

It reads what is there already: no call that could wait, raise or initialise CUDA, and nothing is printed.
"""

import json
import linecache
import os
import sys
from types import TracebackType
from typing import Any

FRAMES = 60  # the innermost; a recursion is told by its end
MESSAGE_CHARS = 4000
SOURCE_CHARS = 200
STATISTICS = (
    "allocated_bytes.all.current",
    "allocated_bytes.all.peak",
    "reserved_bytes.all.current",
    "num_alloc_retries",
    "num_ooms",
)


def write(path: str, kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Append one line of JSON to `path`: docs/trainer-protocol.md says what is in it."""
    content = {
        "pid": os.getpid(),
        "rank": _rank(),
        "type": f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ != "builtins" else kind.__qualname__,
        "message": str(value)[:MESSAGE_CHARS].encode("utf-8", "replace").decode(),
        "frames": _frames(trace)[-FRAMES:],
        "allocator": _allocator(),
    }
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, json.dumps(content).encode() + b"\n")
    finally:
        os.close(fd)


def _frames(trace: TracebackType | None) -> list[tuple[str, str, str]]:
    """(file, function, source line), outermost first."""
    found = []
    while trace is not None:
        code = trace.tb_frame.f_code
        source = linecache.getline(code.co_filename, trace.tb_lineno, trace.tb_frame.f_globals).strip()
        found.append((code.co_filename, code.co_name, source[:SOURCE_CHARS]))
        trace = trace.tb_next
    return found


def _rank() -> int | None:
    """Of a rank; what a rank starts inherits its number, and is none."""
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as parent:
            if any(entry.startswith((b"RANK=", b"LOCAL_RANK=")) for entry in parent.read().split(b"\0")):
                return None
    except OSError:
        pass
    text = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or ""
    return int(text) if text.isdigit() else None


def _allocator() -> dict[str, int]:
    """PyTorch's own statistics of the current device, if it uses CUDA: counted on the host, so nothing is asked."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    statistics = torch.cuda.memory_stats()
    return {name: int(statistics[name]) for name in STATISTICS if name in statistics}
