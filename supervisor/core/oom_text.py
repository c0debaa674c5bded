"""What libraries print when memory is refused: cleaning of output, the table of wordings, and the numbers in them.

Every pattern is linear-time: no nested quantifiers, and each repetition over free text is bounded.
"""

import re
from typing import Literal, NamedTuple

from .verdict import DiagnosisKind, OomNumbers

# --- cleaning ---------------------------------------------------------------------------------------------------------

_MAX_LINE = 16384
_ANSI = re.compile(r"\x1b(?:\[[0-?]{0,64}[ -/]{0,8}[@-~]|\][^\x07\x1b]{0,512}(?:\x07|\x1b\\)?|[@-Z\\-_])")
# torch 2.2 and 2.3 print the device index as a raw byte, so control characters can stand inside a message.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufeff]")


def _decode(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    head = data[:4096]
    if len(head) >= 8 and head.count(0) * 10 >= len(head) * 3:
        # PowerShell 5 redirects as UTF-16; a tail cut from such a file has no BOM and may start in mid-character.
        return data.decode("utf-16-le" if head[1::2].count(0) >= head[::2].count(0) else "utf-16-be", errors="replace")
    return data.decode("utf-8", errors="replace")


def clean_line(line: str) -> str:
    if len(line) > _MAX_LINE:  # the class name stands at the start of a long line, or the message at its end
        line = line[: _MAX_LINE // 2] + " ... " + line[-_MAX_LINE // 2 :]
    if "\x1b" in line:
        line = _ANSI.sub("", line)
    return _CONTROL.sub("", line).rstrip()


def clean_lines(data: bytes) -> tuple[str, ...]:
    """Decode, split, drop what a progress bar overwrote, and strip terminal codes."""
    lines: list[str] = []
    for line in _decode(data).split("\n"):
        # A bar rewritten with \r leaves its last non-empty state; CRLF is only a line end.
        states = [part for part in line.split("\r") if part.strip()]
        lines.append(clean_line(states[-1] if states else ""))
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)


# --- prefixes ---------------------------------------------------------------------------------------------------------

_PREFIX = re.compile(
    r"""
      \[(?:rank|default|Rank\ )(?P<r1>\d{1,5})\]:?\ ?
    | \[\d{1,4},(?P<r2>\d{1,5})\](?:<std(?:out|err)>)?:?\ ?
    | \[(?P<r3>\d{1,5})\]\ ?<std(?:out|err)>:?\ ?
    | (?P<r4>\d{1,5}):(?:\ (?=\S|\ )|(?=[\[A-Za-z]))
    | \((?=[^()]{0,120}\bpid=(?P<pid>\d{1,10}))(?:[^()]{0,80}?\brank=(?P<r5>\d{1,5}))?[^()]{0,160}\)\ ?
    | [\[(]?\d{4}[-/]\d\d[-/]\d\d[T\ _]\d\d:\d\d:\d\d(?:[.,:]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?[\])]?(?:[:,]|\ -|\ \|)?\ ?
    | \d\d-\d\d\ \d\d:\d\d:\d\d(?:[.,]\d{1,9})?\ ?
    | \[?(?P<g1>[IWEF])\d{3,8}\ \d\d:\d\d:\d\d[.\d]{0,24}(?:\ {1,8}\d{1,10})?\ {1,4}[\w./\-]{1,120}:\d{1,6}\]\ ?
    | (?P<g2>[IWEF])\ [\w./\-]{1,120}:\d{1,6}\]\ ?
    | \[(?P<g3>[DIWEC])\ \d{4}-\d\d-\d\d\ \d\d:\d\d:\d\d[.,\d]{0,10}\]\ ?
    | [A-Z][a-z]{2}\ [\d\ ]\d\ \d\d:\d\d:\d\d\ [\w.\-]{1,60}\ [\w.\-/]{1,40}(?:\[\d{1,9}\])?:\ ?
    | std(?:out|err)\ [FP]\ (?=\S|\ )
    | \[\d{1,4}/\d{1,4}\]\ (?=\S|\ )
    | \[(?P<l2>DEBUG|INFO|WARNING|ERROR)\|[\w.]{1,60}:\d{1,6}\]\ ?
    | [\w.<>]{1,80}:[\w.<>]{1,80}:\d{1,6}\ -\ (?=\S|\ )
    | \[[\w./\-]{1,120}\.(?:py|cc|cpp|cu):\d{1,6}(?::\w{1,60})?\]\ ?
    | [\w.\-]{0,60}\ -\ (?=(?:DEBUG|INFO|WARN|ERROR|CRITICAL))
    | [\[(|]?(?P<level>DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL)\b(?:[\])|]:?|:[\w.]{1,80}:|\ {0,8}[:|]|\ -)?\ ?
    | \|\ (?=[A-Z]{3,12}:)
    | [\w.\-]{0,40}\d\ {1,10}\|\ (?=\S|\ )
    """,
    re.VERBOSE,
)
_BOX = re.compile(r"^\s{0,8}[│┃║]\s?|\s{0,200}[│┃║]\s{0,8}$")
_GRAVE = {"D": "debug", "I": "info", "W": "warning"}


class Stripped(NamedTuple):
    text: str
    rank: int | None
    speaker: int | None
    """The rank, or else a process id made negative: whose words they are."""
    level: str
    """debug, info, warning, error or empty."""


def strip_prefixes(line: str) -> Stripped:
    """The line without launcher, logger and time prefixes, whose indentation is kept: a traceback needs it."""
    rank: int | None = None
    pid: int | None = None
    level = ""
    pos = 0
    for _ in range(8):
        found = _PREFIX.match(line, pos)
        if found is None or found.end() == pos:
            break
        pos = found.end()
        got = found.groupdict()
        number = got["r1"] or got["r2"] or got["r3"] or got["r5"] or got["r4"]
        if number and (rank is None or not got["r4"]) and not (got["r4"] and line.startswith("[", pos)):
            rank = int(number)  # N:[default0]: is grep's line number
        pid = -int(got["pid"]) if got["pid"] else pid
        letter = got["g1"] or got["g2"] or got["g3"] or got["l2"] or got["level"]
        level = level or (_GRAVE.get(letter[0], "error") if letter else "")
    text = line[pos:]
    if text and (text.lstrip()[:1] in "│┃║" or text[-1] in "│┃║"):
        text = _BOX.sub("", text)
    return Stripped(text, rank, pid if rank is None else rank, level)


# --- wordings ---------------------------------------------------------------------------------------------------------


Strength = Literal["hard", "vague", "mention"]


class Wording(NamedTuple):
    pattern: re.Pattern[str]
    kind: DiagnosisKind
    strength: Strength
    """hard: memory was refused. vague: consistent with it. mention: a sentence of someone's own."""
    native: bool
    """Printed by a library that then fails in some other way: a later exception does not take its place."""


def _w(kind: DiagnosisKind, pattern: str, *, strength: Strength = "hard", native: bool = False) -> Wording:
    return Wording(re.compile(pattern), kind, strength, native)


_D, _H, _S, _K = (
    DiagnosisKind.DEVICE_OOM,
    DiagnosisKind.HOST_OOM,
    DiagnosisKind.SHM_OOM,
    DiagnosisKind.HOST_OOM_SUSPECTED,
)
_SIZE = r"(\d[\d,]{0,24}(?:\.\d{0,9})?)\s{0,4}([Bb]ytes?|[KMGTPE]i?B|B|[KMGT](?![A-Za-z]))"
_SHELL = (
    r"(?:^|\d(?:it/s|s/it)\S{0,40}\])(?:\S{1,200}: line \d{1,9}:\s{1,4})?"
    r"(?:\[\d{1,4}\][+-]?\s{1,4})?(?:\d{1,9}\s{1,4})?"
)
_EXC = r"(?:^|[\s:(])[\w.]{0,120}(?:Error|Exception): "

# Order matters: the first wording found in a line speaks for it.
WORDINGS: tuple[Wording, ...] = (
    # torch caching allocators: CUDA, HIP, XPU, and the out-of-tree backends that copied the text. No \b in front:
    # ranks write into one another ("OutOfMemoryErrorCUDA out of memory").
    _w(_D, rf"[A-Z]{{2,5}} out of memory\. Tried to allocate (?:{_SIZE}|more than 1EB)"),
    _w(_D, r"[A-Z]{2,5} out of memory\. Allocation was preemptively rejected"),
    _w(_D, r"Allocation on device \S{0,12} ?would exceed allowed memory\. \(out of memory\)"),
    _w(_D, rf"{_EXC}(?:Caught \S{{1,60}} in .{{1,60}}\. )?(?:CUDA|HIP|XPU|NPU|GPU) out of memory\b"),
    _w(_D, r"CUDA out of memory occurred when warming up"),
    _w(_D, r"MPS backend out of memory \(MPS allocated:"),
    _w(_D, rf"Error: Invalid buffer size: {_SIZE}"),
    # Driver, runtime and libraries beside torch's pool.
    _w(_D, r"(?<!Warp )(?:CUDA|HIP) error: out of memory\b"),
    _w(_D, r"Warp CUDA error 2: out of memory", native=True),
    _w(_D, r"CUDA driver error: out of memory\b"),
    _w(_D, r"cuda runtime error \(2\) ?: out of memory"),
    _w(_D, r"THCudaCheck FAIL file=\S{1,200} line=\d+ error=2 : out of memory", native=True),
    _w(_D, r"(?:cudaErrorMemoryAllocation|hipErrorOutOfMemory)\b[:,)]? ?\(?out of memory"),
    _w(_D, r"(?:cuda|hip)Malloc(?:Async| retry)? failed: out of memory", native=True),
    _w(_D, r"kIOGPUCommandBufferCallbackErrorOutOfMemory", native=True),
    _w(_D, r"(?:PI|UR_RESULT)_ERROR_OUT_OF_RESOURCES", strength="vague"),
    _w(_D, r"Free memory on device .{0,80}is less than desired GPU memory|larger than the available KV cache memory"),
    _w(_D, r"Dst tensor is not initialized"),
    _w(_D, r"CUDA failure 2: out of memory|error == cudaSuccess \(2 vs\. 0\) {1,4}out of memory"),
    _w(_D, r"Triton Error \[(?:CUDA|HIP|XPU)\]: out of memory"),
    _w(_D, r"NCCL WARN .{0,80}Cuda failure (?:2 )?'out of memory'", native=True),
    _w(_D, r"Cuda failure (?:2 )?'out of memory'", native=True),
    _w(_D, r"Failed to CUDA (?:host )?(?:calloc|malloc)(?: async)? \d", native=True),
    _w(_D, r"Could not create cudnn handle: CUDNN_STATUS_ALLOC_FAILED", native=True),
    _w(_D, r"cu(?:DNN|FFT|RAND|SPARSE|SOLVER|solver|sparse|rand) error: \w{4,12}_(?:STATUS_)?ALLOC_FAILED"),
    _w(_D, r"\bCU(?:FFT|DNN|SOLVER)_(?:STATUS_)?ALLOC_FAILED"),
    _w(_D, r"CUBLAS_STATUS_ALLOC_FAILED", strength="vague"),
    _w(_D, r"CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate", strength="vague"),
    _w(_D, r"CUDNN_STATUS_NOT_SUPPORTED\. This error may appear", strength="vague"),
    _w(_D, r"NVML_SUCCESS == .{1,80}INTERNAL ASSERT FAILED", strength="vague"),
    _w(_D, r"^Error out of memory at line \d+ in file", native=True),
    _w(_D, rf"fail(?:ed)? to allocate memory {_SIZE}!{{0,3}} ?Result = 2\b", native=True),
    _w(_D, r"No available memory for the cache blocks"),
    _w(_D, r"No executable batch size found, reached zero"),
    _w(_D, r"Error: Not enough memory\. Please try|Not enough memory to handle \d+ prefill tokens"),
    _w(_D, r"ERROR_OUT_OF_DEVICE_MEMORY|Error Code 2: OutOfMemory", native=True),
    _w(_H, r"ERROR_OUT_OF_HOST_MEMORY", native=True),
    _w(_D, r"cupy\S{0,60}OutOfMemoryError: |Out of memory allocating [\d,]{1,24} bytes \(allocated so far"),
    _w(_D, r"Requested amount of GPU memory \(\d+ bytes\) could not be allocated", native=True),
    _w(_D, r"BFCArena.{0,160}Failed to allocate memory for requested buffer"),
    # XLA, TensorFlow, Paddle.
    _w(_H, r"OOM when allocating tensor with shape.{1,200}device:CPU:"),
    _w(_D, r"OOM when allocating tensor with shape"),
    _w(_D, r"RESOURCE_EXHAUSTED: .{0,80}[Oo]ut of memory"),
    _w(_D, r"RESOURCE_EXHAUSTED: .{0,80}(?:Attempting to (?:allocate|reserve)|Failed to allocate request)"),
    _w(_D, r"Ran out of memory in memory space hbm"),
    _w(_H, r"INTERNAL: .{0,200}Out of memory allocating \d+ bytes"),
    _w(_D, r"Out of memory error on GPU \d+\. Cannot allocate"),
    _w(_H, r"could not allocate pinned host memory", strength="vague"),
    _w(_D, rf"{_EXC}.{{0,200}}CUDA_ERROR_OUT_OF_MEMORY|cuMemAlloc\w{{0,20}} failed: out of memory"),
    _w(_D, r"CUDA_ERROR_OUT_OF_MEMORY|Allocator \(GPU_\d+_bfc\) ran out of memory", strength="vague"),
    # Host: allocators that say so.
    _w(_H, r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)"),
    # oneDNN, when the scratch memory of an operation is refused.
    _w(_H, r"RuntimeError: could not (?:execute|create) a primitive", strength="vague"),
    _w(_H, r"\$ Torch: not enough memory: you tried to allocate"),
    _w(_H, rf"MemoryError: Unable to allocate {_SIZE}"),
    _w(_H, r"ArrowMemoryError: |\b(?:re)?[mc]?alloc of size \d+ failed"),
    _w(_H, r"terminate called after throwing an instance of 'std::bad_alloc'", native=True),
    _w(_D, r"std::bad_alloc: out_of_memory: |rmm::out_of_memory"),
    _w(_H, r"Error: std::bad_alloc|what\(\):\s{1,4}std::bad_alloc"),
    _w(
        _S,
        r"unable to (?:allocate|mmap|open|resize|write).{0,40}(?:shared memory|\bshm\b|/torch_|/dev/shm).{0,200}"
        r"\((?:12|28)\)",
    ),
    _w(_S, r"(?:No space left on device|Cannot allocate memory).{0,80}(?:/dev/shm|\bshm\b)"),
    _w(_S, r"/dev/shm.{0,160}(?:No space left on device|Cannot allocate memory)"),
    _w(_H, r"unable to mmap \d+ bytes from file"),
    _w(_H, r"\[WinError (?:8|1455)\]|\(os error 1455\)|\berror code: <?1455\b"),
    _w(_H, r"\[Errno 12\]|Cannot allocate memory \(os error 12\)|: fork: Cannot allocate memory"),
    _w(_H, r"\bcc1plus: out of memory allocating|virtual memory exhausted: Cannot allocate", native=True),
    _w(_H, r"memory allocation of \d+ bytes failed", native=True),
    _w(_H, r"java\.lang\.OutOfMemoryError|JavaScript heap out of memory|OutOfMemoryException: "),
    _w(_H, r"killed due to the node running low on memory|exceeds the memory usage threshold of", native=True),
    _w(_D, r"^(?:\w{1,60}\.){0,8}OutOfMemoryError(?:$|: )"),
    _w(_H, r"^(?:\w{1,60}\.){0,8}_?\w{0,20}MemoryError(?:$|: )|\sMemoryError$"),
    _w(_H, r"\bcudaHostAlloc.{0,40}out of memory"),
    # Host: whoever killed says why.
    _w(_H, r"oom[-_]kill event", native=True),
    _w(_H, r"srun: error: .{1,120}: Out Of Memory", native=True),
    _w(_H, r"[Ee]xceeded (?:step |job |virtual )?memory limit\b|State: OUT_OF_MEMORY|TERM_MEMLIMIT", native=True),
    _w(_H, r"gone over memory limit of", native=True),
    _w(_H, r"PBS: job killed: v?mem \d+kb exceeded limit", native=True),
    _w(_H, r"[Oo]ut of memory: Kill(?:ed)? process|oom-kill:constraint=|killed by the OOM killer", native=True),
    _w(_H, r"invoked oom-killer", native=True),
    _w(_H, r"\bOOMKilled\b(?![\"']?\s{0,4}[:=]\s{0,4}(?:false|False|0|null))", native=True),
    # Shared memory and kills: consistent with a shortage, no proof of one.
    _w(_S, r"insufficient shared memory \(shm\)|workers are out of shared memory", strength="vague"),
    _w(_S, r"DataLoader worker \(pid.{1,60}killed by signal: Bus error", strength="vague"),
    _w(_K, r"DataLoader worker \(pid.{1,60}killed by signal: Killed", strength="vague"),
    _w(_S, rf"{_SHELL}Bus error(?:\s{{2,8}}\S|\s{{0,8}}\(core dumped\)|\s{{0,8}}$)", strength="vague"),
    _w(_K, r"A process in the process pool was terminated abruptly", strength="vague"),
    _w(_K, r"abruptly died during map operation", strength="vague"),
    _w(_K, r"exits with return code = -9\b", strength="vague"),
    _w(_K, r"exitcode\s{0,4}: -9 \(pid|Signal 9 \(SIGKILL\) received by PID", strength="vague"),
    _w(_K, r"terminated with signal SIGKILL|died with <Signals\.SIGKILL", strength="vague"),
    _w(_K, r"fatal error: Killed signal terminated program", strength="vague"),
    _w(_K, rf"{_SHELL}Killed(?:\s{{2,}}\S|\s{{0,8}}$)", strength="vague"),
    _w(_K, r"^zsh: killed\s|^srun: error: .{1,80}: Killed\s{0,8}$", strength="vague"),
    _w(_K, r"process is killed by SIGKILL by OOM killer", strength="vague"),
    # A sentence of someone's own.
    _w(_D, r"\b(?:CUDA|cuda|GPU|HIP|XPU)\b.{0,24}\b(?:out of memory\b|OOM\b(?!\s?[:=]\s?0))", strength="mention"),
    _w(_D, r"\bOutOfMemoryError\b(?=$|: |\(['\"])", strength="mention"),
    _w(_D, rf"{_EXC}.{{0,60}}\bout of memory\b", strength="mention"),
)  # fmt: skip

_HINT = re.compile(
    r"memory|alloc|killed|oom|bus error|sigkill|-9|abruptly|1455|NOT_SUPPORTED|NVML_SUCCESS|\bshm\b|NOT_INITIALIZED|"
    r"buffer size|Errno 12|os error 12|WinError 8|memlimit|No space left|executable batch|OUT_OF_RES|Dst tensor",
    re.IGNORECASE,
)

# What a victim or a launcher says once something else has gone wrong.
CONSEQUENCE = re.compile(
    r"CalledProcessError|ChildFailedError|Connection(?:Reset|Refused|Aborted|)Error|BrokenPipe|EOFError|SystemExit|"
    r"Dist(?:Backend|Network|Store|)Error|[Cc]onnection (?:closed|reset|refused|was lost)|\bNCCL\b|\b[Gg]loo\b|"
    r"Process(?:Exited|Raised)Exception|exited unexpectedly|[Ee]ngine core|died unexpectedly|[Ss]ee root cause|"
    r"RayTaskError|RayActorError|ActorDied|ActorUnavailable|WorkerCrashed|BrokenProcessPool|non-zero exit|"
    r"SubprocessError|ChildProcessError|TCPStore|failed with exit ?code|Socket (?:Timeout|closed)|Watchdog caught|"
    r"peer rank"
)


def find_wording(text: str) -> tuple[Wording, re.Match[str]] | None:
    if _HINT.search(text) is None:
        return None
    for wording in WORDINGS:
        found = wording.pattern.search(text)
        if found is not None:
            return wording, found
    return None


# --- numbers ----------------------------------------------------------------------------------------------------------

_POWERS = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}
# WSL2's NVML answers -1, printed as 2^64 bytes; and no machine has an exbibyte.
_ABSURD = 1 << 60


