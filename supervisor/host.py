"""Facts about this machine and a process on it, from /proc. What cannot be observed is None, never zero."""

import os
from pathlib import Path


def resident_bytes(pid: int) -> int | None:
    return resident_and_peak_bytes(pid)[0]


def resident_and_peak_bytes(pid: int) -> tuple[int | None, int | None]:
    """Of the process's resident memory, what it is and its high-water mark (VmHWM), which the kernel keeps: it is not
    sampled. One read for both, because it is made ten times a second."""
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None, None
    try:
        status = os.read(fd, 8192)
    except OSError:
        return None, None
    finally:
        os.close(fd)
    return _kilobytes(status, b"VmRSS:"), _kilobytes(status, b"VmHWM:")


def _kilobytes(status: bytes, key: bytes) -> int | None:
    at = status.find(key)
    return None if at < 0 else int(status[at + len(key) :].split(None, 1)[0]) * 1024


def data_limit_bytes(pid: int) -> int | None:
    """The soft RLIMIT_DATA in force for the process; None when unlimited or not observable."""
    try:
        with Path(f"/proc/{pid}/limits").open() as f:
            line = next(line for line in f if line.startswith("Max data size"))
    except (OSError, StopIteration):
        return None
    soft = line.split()[3]
    return int(soft) if soft.isdigit() else None


def oom_kills() -> int | None:
    """How often the kernel has killed for memory in our cgroup; else on the whole host, which is weaker evidence."""
    for path in (*_cgroup_event_files(), Path("/proc/vmstat")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.strip().isdigit():
                return int(value)
    return None


def _cgroup_event_files() -> list[Path]:
    """v2 `memory.events` or v1 `memory.oom_control` of our own cgroup."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files.append(Path(f"/sys/fs/cgroup{path}/memory.events"))
        elif "memory" in controllers.split(","):
            files.append(Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
    return files


def process_name(pid: int) -> str:
    """What a person would call the process; its number when it cannot be asked."""
    import psutil  # needed only when a stranger holds the GPU

    try:
        return f"{psutil.Process(pid).name()} (process {pid})"
    except psutil.Error:
        return f"process {pid}"
