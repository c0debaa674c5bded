"""NVML itself, called where it may block: what it cannot say is None, and what is wrong with a GPU is told apart.

Initialised only when asked, never creates a CUDA context.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from msgspec import Struct

DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu")
"""Linux, WSL2, Jetson: without one of these there is no driver to ask, and loading NVML would only take time."""
SONAME = "libnvidia-ml.so.1"

FULL_SHARE = 0.02  # of the device's memory: less is none
THERMAL_BITS = 0x20 | 0x40  # software and hardware thermal slowdown, of the reasons why clocks are low

Trouble = Literal["lost", "reset_required", "driver_replaced"]
TROUBLES: dict[int, Trouble] = {15: "lost", 16: "reset_required", 18: "driver_replaced"}
"""Return codes after which nothing more can be expected of the GPU, or of NVML in this process. Others, such as 3 (not
supported), 13 (function not found) and 999 (unknown), cost one figure."""


class Gpu(Struct, frozen=True, kw_only=True):
    """A device by UUID; integer indices mean different devices to NVML and to CUDA."""

    uuid: str
    name: str
    total_bytes: int


class GpuMemory(Struct, frozen=True, kw_only=True):
    """`free_bytes` is the headroom: drivers differ in what they count as used."""

    used_bytes: int
    free_bytes: int

    @property
    def is_full(self) -> bool:
        return self.free_bytes < FULL_SHARE * (self.used_bytes + self.free_bytes)


class Vitals(Struct, frozen=True, kw_only=True):
    temperature_c: int | None = None
    power_w: float | None = None
    hot: bool | None = None
    """Whether heat slows it."""


class Library:
    """The calls that are needed."""

    def __init__(self) -> None:
        self._nvml: ModuleType | None = None
        self.driver = ""
        self.trouble: Trouble | None = None
        """The last that was seen; it stays until NVML answers again."""
        self.problem = "no NVIDIA driver on this machine"
        """Why nothing can be observed; empty when NVML answers."""
        if not is_present():
            return
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.trouble = TROUBLES.get(error.value)
            self.problem = f"NVML does not answer: {error}"
            return
        self._nvml, self.problem = pynvml, ""
        self.driver = _text(self._ask("nvmlSystemGetDriverVersion") or "")

    def gpus(self) -> list[Gpu]:
        """The devices this process may see, `CUDA_VISIBLE_DEVICES` respected, in its order."""
        found = []
        for index in range(self._ask("nvmlDeviceGetCount") or 0):
            if gpu := self._gpu(self._ask("nvmlDeviceGetHandleByIndex", index)):
                found.append(gpu)
        return self._visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def memory(self, uuid: str) -> GpuMemory | None:
        """Of the whole device, or of the part of one (MIG) that `uuid` names."""
        handle = self._ask("nvmlDeviceGetHandleByUUID", uuid)
        info = self._ask("nvmlDeviceGetMemoryInfo", handle) if handle is not None else None
        if info is None:
            return None
        self.trouble = None
        return GpuMemory(used_bytes=int(info.used), free_bytes=int(info.free))

    def vitals(self, uuid: str) -> Vitals:
        """Temperature and power, where they are supported."""
        handle = self._ask("nvmlDeviceGetHandleByUUID", uuid)
        if handle is None:
            return Vitals()
        celsius, milliwatts = (
            self._ask("nvmlDeviceGetTemperature", handle, 0),
            self._ask("nvmlDeviceGetPowerUsage", handle),
        )
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return Vitals(
            temperature_c=celsius,
            power_w=None if milliwatts is None else milliwatts / 1000,
            hot=None if reasons is None else bool(reasons & THERMAL_BITS),
        )

    def process_bytes(self, uuid: str) -> dict[int, int] | None:
        """Memory per process on the device. Expensive: at a start and after a failure, never in the loop."""
        handle = self._ask("nvmlDeviceGetHandleByUUID", uuid)
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses", handle) if handle is not None else None
        if processes is None or any(process.usedGpuMemory is None for process in processes):
            return None  # WSL2 and Windows: not observable
        return {process.pid: int(process.usedGpuMemory) for process in processes}

    def _ask(self, function: str, *arguments: Any) -> Any:
        """The answer, or None."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError as error:
            self.trouble = TROUBLES.get(error.value, self.trouble)
            return None

    def _gpu(self, handle: Any) -> Gpu | None:
        if handle is None:
            return None
        memory, uuid = self._ask("nvmlDeviceGetMemoryInfo", handle), self._ask("nvmlDeviceGetUUID", handle)
        if memory is None or uuid is None:
            return None
        name = _text(self._ask("nvmlDeviceGetName", handle) or "GPU")
        return Gpu(uuid=_text(uuid), name=name, total_bytes=int(memory.total))

    def _visible(self, gpus: list[Gpu], wanted: str | None) -> list[Gpu]:
        if wanted is None:
            return gpus
        chosen = []
        for entry in map(str.strip, wanted.split(",")):
            if entry.isdigit() and int(entry) < len(gpus):
                chosen.append(gpus[int(entry)])
            elif match := [gpu for gpu in gpus if entry and gpu.uuid.startswith(entry)]:
                chosen.append(match[0])
            elif entry.startswith("MIG-") and (part := self._gpu(self._ask("nvmlDeviceGetHandleByUUID", entry))):
                chosen.append(part)
            else:
                break  # CUDA hides everything after an invalid entry
        return chosen


def is_present() -> bool:
    """Whether there is a driver to ask, or a library that was put in its place."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    return any(Path(device).exists() for device in DEVICES) or any(
        folder and (Path(folder) / SONAME).exists() for folder in folders
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