def parse_size(number: str, unit: str) -> int | None:
    """Bytes; torch, Paddle and older MPS builds print binary units whatever they call them."""
    try:
        size = round(float(number.replace(",", "")) * 1024.0 ** _POWERS[unit[0].lower()])
    except (ValueError, OverflowError, KeyError):
        return None
    return size if 0 <= size < _ABSURD else None


def _n(*patterns: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(p.replace("SIZE", _SIZE)) for p in patterns)


_TRIED = _n(
    r"[Tt]r(?:ied|ying) to allocate SIZE",
    r"Requested size: ?SIZE",
    r"Requested\s{0,40}: SIZE",
    r"(?:failed to allocate|allocate request for) [\d.]{1,12}[KMGT]?i?B? \(SIZE\)",
    r"[Ff]ail(?:ed)? to allocate memory SIZE",
    r"Unable to allocate SIZE",
    r"Cannot allocate SIZE",
    r"Out of memory allocating SIZE",
    r"memory allocation of SIZE failed",
    r"unable to mmap SIZE",
    r"Invalid buffer size: SIZE",
    r"Attempting to (?:allocate|reserve) SIZE",
    r"Requested amount of GPU memory \(SIZE\)",
    r"allocating SIZE on device",
    r"calloc(?: async)? (\d{1,20}) (?=bytes|/)()",
    r"alloc of size (\d{1,20}) failed()",
    r"requested buffer of size (\d{1,20})()",
)
_TOTAL = _n(r"total capac?i?ty of SIZE", r"SIZE total capacity", r"Device limit\s{0,40}: SIZE")
_FREE = _n(
    r"of which SIZE is free",
    r"SIZE free\s?[;)]",
    r"Free \(according to CUDA\)\s{0,8}: SIZE",
    r"available memory is only SIZE",
    r"[Tt]here are SIZE free",
)
_ALLOWED = _n(
    r"SIZE allowed\s?;", r"max allowed: SIZE", r"PyTorch limit \(set by user-supplied memory fraction\)\s{0,40}: SIZE"
)
_ALLOCATED = _n(
    r"allocated memory SIZE is allocated",
    r"SIZE already allocated",
    r"Currently allocated\s{0,40}: SIZE",
    r"MPS allocated: SIZE",
    r"SIZE memory has been allocated",
    r"allocated so far: SIZE",
)
_UNALLOCATED = _n(r"SIZE is reserved by PyTorch but unallocated", r"SIZE cached\s?\)")
_RESERVED = _n(r"SIZE reserved in total")
_OURS = _n(r"this process has SIZE memory in use")
_SOMEONES = _n(r"Process \d{1,10} has SIZE memory in use")[0]
_SPACE = re.compile(r"\s+")


