"""GPU memory through NVML. Initialised only when asked, never creates a CUDA context; what NVML cannot say is None."""

import os
from pathlib import Path
from types import ModuleType

from msgspec import Struct

DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu")
"""Linux, WSL2, Jetson: without one of these there is no driver to ask, and loading NVML would only take time."""


class Gpu(Struct, frozen=True, kw_only=True):
    """A device by UUID; integer indices mean different devices to NVML and to CUDA."""

    uuid: str
    name: str
    total_bytes: int


class GpuMemory(Struct, frozen=True, kw_only=True):
    used_bytes: int
    free_bytes: int


class Nvml:
    """NVML in this process. All failures read as "could not observe"."""

    def __init__(self) -> None:
        self._nvml: ModuleType | None = None
        if not any(Path(device).exists() for device in DEVICES):
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
        except Exception:  # no driver, no library, a library of another version: there is no GPU to watch
            self._nvml = None

    def gpus(self) -> list[Gpu]:
        """The devices this process may see, `CUDA_VISIBLE_DEVICES` respected, in its order."""
        if self._nvml is None:
            return []
        found = []
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError:
            return []
        for index in range(count):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                total = self._nvml.nvmlDeviceGetMemoryInfo(handle).total
                name, uuid = _text(self._nvml.nvmlDeviceGetName(handle)), _text(self._nvml.nvmlDeviceGetUUID(handle))
                found.append(Gpu(uuid=uuid, name=name, total_bytes=total))
            except self._nvml.NVMLError:
                continue
        return _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def memory(self, uuid: str) -> GpuMemory | None:
        if self._nvml is None:
            return None
        try:
            info = self._nvml.nvmlDeviceGetMemoryInfo(self._nvml.nvmlDeviceGetHandleByUUID(uuid))
        except self._nvml.NVMLError:
            return None
        return GpuMemory(used_bytes=int(info.used), free_bytes=int(info.free))

    def process_bytes(self, uuid: str) -> dict[int, int] | None:
        """Memory per process on the device. Expensive: at a start and after a failure, never in the loop."""
        if self._nvml is None:
            return None
        try:
            handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._nvml.NVMLError:
            return None
        if any(p.usedGpuMemory is None for p in processes):
            return None  # WSL2 and Windows: not observable
        return {p.pid: int(p.usedGpuMemory) for p in processes}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _visible(gpus: list[Gpu], wanted: str | None) -> list[Gpu]:
    if wanted is None:
        return gpus
    chosen = []
    for entry in wanted.split(","):
        entry = entry.strip()
        if entry.isdigit() and int(entry) < len(gpus):
            chosen.append(gpus[int(entry)])
        elif match := [gpu for gpu in gpus if entry and gpu.uuid.startswith(entry)]:
            chosen.append(match[0])
        else:
            break  # CUDA hides everything after an invalid entry
    return chosen
