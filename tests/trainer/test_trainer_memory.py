"""On a CPU, memory that is freed serves the next step instead of going back to the kernel."""

import subprocess
import sys

from gpusup.trainer.allocator import keep_freed_memory

SCRIPT = """
import resource, sys
import torch
from gpusup.trainer.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory({})
for step in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 << 20, dtype=torch.uint8)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[str, int]:
    """Whether it was set, and the page faults of allocating 40 MiB once more."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True, timeout=60)
    kept, count = done.stdout.split()
    return kept, int(count)


def test_kernel_is_not_asked_again_when_freed_memory_is_kept() -> None:
    kept, few = faults("keep")
    assert kept == "True"
    assert faults("leave")[1] > 10 * (few + 1)


def test_nothing_is_set_when_the_user_has_chosen() -> None:
    """A supervisor's memory limit relies on freed tensors leaving."""
    assert not keep_freed_memory({"MALLOC_MMAP_THRESHOLD_": "1048576"})