def _first(patterns: tuple[re.Pattern[str], ...], text: str) -> int | None:
    for pattern in patterns:
        found = pattern.search(text)
        if found is not None:
            return parse_size(found[1], found[2] or "bytes")
    return None


def parse_numbers(message: str) -> OomNumbers:
    text = _SPACE.sub(" ", message)
    allocated = _first(_ALLOCATED, text)
    unallocated = _first(_UNALLOCATED, text)
    reserved = _first(_RESERVED, text)
    if unallocated is None and reserved is not None and allocated is not None:
        unallocated = max(0, reserved - allocated)
    in_use = _first(_OURS, text)
    others = _SOMEONES.findall(text)
    if in_use is None and len(others) == 1:
        # In a container NVML shows our own process under a foreign pid; it is ours if it can hold what we allocated.
        size = parse_size(*others[0])
        in_use = size if size is not None and allocated is not None and size >= allocated else None
    return OomNumbers(
        tried_to_allocate_bytes=_first(_TRIED, text),
        total_bytes=_first(_TOTAL, text),
        free_bytes=_first(_FREE, text),
        allowed_bytes=_first(_ALLOWED, text),
        allocated_bytes=allocated,
        reserved_unallocated_bytes=unallocated,
        process_in_use_bytes=in_use,
    )


