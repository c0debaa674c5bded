"""Where memory comes from: which way of getting it suits this machine."""

import ctypes
import os
from collections.abc import MutableMapping
from pathlib import Path

import torch
from torch import Tensor

PAGE_BYTES = 4096

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


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let glibc keep what is freed for the next allocation; whether it now does. For training on a CPU.

    Otherwise the activations of every step go back to the kernel, which clears them again page by page for the next.
    It leaves alone what the user has set, such as a supervisor's memory limit, and other C libraries.
    """
    if any(name.startswith("MALLOC_") for name in environment):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*option) for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)))


def empty_at_page(like: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape, kind and device; on a CPU it begins at a page of memory.

    From there a checkpoint can be written to the disk without a copy.
    """
    if like.device.type != "cpu":
        return torch.empty_like(like)
    memory = torch.empty(like.nbytes + PAGE_BYTES, dtype=torch.uint8)
    begin = -memory.data_ptr() % PAGE_BYTES
    return memory[begin : begin + like.nbytes].view(like.dtype).view(like.shape)
