"""How much more host memory this process may take: the smallest of what the machine and every limit leave."""

import resource
from pathlib import Path

MARGIN_BYTES = 256 << 20  # for whatever else happens on the machine meanwhile
CGROUP = Path("/sys/fs/cgroup")


def headroom_bytes() -> int:
    """Bytes that can be allocated now without taking what this process needs again at its known peak.

    A margin is kept. Zero or less means nothing can.
    """
    own = _kilobytes("/proc/self/status")
    returns = max(own["VmHWM"] - own["VmRSS"], own["VmPeak"] - own["VmSize"])  # between steps a trainer needs less
    left = [_kilobytes("/proc/meminfo")["MemAvailable"], *_cgroup_left()]
    for limit, used in ((resource.RLIMIT_DATA, own["VmData"]), (resource.RLIMIT_AS, own["VmSize"])):
        soft_bytes, _ = resource.getrlimit(limit)
        if soft_bytes != resource.RLIM_INFINITY:
            left.append(soft_bytes - used)
    return min(left) - returns - MARGIN_BYTES


def _kilobytes(path: str) -> dict[str, int]:
    """Every `Name: 123 kB` of a file in /proc, in bytes."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}


def _cgroup_left() -> list[int]:
    """What each control group (version 2) around this process leaves of its limit; page cache can be given back."""
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line[3:].strip("/") for line in groups if line.startswith("0::")), None)
    if own is None:
        return []
    left = []
    for folder in (CGROUP / own, *(CGROUP / own).parents):
        try:
            limit, used_bytes = (
                (folder / "memory.max").read_text().strip(),
                int((folder / "memory.current").read_text()),
            )
            cache = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue  # the root has no limit; a container may not see its own
        if limit != "max":
            left.append(int(limit) - used_bytes + int(cache.get("inactive_file", 0)))
    return left