def count_numbers(numbers: OomNumbers) -> int:
    return sum(getattr(numbers, name) is not None for name in OomNumbers.__struct_fields__)


# --- quotations -------------------------------------------------------------------------------------------------------

_CODE = re.compile(
    r"^\s{0,200}(?:#|//|;|raise\s|if\s|elif\s|except\b|assert\s|print\(|log(?:ger|ging)?\.|warnings?\.|return\s|def\s|"
    r"class\s|from\s|import\s|\"\"\"|'''|>>>|\$\s|\+\s|--\s|\*\s|grep\s|-\s\D{0,300}$)"
)
_KEYED = re.compile(r"^\s{0,200}[-{,]?\s{0,4}[\"']?([\w.\-]{1,60})[\"']?\s{0,4}[:=]\s{0,4}[\[(]?\s{0,2}[brf]?[\"'|>]")
_KEYED_PLAIN = re.compile(r"^\s{0,200}(?:- )?([a-z_][\w\-]{0,60})\s?[:=]\s")
_TELLS = re.compile(r"(?:Error|Exception|error|exception|message|msg|traceback|reason|details?|stderr|what\(\))$")
_CALLED = re.compile(r"(?:Error|Exception)\(f?$")
_ADVICE = re.compile(
    r"\b(?:if|avoid\w*|prevent\w*|in case|when\w*|helps?|reduc\w+|fix\w*|handl\w+|catch\w*|no)\b", re.I
)
_CONFIG_WORDS = frozenset(
    {"pattern", "patterns", "match", "matches", "regex", "when", "signature", "prompt", "sample", "text", "completion",
     "trigger", "help", "description", "example", "hint", "advice", "note", "comment", "generated", "generation",
     "contains", "tip", "any", "all", "on", "output"}
)  # fmt: skip


def is_quoted(text: str, start: int) -> bool:
    """Whether the words at `start` are source code, configuration or somebody's string rather than a report."""
    if _CODE.match(text):
        return True
    before = text[max(0, start - 200) : start]
    last = before[-1:]
    if last and last in "\"'`|" and not _CALLED.search(before[:-1]):
        keyed = _KEYED.match(text)
        return keyed is None or keyed.end() != start or not _TELLS.search(keyed[1])
    for keys in (_KEYED, _KEYED_PLAIN):
        keyed = keys.match(text)
        if keyed is not None and keyed.end() <= start and _config_key(keyed[1]):
            return True
    return False


def _config_key(key: str) -> bool:
    return not _CONFIG_WORDS.isdisjoint(re.split(r"[._\-]", key.lower()))


def is_advice(text: str, start: int) -> bool:
    return _ADVICE.search(text[max(0, start - 60) : start]) is not None


def squeeze(text: str) -> str:
    return _SPACE.sub(" ", text).strip()
