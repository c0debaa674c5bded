"""The machine and the run before the night: everything that can be found out without training, as findings.

Each check looks at one thing, and says nothing of what it cannot observe.
"""

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from msgspec import Struct

from . import host
from .dialects.base import Reading
from .dialects.command import Command
from .gpu import Nvml
from .preflight import worst_case_loss
from .run_store import state_home
from .units import format_bytes

Level = Literal["ok", "note", "warning", "failure"]
ASK_S = 120.0  # importing PyTorch from a cold disk
GIB = 1 << 30
LEAST_FREE_BYTES = 2 * GIB
FOREIGN_BYTES = 256 << 20
KEPT = 3  # checkpoints that exist at once: the two kept, and the one being written
TRAP_FROM, TRAP_UNTIL = (4, 36), (5, 2)
"""Versions of transformers whose Trainer takes the batch size from the checkpoint it resumes, whatever it is told."""

ASK_TORCH = """
import json, sys
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
found = {"python": sys.version.split()[0], "transformers": version("transformers"), "torch": None}
try:
    import torch
    found |= {"torch": str(torch.__version__), "cuda": torch.version.cuda, "hip": torch.version.hip}
    found["devices"] = torch.cuda.device_count()
    if found["devices"]:
        arches = torch.cuda.get_arch_list()
        major, minor = torch.cuda.get_device_capability(0)
        own = f"sm_{major}{minor}"
        found["unsupported"] = own if arches and not any(a.startswith(f"sm_{major}") for a in arches) else None
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


class Finding(Struct, frozen=True, kw_only=True):
    """`what` was found; `do` is what to do about it, empty where nothing needs to be done."""

    level: Level
    topic: str
    what: str
    do: str = ""


class Subject(Struct, frozen=True, kw_only=True):
    """What is looked at: the machine alone, or with the run that is to be started."""

    command: Command | None = None
    reading: Reading | None = None


def examine(subject: Subject) -> list[Finding]:
    """Everything found, in the order in which a person would look."""
    return [finding for check in CHECKS for finding in check(subject)]


def _gpu(subject: Subject) -> Iterator[Finding]:
    nvml = Nvml()
    if nvml.problem:
        wants = subject.reading is not None and "cuda" in (subject.reading.device or "")
        yield Finding(level="failure" if wants else "note", topic="gpu", what=nvml.problem, do="check with nvidia-smi")
        return
    for gpu in nvml.gpus():
        memory = nvml.memory(gpu.uuid)
        free = f", {format_bytes(memory.free_bytes)} free" if memory else ""
        yield Finding(
            level="ok", topic="gpu", what=f"{gpu.name}: {format_bytes(gpu.total_bytes)}{free}; driver {nvml.driver}"
        )
        holders = nvml.process_bytes(gpu.uuid)
        if holders is None:
            yield Finding(level="note", topic="gpu", what="which process holds its memory cannot be observed here")
        for pid, held in (holders or {}).items():
            if held >= FOREIGN_BYTES:
                what = f"{host.process_name(pid)} holds {format_bytes(held)}"
                yield Finding(level="warning", topic="gpu", what=what, do="end it, or the run has that much less")


def _wsl(subject: Subject) -> Iterator[Finding]:
    if "microsoft" not in _read("/proc/sys/kernel/osrelease").lower():
        return
    yield Finding(
        level="warning",
        topic="wsl2",
        what="Windows stops WSL2 shortly after its last terminal closes",
        do="leave a terminal open, or set vmIdleTimeout=-1 under [wsl2] in %UserProfile%\\.wslconfig",
    )
    yield Finding(
        level="note",
        topic="wsl2",
        what="Windows moves GPU memory to system memory before it refuses any: a shortage shows as a collapse of speed",
        do="in the NVIDIA control panel, CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback",
    )


def _torch(subject: Subject) -> Iterator[Finding]:
    """Asked in a process of the trainer's own Python; gpusup itself never imports it."""
    command = subject.command
    if command is None or not command.interpreter:
        return
    try:
        done = subprocess.run(
            [command.interpreter, "-c", ASK_TORCH], capture_output=True, text=True, timeout=ASK_S, cwd=command.cwd
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        what = f"{command.interpreter} could not be asked for its PyTorch"
        yield Finding(level="failure", topic="torch", what=what, do=f"try: {command.interpreter} -c 'import torch'")
        return
    if found.get("torch") is None:
        what = f"{command.interpreter} cannot import torch ({found.get('error', 'it is not installed')})"
        yield Finding(level="failure", topic="torch", what=what, do="choose another Python with --python")
        return
    build = f"CUDA {found['cuda']}" if found.get("cuda") else "HIP" if found.get("hip") else "for the CPU only"
    yield Finding(level="ok", topic="torch", what=f"PyTorch {found['torch']} ({build}), Python {found['python']}")
    if found.get("unsupported"):
        what = f"this PyTorch was not built for the card ({found['unsupported']})"
        yield Finding(level="failure", topic="torch", what=what, do="install a newer build of PyTorch")
    if Nvml().gpus() and not found.get("devices"):
        what = "there is a GPU, and this PyTorch sees none"
        yield Finding(
            level="failure", topic="torch", what=what, do="install a build of PyTorch for CUDA; see nvidia-smi"
        )
    yield from _transformers(found.get("transformers"))


def _transformers(version: str | None) -> Iterator[Finding]:
    numbers = tuple(int(part) for part in (version or "").split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and TRAP_FROM <= numbers < TRAP_UNTIL:
        yield Finding(
            level="warning",
            topic="transformers",
            what=f"transformers {version} takes the batch size from the checkpoint when it resumes",
            do="install transformers 5.2 or later, or a smaller batch has no effect after a restart",
        )


def _allocator(subject: Subject) -> Iterator[Finding]:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = os.environ.get(name)
        if value is None:
            continue
        yield Finding(level="note", topic="allocator", what=f"{name}={value}")
        if "expandable_segments:True" in value and "microsoft" in _read("/proc/sys/kernel/osrelease").lower():
            what = "expandable segments fail at the first allocation on WSL2"
            yield Finding(level="failure", topic="allocator", what=what, do=f"unset {name}")


def _disk(subject: Subject) -> Iterator[Finding]:
    place = subject.reading.checkpoints.place if subject.reading else ""
    for topic, folder in (("state", state_home()), *((("checkpoints", Path(place)),) if place else ())):
        free = shutil.disk_usage(_existing(folder)).free
        newest = _largest_bytes(folder) if topic == "checkpoints" else 0
        needed = max(LEAST_FREE_BYTES, KEPT * newest)
        what = f"{format_bytes(free)} free for {folder}"
        if newest:
            what += f", where a checkpoint is {format_bytes(newest)}"
        level: Level = "ok" if free >= needed else "failure" if newest and free < newest else "warning"
        do = "" if level == "ok" else f"free {format_bytes(needed - free)}"
        yield Finding(level=level, topic=topic, what=what, do=do)


def _cadence(subject: Subject) -> Iterator[Finding]:
    if subject.reading is None:
        return
    plan = subject.reading.checkpoints
    known = bool(plan.place) and plan.every_steps is not None
    yield Finding(
        level="note" if known else "warning",
        topic="cadence",
        what=f"a failure can cost {worst_case_loss(plan)}",
        do="" if known else "have it save often, or give --checkpoint-every N if gpusup knows the trainer",
    )
    for warning in subject.reading.warnings:
        yield Finding(level="warning", topic="trainer", what=warning)


def _limits(subject: Subject) -> Iterator[Finding]:
    for line in _read("/proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            limit = _read(f"/sys/fs/cgroup{line[3:]}/memory.max").strip()
            if limit.isdigit():
                what = f"this control group may use {format_bytes(int(limit))} of host memory"
                yield Finding(level="note", topic="limits", what=what)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 4096:
        what = f"only {files} files may be open at once; DataLoader workers need more"
        yield Finding(level="warning", topic="limits", what=what, do="ulimit -n 65536")
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    if shared < GIB:
        what = f"/dev/shm holds {format_bytes(shared)}; DataLoader workers pass their batches through it"
        yield Finding(level="warning", topic="limits", what=what, do="docker run --shm-size=8g, or num_workers=0")


def _staying(subject: Subject) -> Iterator[Finding]:
    """What ends processes when a person leaves."""
    if shutil.which("loginctl") is None or os.environ.get("XDG_SESSION_ID") is None:
        return
    kills = _asked(["busctl", "get-property", "org.freedesktop.login1", "/org/freedesktop/login1",
                    "org.freedesktop.login1.Manager", "KillUserProcesses"])  # fmt: skip
    lingers = _asked(["loginctl", "show-user", str(os.getuid()), "--property=Linger"])
    if kills.endswith("true") and "yes" not in lingers:
        what = "logging out ends every process of yours (KillUserProcesses)"
        yield Finding(level="warning", topic="logout", what=what, do="loginctl enable-linger")


def _sleeping(subject: Subject) -> Iterator[Finding]:
    """What may suspend or reboot the machine at night."""
    if not Path("/run/systemd/system").is_dir():
        return
    if list(Path("/sys/class/power_supply").glob("BAT*")) and "masked" not in _asked(
        ["systemctl", "is-enabled", "suspend.target"]
    ):
        what = "this machine can suspend by itself"
        yield Finding(
            level="warning", topic="sleep", what=what, do="start with: systemd-inhibit --what=sleep:idle gpusup run ..."
        )
    timers = [
        name
        for name in ("apt-daily-upgrade.timer", "dnf-automatic.timer", "unattended-upgrades.service")
        if _asked(["systemctl", "is-active", name]) == "active"
    ]
    if timers:
        what = f"{', '.join(timers)} may replace the driver while it is in use, or reboot"
        yield Finding(level="warning", topic="updates", what=what, do=f"sudo systemctl stop {timers[0]} for the night")


CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    _gpu, _wsl, _torch, _allocator, _disk, _cadence, _limits, _staying, _sleeping,
)  # fmt: skip


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _asked(argv: list[str]) -> str:
    """What a system tool answers; nothing when it cannot."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _largest_bytes(folder: Path) -> int:
    """The largest file, which is a checkpoint where there is one."""
    if not folder.is_dir():
        return 0
    return max((path.stat().st_size for path in folder.glob("**/*") if path.is_file()), default=0)
