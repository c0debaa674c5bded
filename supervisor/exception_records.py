"""What Python and PyTorch wrote down about the exception that ended an attempt, where the trainer itself reports none.

* `error.json`: PyTorch's error file (`TORCHELASTIC_ERROR_FILE`), of scripts under `torchrun` or its `@record`.
* `exceptions.jsonl`: one line for each process that an exception ended, by `record_exception.py`.

A stranger can have written either: what cannot be read tells nothing.
"""

import re
from pathlib import Path
from typing import Any

import msgspec

from .core.tracebacks import Frame, infer_phase
from .core.verdict import TrainerFailure
from .reports import parse_object
from .tail import last_bytes

MOST_BYTES = 1 << 20
CONSEQUENCES = ("ChildFailedError", "CalledProcessError", "ProcessRaisedException", "SystemExit", "SignalException")
_RAISED = re.compile(r"^(?P<type>[\w.]{1,200}): (?P<message>.*)$", re.DOTALL)


def read_failure(attempt: Path, trainer_pid: int) -> TrainerFailure | None:
    """The exception that ended the attempt in this directory, as told by whoever was nearest to it; None: unknown.

    Of several, an out-of-memory error counts before the errors of those that lost a peer by it.
    """
    found = [failure for failure in (_error_file(attempt / "error.json"), *_records(attempt, trainer_pid)) if failure]
    roots = [failure for failure in found if not failure.type.endswith(CONSEQUENCES)]
    oom = [failure for failure in roots if "out of memory" in failure.message or failure.type.endswith("MemoryError")]
    return next(iter(oom or roots), None)


def _records(attempt: Path, trainer_pid: int) -> list[TrainerFailure | None]:
    """Of the trainer's own process, else of its ranks; a helper's failure need not be the trainer's."""
    records = [parse_object(line) for line in last_bytes(attempt / "exceptions.jsonl", MOST_BYTES).splitlines()]
    own = [_record(each) for each in records if each.get("pid") == trainer_pid]
    if any(failure is not None and not failure.type.endswith(CONSEQUENCES) for failure in own):
        return own
    return own + [_record(each) for each in records if each.get("rank") is not None]


def _record(record: dict[str, Any]) -> TrainerFailure | None:
    try:
        frames = [Frame(str(file), str(function), str(source)) for file, function, source in record["frames"]]
        fields = {name: record[name] for name in ("type", "message", "rank")}
        return msgspec.convert({**fields, "phase": infer_phase(frames), "source": "exception record"}, TrainerFailure)
    except (KeyError, TypeError, ValueError, msgspec.ValidationError):
        return None


def _error_file(path: Path) -> TrainerFailure | None:
    """`{"message": {"message": "RuntimeError: ...", "extraInfo": {"py_callstack": ..., "timestamp": ...}}}`"""
    message = parse_object(last_bytes(path, MOST_BYTES)).get("message")
    text = message.get("message") if isinstance(message, dict) else message
    raised = _RAISED.match(text) if isinstance(text, str) else None
    if raised is None:
        return None
    return TrainerFailure(type=raised["type"], message=raised["message"][:8000], source="torch error file")
