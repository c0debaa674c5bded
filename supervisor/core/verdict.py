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
    NO_GPU = "no_gpu"
    NOT_A_NUMBER = "nan"
    STOPPED = "stopped"
    MACHINE_DIED = "machine_died"
    HANG = "hang"
    ERROR = "error"
    SIGNAL = "signal"
    SUCCESS = "success"
    NO_FAILURE = "no_failure"
    UNKNOWN = "unknown"


class Cause(StrEnum):
    """What lies behind a kind, where more can be told: each has a remedy of its own."""

    NONE = ""
    # of a device shortage
    OWN_GROWTH = "own_growth"
    STARTUP = "startup"
    FRAGMENTATION = "fragmentation"
    EVALUATION = "evaluation"
    RESUME = "resume"
    FOREIGN = "foreign"
    NOT_GIVEN_BACK = "not_given_back"
    LEAK = "leak"
    SPIKE = "spike"
    # of a host shortage
    REFUSED = "refused"
    PINNED = "pinned"
    KERNEL = "kernel"
    # of other ends
    ECC = "ecc"
    BUS = "bus"
    ASSERT = "assert"
    ILLEGAL_ACCESS = "illegal_access"
    LAUNCH = "launch"
    TIMEOUT = "timeout"
    PEER = "peer"
    CRASH = "crash"
    IMPORT = "import"
    SYNTAX = "syntax"
    MISSING_FILE = "missing_file"
    FILE_LIMIT = "file_limit"
    CHECKPOINT = "checkpoint"
    COMPILER = "compiler"
    SHAPE = "shape"
    DATA = "data"
    ARGUMENTS = "arguments"
    PROGRAM = "program"


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
    """The exception that ended a trainer, written down by itself, by PyTorch or by Python before it died."""

    source: str = "trainer report"

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
    others: tuple[tuple[str, ...], ...] = ()
    """More output of the same run, such as other ranks'."""
    failure: TrainerFailure | None = None
    trains_on: Literal["gpu", "host"] = "gpu"
    host_oom_kills: int = 0
    """How far the kernel's count of OOM kills in our cgroup rose during the attempt."""
    text_only: bool = False
    """Nothing but a log is known: a run that ended well, or still runs, is possible too."""


class Diagnosis(Struct, frozen=True, kw_only=True):
    kind: DiagnosisKind
    is_oom: Literal["yes", "no", "suspected"] = "no"
    cause: Cause = Cause.NONE
    confidence: Literal["high", "medium", "low"] = "low"
    """high: reported by the trainer or the kernel, or an uncaught exception of a process whose exit was seen."""
    sources: tuple[str, ...] = ()
    """What it rests on, best first."""
    phase: str | None = None
    rank: int | None = None
    numbers: OomNumbers = OomNumbers()
    message: str = ""
    evidence: tuple[str, ...] = ()

    @property
    def fatal(self) -> bool:
        """Whether the run was ended by it."""
        return self.kind not in (DiagnosisKind.SUCCESS, DiagnosisKind.NO_FAILURE)
