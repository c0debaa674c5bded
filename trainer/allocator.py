"""PyTorch's CUDA allocator: which way of getting memory from the driver suits this machine."""

import os
from collections.abc import MutableMapping
from pathlib import Path

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the older name first: every version reads it
# Kernels on which expandable segments fail at the first allocation (WSL2) or are not supported (Jetson boards).
UNFIT_KERNELS = ("microsoft", "tegra")


def use_expandable_segments(
    environment: MutableMapping[str, str] = os.environ, kernel: Path = Path("/proc/sys/kernel/osrelease")
) -> bool:
    """Let segments grow, so that memory freed in one size serves another; whether that is now in force.

    Call it before CUDA is initialised. It leaves alone what the user has set, and machines not known to bear it.
    """
    if any(name in environment for name in VARIABLES):
        return False
    try:
        release = kernel.read_text().lower()
    except OSError:  # not Linux
        return False
    if any(name in release for name in UNFIT_KERNELS):
        return False
    environment[VARIABLES[0]] = "expandable_segments:True"
    return True
