"""Output as lines with a role: which of them are frames and source of a traceback, which say what was raised.

A run's output mixes ranks, launchers and loggers; every rank's tracebacks are followed on their own.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import msgspec

from .oom_text import Stripped, clean_line, strip_prefixes

Role = Literal["text", "blank", "header", "frame", "source", "raised", "data"]


class Frame(NamedTuple):
    file: str
    function: str
    source: str


class Raised:
    """One printed exception with the frames above it."""

    __slots__ = ("frames", "group", "header", "index", "rank", "secondary", "speaker", "text")

    def __init__(self, group: int, said: Stripped, *, header: bool, secondary: bool) -> None:
        self.group = group
        self.rank = said.rank
        self.speaker = said.speaker
        self.header = header
        self.secondary = secondary
        self.frames: list[Frame] = []
        self.index = -1
        self.text = ""


class Line(NamedTuple):
    stream: int
    raw: str
    text: str
    rank: int | None
    speaker: int | None
    level: str
    role: Role
    raised: Raised | None


class _Reader:
    """The state of one rank's part of one stream."""

    __slots__ = ("after_frame", "chained", "group", "indent", "open", "recent", "secondary")

    def __init__(self) -> None:
        self.open: Raised | None = None
        self.indent: int | None = None
        self.after_frame = False
        self.chained = False
        self.secondary = False
        self.group = 0
        self.recent: tuple[Raised, int] | None = None


_HEADER = re.compile(r"Traceback \(most recent call last\)|Traceback of TorchScript")
_FRAME = re.compile(r"^(\s{0,80})File \"([^\"]{0,400})\", line \d{1,9}(?:, in (.{1,200}))?")
_RICH_FRAME = re.compile(r"^ ?(/\S{1,300}\.py):\d{1,7} in\b\s{0,4}(\S{0,100})")
_CHAINED = re.compile(
    r"During handling of the above exception|was the direct cause of the following|Original Traceback|"
    r"terminated with the following error"
)
_SECONDARY = re.compile(r"^Exception ignored |^Error in (?:atexit|sys\.)|^Exception in thread|resource_tracker\b")
_EXCEPTION = re.compile(
    r"^(?:\w{1,60}\.){0,8}\w{0,80}(?:Error|Exception|Interrupt|Exit|Killed|Failure|Stopped)\w{0,12}(?:\(|\s{0,2}:|\s{0,8}$)"
)
_NAMED = re.compile(r"^(?:\w{1,60}\.){0,8}[A-Z]\w{2,80}(?::\s|\s{0,2}$)")
# Line numbers in front: rich's and IPython's way to show source.
_GUTTER = re.compile(r"^[\s│┃|]{0,12}(?:❱\s{0,4}\d{1,6}\b|-{1,6}>\s{0,4}\d{1,6}\b|\d{1,6} [│┃]|\s{4,8}\d{1,6} )")
_REPORT_KEYS = frozenset(
    {"message", "msg", "exception", "exc_info", "exc", "error", "err", "traceback", "stack", "stack_trace",
     "stacktrace", "log", "event", "py_callstack", "stderr", "detail", "details", "reason", "body", "extrainfo"}
)  # fmt: skip


