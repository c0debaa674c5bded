"""The environment an attempt runs in: the person's own, and what docs/trainer-protocol.md promises."""

import os
from pathlib import Path

from .core.events import RunCreated
from .reports import PROTOCOL
from .run_store import RunDirectory

BOOT = Path(__file__).parent / "boot"


def environment(run: RunCreated, directory: RunDirectory, attempt: int) -> dict[str, str]:
    """Handed to the trainer through the shim's own environment; never written to a file."""
    folder = directory.attempt(attempt)
    added = {
        "GPUSUP_RUN_ID": run.run_id,
        "GPUSUP_ATTEMPT": str(attempt),
        "GPUSUP_EVENTS": str(folder / "events.jsonl"),
        "GPUSUP_PROTOCOL": str(PROTOCOL),
        "GPUSUP_EXCEPTIONS": str(folder / "exceptions.jsonl"),
        "PYTHONUNBUFFERED": "1",
    }
    inherited = dict(os.environ)
    inherited.pop("CUDA_VISIBLE_DEVICES", None)
    if run.cuda_visible_devices is not None:
        inherited["CUDA_VISIBLE_DEVICES"] = run.cuda_visible_devices
    inherited.setdefault("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
    # A cache of our own makes giving compile back cheap, and survives a reboot, unlike /tmp.
    inherited.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory.compile_cache))
    if run.gpu_uuid is not None and run.trains_on == "gpu":
        # NVML counts devices by bus; CUDA would count the fastest first, and the wrong one would be watched.
        inherited.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if run.memory_budget_bytes:
        added["GPUSUP_MEMORY_BUDGET"] = f"{run.budget_where}:{run.memory_budget_bytes}"
        # Freed tensors go back to the kernel at once, so that the limit does not depend on what was freed before.
        inherited.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
        added["GPUSUP_BUDGET_REPORT"] = str(folder / "budget.jsonl")
    search = [str(BOOT), inherited["PYTHONPATH"]] if inherited.get("PYTHONPATH") else [str(BOOT)]
    added["PYTHONPATH"] = os.pathsep.join(search)
    return {**inherited, **added}
