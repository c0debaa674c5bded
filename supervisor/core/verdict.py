"""The words of a diagnosis: what is known of an attempt's end, and the verdict on it. `diagnosis` finds the verdict.

They stand apart from the patterns, which take time to compile and are needed only when an attempt has ended.
"""

from enum import StrEnum
from typing import Literal

from msgspec import Struct


class DiagnosisKind(StrEnum):
    DEVICE_OOM = "device_oom"
    HOST_OOM = "host_oom"
    SHM_OOM = "shm_oom"
    HOST_OOM_SUSPECTED = "host_oom_suspected"
    DISK_FULL = "disk_full"
    USER_INTERRUPT = "user_interrupt"
    EXEC_FAILED = "exec_failed"
    DISTRIBUTED = "distributed"
    CUDA_CONTEXT = "cuda_context"
    GPU_LOST = "gpu_lost"
    ERROR = "error"
    SIGNAL = "signal"
    SUCCESS = "success"
    UNKNOWN = "unknown"


class OomNumbers(Struct, frozen=True, kw_only=True):
    """What the message states, in bytes. None: it does not say."""

    tried_to_allocate_bytes: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    allowed_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_unallocated_bytes: int | None = None
    process_in_use_bytes: int | None = None


class ExitStatus(Struct, frozen=True, kw_only=True):
    """Both None: nobody saw the end."""

    code: int | None = None
    signal: int | None = None


class TrainerFailure(Struct, frozen=True, kw_only=True):
    """What a cooperating trainer reported of itself before it died."""

    phase: str | None = None
    step: int | None = None
    type: str
    message: str
    block_size: int | None = None
    oom: bool = False
    """The trainer says that memory was refused; that it does not say so proves nothing."""
    rank: int | None = None


class Evidence(Struct, frozen=True, kw_only=True):
    exit: ExitStatus
    stderr: tuple[str, ...] = ()
    """The last lines of this attempt only; what an earlier attempt left would be taken for this one's."""
    stdout: tuple[str, ...] = ()
    failure: TrainerFailure | None = None
    trains_on: Literal["gpu", "host"] = "gpu"
    host_oom_kills: int = 0
    """How far the kernel's count of OOM kills in our cgroup rose during the attempt."""


class Diagnosis(Struct, frozen=True, kw_only=True):
    kind: DiagnosisKind
    is_oom: Literal["yes", "no", "suspected"] = "no"
    phase: str | None = None
    rank: int | None = None
    numbers: OomNumbers = OomNumbers()
    message: str = ""
    evidence: tuple[str, ...] = ()