def _reports(value: object, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        yield from value.splitlines()
    elif depth < 5:
        if isinstance(value, dict):
            for key, inner in value.items():
                if str(key).lower() in _REPORT_KEYS:
                    yield from _reports(inner, depth + 1)
        elif isinstance(value, list):
            for inner in value[:100]:
                yield from _reports(inner, depth + 1)


def _unfold(raw: str) -> tuple[bool, list[str]]:
    """A JSON log line holds its message, often a whole traceback, as one escaped string; other JSON is mere data."""
    start = raw.find("{")
    if not 0 <= start < 120 or not raw.endswith("}") or '"' not in raw:
        return False, [raw]
    text = strip_prefixes(raw).text.strip()
    if not text.startswith('{"'):
        return False, [raw]
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return False, [raw]
    return True, list(_reports(value))[:2000]


def read_output(streams: Iterable[tuple[str, ...]]) -> tuple[list[Line], list[Raised]]:
    lines: list[Line] = []
    exceptions: list[Raised] = []
    groups = 0
    for stream, raws in enumerate(streams):
        readers: dict[int | None, _Reader] = {}
        for whole in raws:
            is_data, parts = _unfold(clean_line(whole))
            if is_data:
                lines.append(Line(stream, whole, whole, None, None, "", "data", None))
            for raw in parts:
                raw = clean_line(raw)
                told = strip_prefixes(raw)
                reader = readers.setdefault(told.speaker, _Reader())
                groups += 1
                role = _advance(reader, told, groups)
                raised = None
                if role == "raised" and reader.open is not None:
                    raised = reader.open
                    raised.index, raised.text = len(lines), told.text
                    exceptions.append(raised)
                    reader.recent, reader.open = (raised, len(lines)), None
                elif role == "text" and reader.recent is not None and len(lines) - reader.recent[1] <= 8:
                    raised = reader.recent[0]  # a message of several lines
                elif role == "header":
                    reader.recent = None
                lines.append(Line(stream, raw, *told, role, raised))
    return lines, exceptions


def _advance(reader: _Reader, told: Stripped, fresh: int) -> Role:
    text = told.text
    stripped = text.strip()
    if not stripped:
        return "blank"
    if _CHAINED.search(text):
        reader.chained = True
    if _SECONDARY.search(text):
        reader.secondary = True
    if _HEADER.search(text):
        reader.group = reader.group if reader.chained else fresh
        reader.open = Raised(reader.group, told, header=True, secondary=reader.secondary)
        reader.chained = reader.secondary = reader.after_frame = False
        reader.indent = None
        return "header"
    frame = _FRAME.match(text)
    rich = _RICH_FRAME.match(text) if frame is None else None
    if frame is not None or rich is not None:
        if reader.open is None:  # the tail was cut above it
            reader.group = fresh
            reader.open = Raised(fresh, told, header=False, secondary=reader.secondary)
        if frame is not None:
            reader.open.frames.append(Frame(frame[2], frame[3] or "", ""))
            reader.indent, reader.after_frame = len(frame[1]), True
        elif rich is not None:
            reader.open.frames.append(Frame(rich[1], rich[2], ""))
        return "frame"
    if _GUTTER.match(text):
        return "source"
    exception = _EXCEPTION.match(text) is not None
    if reader.open is not None and reader.indent is not None:
        depth = len(text) - len(text.lstrip())
        if depth >= reader.indent + 2 or (reader.after_frame and not exception):
            if reader.after_frame:
                last = reader.open.frames[-1]
                reader.open.frames[-1] = Frame(last.file, last.function, stripped[:200])
            reader.after_frame = False
            return "source"
        reader.after_frame = False
        if stripped.startswith("[Previous line repeated"):
            return "source"
    if not exception and reader.open is not None and reader.open.frames and "Error" in text and text[:1].isalpha():
        exception = True  # ranks that wrote into one another
    if not exception and reader.open is not None and reader.open.header and reader.open.frames:
        # Not every exception has that in its name: StopIteration, Unsupported.
        dedented = reader.indent is not None and reader.indent > len(text) - len(text.lstrip())
        exception = dedented and _NAMED.match(text) is not None
    if exception:
        if reader.open is None:
            reader.open = Raised(
                reader.group if reader.chained else fresh, told, header=False, secondary=reader.secondary
            )
        reader.indent = None
        reader.secondary = False
        return "raised"
    return "text"


# --- phases -----------------------------------------------------------------------------------------------------------

_EVAL = re.compile(
    r"^(?:\w{1,40}_)?(?:eval|evaluate|evaluation|validate|validation)(?:_\w{1,40})?$|^estimate_loss$|"
    r"^(?:test|val|predict|prediction)_(?:step|epoch|loop)$"
)
_EVAL_FILE = re.compile(r"(?:^|/)(?:eval|evaluate|evaluation|validate|validation)\.py$")
_SAVE = re.compile(r"^(?:_?save_(?:checkpoint|model|state|ckpt)\w{0,20}|save_pretrained|checkpoint_save)$")
_RESUME = re.compile(
    r"^(?:\w{0,30}load_(?:checkpoint|state_dict|ckpt)\w{0,20}|resume\w{0,30}|restore_checkpoint\w{0,20})$"
)
_LOAD = re.compile(
    r"^(?:\w{0,20}from_pretrained\w{0,20}|_apply|convert|_lazy_init|to_empty|build_model|init_model|load_model)$"
)
_COMPILE_FILE = re.compile(
    r"torch/(?:_inductor/(?!output_code|cudagraph_trees|cudagraph_utils|utils|runtime/)|_dynamo/(?!eval_frame|external_utils)|"
    r"fx/|_functorch/_aot_autograd/(?!runtime_wrappers|utils|codegen))"
)  # fmt: skip
_COMPILE_FUNCTION = re.compile(
    r"^(?:_?compile|_?convert_frame|transform|codegen|autotune_to_one_config|benchmark_all_configs)"
)
_BACKWARD = re.compile(r"\.backward\(|run_backward|\bautograd\.grad\(")
_OPTIMIZER = re.compile(r"\b(?:optimi[sz]er|optim|opt|scaler)\w{0,20}\.step\(")
_FORWARD = re.compile(
    r"^(?:forward\w{0,30}|_forward\w{0,30}|training_step|_?training_step|_call_impl|_wrapped_call_impl|closure|call|compute_loss)$"
)


def infer_phase(frames: list[Frame]) -> str | None:
    if not frames:
        return None
    files = [frame.file.replace("\\", "/") for frame in frames]
    functions = [frame.function for frame in frames]
    sources = [frame.source for frame in frames]
    if any(map(_EVAL.match, functions)) or any(map(_EVAL_FILE.search, files)):
        return "eval"
    if any(map(_SAVE.match, functions)) or any("torch.save(" in s for s in sources):
        return "checkpoint"
    if any("from_pretrained" in name for name in functions):
        return "load"
    if any(map(_RESUME.match, functions)) or any("torch.load(" in s or ".load_state_dict(" in s for s in sources):
        return "resume"
    generated = any("/torchinductor_" in f for f in files)  # compiled code at run time, whatever wraps it
    if not generated and any(
        _COMPILE_FILE.search(f) and not f.endswith("/utils.py") and (_COMPILE_FUNCTION.match(n) or "_inductor/" in f)
        for f, n in zip(files, functions, strict=True)
    ):
        return "compile"
    # One source line may hold both passes (`loss = model(x); loss.backward()`): what lies below it tells them apart.
    below = [*functions[1:], "backward"]
    if any(_BACKWARD.search(text) and "backward" in inner for text, inner in zip(sources, below, strict=True)) or any(
        "torch/autograd/" in f and n in ("backward", "_engine_run_backward", "grad")
        for f, n in zip(files, functions, strict=True)
    ):
        return "backward"
    stepped = [
        at
        for at, frame in enumerate(frames)
        if _OPTIMIZER.search(frame.source) or ("torch/optim/" in files[at] and "lr_scheduler" not in files[at])
    ]
    forwards = [at for at, name in enumerate(functions) if _FORWARD.match(name) and "torch/optim/" not in files[at]]
    if stepped and (not forwards or forwards[-1] < stepped[-1]):
        return "optimizer"
    if any(map(_LOAD.match, functions)):
        return "load"
    return "forward" if forwards else None
