"""Memory once a second, in a thread, to the run's side file: samples are not events.

NVML calls can block on a sick driver, and must not block the loop.
"""

import json
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from . import host
from .gpu import GpuMemory, Nvml, Trouble, Vitals
from .units import format_bytes

EVERY_S = 1.0
KEPT_SAMPLES = 4 * 3600
NOT_A_PROCESS_BYTES = 600 << 20
"""What the driver itself may show as used where memory per process is not available."""


def describe_sample(sample: dict[str, Any]) -> str:
    """A sample in words: `14:03:22, host 3.1 GiB, GPU 11.2 GiB, 71 C, 187 W`."""
    parts = []
    if isinstance(at := sample.get("at"), (int, float)):
        parts.append(time.strftime("%F %T", time.localtime(at)))
    for name, label in (("rss_bytes", "trainer"), ("device_used_bytes", "GPU")):
        if isinstance(size := sample.get(name), int):
            parts.append(f"{label} {format_bytes(size)}")
    for name, unit in (("temperature_c", "C"), ("power_w", "W")):
        if isinstance(value := sample.get(name), (int, float)):
            parts.append(f"{value:.0f} {unit}")
    return ", ".join(parts)


class Sampler:
    """Samples the host and, when a GPU is given, the device. Reads are None where nothing could be observed."""

    def __init__(self, path: Path, gpu_uuid: str | None) -> None:
        self._path, self._uuid = path, gpu_uuid
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._attempt, self._pid = 0, 0
        self._in_use: deque[int] = deque(maxlen=KEPT_SAMPLES)
        self._peak_bytes: int | None = None
        self._full = False
        self._nvml = Nvml() if gpu_uuid is not None else None
        self.held_before: int | None = self.device_used()
        self.trouble: Trouble | None = None
        """What NVML said last of the state of the GPU."""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(EVERY_S + 1)

    def begin(self, attempt: int, pid: int) -> None:
        """From now on the trainer is `pid`."""
        with self._lock:
            self._attempt, self._pid, self._peak_bytes = attempt, pid, None
            self._in_use.clear()

    def end(self) -> None:
        with self._lock:
            self._pid = 0

    def in_use(self) -> list[int]:
        """Memory in use during this attempt, oldest first: the device's where there is one, else the process's."""
        with self._lock:
            return list(self._in_use)

    def look(self) -> None:
        """Ask now whether the GPU is well."""
        if self._nvml is not None and self._uuid is not None:
            self._device()

    def device_used(self) -> int | None:
        memory = self._nvml.memory(self._uuid) if self._nvml is not None and self._uuid is not None else None
        return None if memory is None else memory.used_bytes

    def device_free(self) -> int | None:
        memory = self._nvml.memory(self._uuid) if self._nvml is not None and self._uuid is not None else None
        return None if memory is None else memory.free_bytes

    def device_peak(self) -> int | None:
        """Largest device memory seen in this attempt over what was held before the run (sampled)."""
        with self._lock:
            if self._peak_bytes is None or self.held_before is None:
                return None
            return max(0, self._peak_bytes - self.held_before)

    def device_is_full(self) -> bool:
        """Whether nothing of the device's memory was left at the last sample, and the device was not slowed by heat."""
        with self._lock:
            return self._full

    def holders(self) -> str:
        """Who holds the device's memory, asked when no trainer of ours runs."""
        per_process = (
            self._nvml.process_bytes(self._uuid) if self._nvml is not None and self._uuid is not None else None
        )
        named = [f"{host.process_name(pid)} {format_bytes(held)}" for pid, held in (per_process or {}).items()]
        return ", ".join(named) or "processes that cannot be named here"

    def held_by_others(self) -> int | None:
        """Device memory in other hands, asked when no trainer of ours runs."""
        if self._nvml is None or self._uuid is None:
            return None
        per_process = self._nvml.process_bytes(self._uuid)
        if per_process:  # none at all is also what a container and WSL2 are told
            return sum(per_process.values())
        used = self.device_used()
        return None if used is None else max(0, used - NOT_A_PROCESS_BYTES)

    def _device(self) -> tuple[GpuMemory | None, Vitals]:
        if self._nvml is None or self._uuid is None:
            return None, Vitals()
        memory = self._nvml.memory(self._uuid)
        self.trouble = self._nvml.trouble if memory is None else None
        return memory, self._nvml.vitals(self._uuid)

    def _run(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        while not self._stop.wait(EVERY_S):
            memory, vitals = self._device()
            used = None if memory is None else memory.used_bytes
            with self._lock:
                self._full = memory is not None and not vitals.hot and memory.is_full
                attempt, pid = self._attempt, self._pid
                if used is not None:
                    self._peak_bytes = max(used, self._peak_bytes or 0)
            if not pid:
                continue
            resident = host.resident_bytes(pid)
            in_use = resident if self._uuid is None else used
            if in_use is not None:
                with self._lock:
                    self._in_use.append(in_use)
            sample = {"at": round(time.time(), 3), "attempt": attempt, "rss_bytes": resident}
            if used is not None:
                sample["device_used_bytes"] = used
            sample |= {name: value for name, value in asdict(vitals).items() if value is not None}
            try:
                os.write(fd, json.dumps(sample).encode() + b"\n")
            except OSError:
                continue  # a full disk costs samples, never the supervision
        os.close(fd)
