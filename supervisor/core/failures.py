"""What ends a run besides memory: the words of each cause, and what is worth doing about it.

A cause is told by the exception that ended the run, or else by lines that only such an end leaves.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from .verdict import Cause, DiagnosisKind

_K = DiagnosisKind


class Failure(NamedTuple):
    kind: DiagnosisKind
    cause: Cause
    pattern: re.Pattern[str]


def _f(kind: DiagnosisKind, cause: Cause, *patterns: str) -> Failure:
    return Failure(kind, cause, re.compile("|".join(patterns)))


# Order matters: what is the cause of others stands before them.
FAILURES: tuple[Failure, ...] = (
    _f(
        _K.USER_INTERRUPT,
        Cause.NONE,
        r"^KeyboardInterrupt\b|SignalException: Process \d+ got signal: 2\b|Detected KeyboardInterrupt",
        r"forrtl: error \(200\)",
    ),
    _f(_K.DISK_FULL, Cause.NONE, r"No space left on device|[Dd]isk quota exceeded|unexpected pos \d+ vs \d+"),
    _f(
        _K.GPU_LOST,
        Cause.ECC,
        r"uncorrectable (?:NVLink|ECC)|cudaErrorECC|Xid.{0,80}: (?:48|63|64|92|94|95)\b",
    ),
    _f(
        _K.GPU_LOST,
        Cause.BUS,
        r"[Ff]allen off the bus|GPU is lost|GPU requires reset|Xid.{0,80}: (?:79|119|120|154)\b",
    ),
    _f(
        _K.NO_GPU,
        Cause.NONE,
        r"Found no NVIDIA driver|driver version is insufficient|CUDA driver initialization failed|CUDA-capable device",
        r"No CUDA GPUs are available|no kernel image is available|not compiled with CUDA|[Tt]orch not compiled with",
        r"invalid device ordinal|forward compatibility was attempted|Failed to initialize NVML",
        r"NVIDIA driver .{0,40}too old|Unexpected error from cudaGetDeviceCount|CUDA Setup failed|CUDA_HOME",
        r"torch\.cuda\.is_available\(\)\W{1,3}(?:is )?False|can only be used on CUDA|No supported gpu backend",
        r"Unknown backend:? '?(?:gpu|cuda)|(?:CUDA|GPU)s? (?:is |are )?not available|Invalid CUDA 'device",
        r"CUDA unknown error - this may be due to an incorrectly set up environment",
    ),
    _f(_K.CUDA_CONTEXT, Cause.ASSERT, r"(?:CUDA|HIP) error: device-side assert|device-side assert triggered"),
    _f(
        _K.CUDA_CONTEXT,
        Cause.ILLEGAL_ACCESS,
        r"(?:CUDA|HIP) error: (?:an illegal|misaligned)|cudaErrorIllegalAddress|CUDA_ERROR_ILLEGAL_ADDRESS",
    ),
    _f(
        _K.CUDA_CONTEXT,
        Cause.LAUNCH,
        r"(?:CUDA|HIP) error: (?:unspecified launch|the launch|unknown)",
        r"cudaErrorLaunchFailure|CUDA_ERROR_LAUNCH_FAILED",
        r"CUDA driver error: (?:unknown|device not ready)",
    ),
    _f(
        _K.NOT_A_NUMBER,
        Cause.NONE,
        r"\b[Ll]oss (?:is|was|became|=|:) ?(?:nan|NaN|inf|Inf)\b",
        r"contains either `inf`, `nan`",
        r"(?:NaN|[Nn]an|Inf|[Ii]nf)(?: or (?:NaN|Inf|nan|inf))? (?:found|detected|encountered)",
        r"[Mm]inimum loss scale reached|loss scale already at minimum|loss[- ]scale.{0,40}below the minimum",
        r"found NaN|invalid values:|Input (?:\w+ )?contains NaN|returned nan values",
        r"non[- ]?finite (?:loss|grad|norm|value)|(?:grad\w*|loss\w*|norm) .{0,60}not finite",
        r"^FloatingPointError\b|found nan in|Nan loss|NaN loss",
    ),
    _f(
        _K.SIGNAL,
        Cause.CRASH,
        r"(?:exitcode\s{0,4}:|return code =) -(?:4|7|8|11)\b|killed by signal: (?:Segm|Abort|Illegal|Floating)",
    ),
    _f(_K.ERROR, Cause.ARGUMENTS, r"EADDRINUSE|[Aa]ddress already in use"),
    _f(
        _K.DISTRIBUTED,
        Cause.TIMEOUT,
        r"Watchdog caught collective|detected by watchdog at work|Timeout at NCCL work",
        r"[Cc]ollective operation timeout|\b[Gg]loo\b.{0,200}[Tt]imeout|Socket Timeout",
    ),
    _f(_K.SIGNAL, Cause.CRASH, r"(?:exitcode\s{0,4}:|return code =) -6\b"),  # a watchdog aborts on purpose
    _f(
        _K.DISTRIBUTED,
        Cause.PEER,
        r"Dist(?:Backend|Network|Store)Error|NCCL error|[Cc]onnection closed by peer|Connection reset by peer",
        r"\b[Gg]loo\b.{0,200}[Cc]onnect",
    ),
)

ERRORS: tuple[tuple[Cause, re.Pattern[str]], ...] = (
    (Cause.IMPORT, re.compile(r"^(?:ModuleNotFoundError|ImportError)\b")),
    (Cause.SYNTAX, re.compile(r"^(?:SyntaxError|IndentationError|TabError)\b")),
    (Cause.FILE_LIMIT, re.compile(r"Too many open files|received 0 items of ancdata")),
    (Cause.MISSING_FILE, re.compile(r"^FileNotFoundError\b|No such file or directory|no file named .{1,200} found in")),
    (
        Cause.CHECKPOINT,
        re.compile(
            r"loaded state dict contains|deserializing header|in loading state_dict|size mismatch for \S+: copying|"
            r"state_dict.{0,80}(?:missing|unexpected|mismatch)|"
            r"PytorchStreamReader failed|(?:invalid|corrupt\w*) (?:checkpoint|magic number)"
        ),
    ),
    (
        Cause.COMPILER,
        re.compile(
            r"torch\._(?:inductor|dynamo)\.exc\.|InductorError|BackendCompilerFailed|CppCompileError|OutOfResources|"
            r"out of resource: |torch\._dynamo|triton\S{0,60}CompilationError|PassManager::run failed|"
            r"No working C\+\+ compiler|Failed to find C compiler"
        ),
    ),
    (
        Cause.SHAPE,
        re.compile(
            r"shapes cannot be multiplied|must match the (?:size|existing size)|is invalid for input of size|"
            r"Sizes of tensors must match|stack expects each tensor to be equal size|not resizable|"
            r"Storage size calculation overflowed|could not be broadcast|[Ss]hape mismatch|"
            r"Expected input batch_size|doesn't match the broadcast shape|inhomogeneous shape|"
            r"Given groups=|expected .{0,60}(?:dimension|channels|shape|size)s?\b.{0,60}\b(?:got|but)\b|"
            r"The size of tensor|different to the input size|per channel when training|to have the same shape|"
            r"[Ii]ncompatible shapes|[Dd]imension(?:s)? .{0,40}mismatch"
        ),
    ),
    (
        Cause.DATA,
        re.compile(
            r"JSONDecodeError|UnicodeDecodeError|Arrow(?:Invalid|TypeError)|DatasetGeneration|ParserError|"
            r"(?:sqlite3|psycopg2?)\.\w{0,30}Error|UnidentifiedImageError|BadZipFile|EOFError: Ran out of input|"
            r"DataFilesNotFound|UnpicklingError|(?:file|data|image)\b.{0,20}truncated|truncated file|"
            r"corrupt(?:ed)? (?:record|file|data|image|shard)"
        ),
    ),
    (
        Cause.ARGUMENTS,
        re.compile(
            r"error: (?:unrecognized arguments|the following arguments are required|argument |ambiguous option)|"
            r"invalid choice: |Error: (?:No such option|Invalid value|Missing (?:option|argument))"
        ),
    ),
)

STOPPED = re.compile(
    r"CANCELLED AT |DUE TO (?:TIME LIMIT|PREEMPTION)|^(?:\[\d{1,4}\]\S?\s{1,4})?Terminated\b|exit code 143\b|"
    r"\bSIGTERM\b.{0,60}(?:received|caught|got)|got signal: 15\b|SIGTERMException|"
    r": line \d{1,6}:\s{1,4}\d{1,9} Terminated\b|(?:[Rr]eceived|[Cc]aught|[Gg]ot) (?:signal )?(?:SIGTERM|15\b)|"
    r"Received \d{1,3} death signal|TERM_(?:RUNLIMIT|OWNER|ADMIN|PREEMPT)|preempted"
)
"""A scheduler or a person told it to leave."""

CRASHED = re.compile(
    r"^(?:.{0,120}: )?(?:\S{0,60} line \d{1,6}: )?\s{0,4}(?:\d{1,9} )?"
    r"(?:Segmentation fault|Aborted|Illegal instruction|Floating point exception)\b|"
    r"^Fatal Python error: |double free or corruption|munmap_chunk\(\)|"
    r"Signal (?:4|6|7|8|11) \(SIG\w{3,4}\) received|terminate called (?:after|without)"
)
SAID = re.compile(r"^(?:\w{1,60}\.){0,8}\w{0,60}(?:Error|Exception|OutOfResources)\b(?! (?:ignored|in thread))")
"""An exception without its traceback, or what garbling left of one."""
LAUNCHER = re.compile(
    r"exits with return code = [1-9]|Exited with exit code [1-9]|: command not found|: can't open file '|execve\(\): |"
    r"^\S{1,60}: error: |There are not enough slots|exitcode\s{0,4}: [1-9]"
)
"""A launcher says that what it started has failed."""
DONE = re.compile(
    r"[Tt]raining (?:is )?(?:complete|completed|finished|done)\b|exits successfully|`Trainer\.fit` stopped"
)
"""The program says that it has done what it should; other signs of an end also follow failures."""
FINISHED = re.compile(
    rf"{DONE.pattern}|[Rr]un (?:complete|finished)|train_runtime|\bView run\b.{{0,200}}https?:|"
    r"^(?!.{0,80}(?:oading|shards)).{0,80}100%\|.{0,60}\| (\d{1,9})/\1 "
)


def of(texts: Iterable[str]) -> tuple[DiagnosisKind, Cause] | None:
    """The first cause that any of the texts tells; None when none does, or only that the program failed."""
    texts = list(texts)
    for failure in FAILURES:
        if any(failure.pattern.search(text) for text in texts):
            return failure.kind, failure.cause
    return None


def of_error(texts: Iterable[str]) -> Cause:
    """What kind of program error these texts tell."""
    texts = list(texts)
    for cause, pattern in ERRORS:
        if any(pattern.search(text) for text in texts):
            return cause
    return Cause.PROGRAM
