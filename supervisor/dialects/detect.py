"""Which dialect a command speaks, told from the script's own source."""

import re

from ..errors import UsageError
from .base import Dialect, Generic
from .command import Command
from .nanogpt import NanoGpt, Reference

DIALECTS: dict[str, Dialect] = {d.name: d for d in (NanoGpt(), Reference(), Generic())}

_REFERENCE_NAMES = ("init_from", "resume_from", "checkpoint_interval", "gradient_accumulation_steps", "max_iters")


def detect(command: Command) -> Dialect:
    """The dialect of the command's script; `generic` when no other is recognised."""
    path = command.script_path
    if path is None or not path.is_file():
        return DIALECTS["generic"]
    try:
        source = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{command.script}: {error.strerror}") from None
    if all(re.search(rf"^{name}\b.*=", source, re.MULTILINE) for name in _REFERENCE_NAMES):
        return DIALECTS["reference"]
    if "configurator.py" in source and re.search(r"^init_from\s*=", source, re.MULTILINE):
        return DIALECTS["nanogpt"]
    return DIALECTS["generic"]
