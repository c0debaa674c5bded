"""Run a script under a limit on the memory it may allocate: `python limited.py BUDGET_MB SCRIPT [ARGUMENT ...]`.

The budget counts from after PyTorch is imported and its threads run, so it is the same on every machine. Beyond it the
kernel refuses memory, and PyTorch's own allocator raises its own error: a small card, on the host.
"""

import resource
import runpy
import sys
from pathlib import Path

import torch


def allocated_kb() -> int:
    """Private writable memory of this process, which is what RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmData:")[1].split()[0])


def main() -> None:
    budget_mb, script = int(sys.argv[1]), sys.argv[2]
    weight = torch.ones(256, 256, requires_grad=True)
    (weight @ weight).sum().backward()  # type: ignore[no-untyped-call]  # starts the threads of both passes, each with a stack
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, ((allocated_kb() + budget_mb * 1024) * 1024, hard))
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
