"""nanoGPT, unmodified, and the reference trainer, which spells its knobs the same way and cooperates besides.

nanoGPT: settings are globals of `train.py`, then of config files, then `--key=value`, in the order they are given;
types must match exactly. `iter N` is printed after N + 1 completed steps. It saves at evaluations only, onto the same
file, and neither the random state nor the position in the data: each resume replays the first batches.
"""

import ast
import re
from pathlib import Path

from ..checkpoints import newest
from ..core.events import CheckpointPlan, Origin
from ..core.policy import ACCUMULATION, MICRO_BATCH, Settings
from ..errors import UsageError
from .base import Reading, Seen, with_option
from .command import Command
from .static_config import Origins, read_assignments

KNOBS = (MICRO_BATCH, ACCUMULATION, "dtype", "compile", "block_size")

_NUMBER = r"[-+]?(?:nan|inf|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
_ITER = re.compile(rf"^iter (?P<step>\d+): loss (?P<loss>{_NUMBER}), time (?P<ms>[\d.]+)ms")


class NanoGpt:
    name = "nanogpt"
    rewrites_in_place = True

    def read(self, command: Command) -> Reading:
        origins = _read_settings(command, until="configurator.py")
        settings = {knob: value for knob in KNOBS if (value := origins[knob].value) is not None}
        device = _text(origins, "device")
        on_cpu = device is not None and "cuda" not in device
        last_iteration = _int(origins, "max_iters")
        return Reading(
            settings=settings,
            origins={knob: origins[knob] for knob in KNOBS},
            no_effect={"dtype": "nanoGPT ignores its dtype on a CPU, so this would change nothing"} if on_cpu else {},
            global_batch_size=_global_batch(settings),
            accumulation_multiple=command.processes,
            target_steps=None if last_iteration is None else last_iteration + 1,
            checkpoints=CheckpointPlan(
                place=str(_place(command, origins)),
                every_steps=_int(origins, "eval_interval"),
                replays_data=True,
            ),
            device=device,
            resumes_from=str(_place(command, origins) / "ckpt.pt") if _resumes(origins) else None,
            warnings=_warnings(origins),
        )

    def argv(self, command: tuple[str, ...], args_from: int, changed: Settings, resume: str | None) -> tuple[str, ...]:
        arguments = command[args_from:]
        for knob, value in changed.items():
            arguments = with_option(arguments, knob, value)
        if resume is not None:
            arguments = with_option(arguments, "init_from", "resume")
        return (*command[:args_from], *arguments)

    def with_cadence(self, command: tuple[str, ...], args_from: int, every_steps: int) -> tuple[str, ...]:
        """It saves at evaluations only, so these come more often too, and shorter, to cost about as much."""
        arguments = with_option(command[args_from:], "eval_interval", every_steps)
        arguments = with_option(arguments, "eval_iters", 20)
        return (*command[:args_from], *with_option(arguments, "always_save_checkpoint", True))

    def parse(self, line: str) -> Seen | None:
        match = _ITER.match(line)
        if match is None:
            return None
        return Seen(step=int(match["step"]) + 1, loss=float(match["loss"]), step_s=float(match["ms"]) / 1000)

    def checkpoint_file(self, place: Path) -> Path | None:
        return place / "ckpt.pt"


class Reference(NanoGpt):
    """gpusup's own trainer. It reports itself (docs/trainer-protocol.md): no line of its output is read."""

    name = "reference"
    rewrites_in_place = False

    def read(self, command: Command) -> Reading:
        origins = _read_settings(command)
        settings = {knob: value for knob in KNOBS if (value := origins[knob].value) is not None}
        interval = _int(origins, "checkpoint_interval") or _int(origins, "eval_interval")
        return Reading(
            settings=settings,
            origins={knob: origins[knob] for knob in KNOBS},
            global_batch_size=_int(origins, "global_batch_size") or _global_batch(settings),
            target_steps=_int(origins, "max_iters"),
            checkpoints=CheckpointPlan(
                place=str(_place(command, origins)),
                every_steps=interval,
                can_save_on_request=True,
            ),
            device=_text(origins, "device"),
            resumes_from=_resumed_checkpoint(command, origins) if _resumes(origins) else None,
        )

    def argv(self, command: tuple[str, ...], args_from: int, changed: Settings, resume: str | None) -> tuple[str, ...]:
        argv = super().argv(command, args_from, changed, resume)
        if resume is None:
            return argv
        return (*argv[:args_from], *with_option(argv[args_from:], "resume_from", resume))

    def with_cadence(self, command: tuple[str, ...], args_from: int, every_steps: int) -> tuple[str, ...]:
        return (*command[:args_from], *with_option(command[args_from:], "checkpoint_interval", every_steps))

    def parse(self, line: str) -> Seen | None:
        return None

    def checkpoint_file(self, place: Path) -> Path | None:
        return None


def _read_settings(command: Command, until: str | None = None) -> Origins:
    """Defaults of the script, then config files and `--key=value` from left to right, as the script itself would."""
    assert command.script_path is not None
    assert command.script is not None
    origins = _read_file(command.script_path, command.script, {}, until)
    defaults = set(origins)
    for argument in command.arguments:
        if not argument.startswith("--"):
            origins = _read_file(Path(command.cwd) / argument, argument, origins, None)
            continue
        key, _, text = argument[2:].partition("=")
        if key not in defaults:
            continue  # the script refuses it in its own words
        origins[key] = Origin(value=_literal(text), where=f"command line: {argument}")
    missing = Origin(why_unknown="the script does not assign it")
    return {**dict.fromkeys(KNOBS, missing), **origins}


def _read_file(path: Path, shown: str, known: Origins, until: str | None) -> Origins:
    try:
        return read_assignments(path, shown, known, until)
    except OSError as error:
        raise UsageError(f"{shown}: {error.strerror}; the trainer reads it as a config file") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise UsageError(
            f"{shown}:{line or 1}: not valid Python ({error.args[0]}), so its settings are unreadable"
        ) from None


def _literal(text: str) -> bool | int | float | str:
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False}.get(text.lower(), text)
    return value if isinstance(value, (bool, int, float, str)) else text


def _place(command: Command, origins: Origins) -> Path:
    return Path(command.cwd) / (_text(origins, "out_dir") or "out")


def _resumes(origins: Origins) -> bool:
    return _text(origins, "init_from") == "resume"


def _resumed_checkpoint(command: Command, origins: Origins) -> str | None:
    """What the reference trainer would load: the checkpoint it is given, else the newest whole one of its folder."""
    if named := _text(origins, "resume_from"):
        return str(Path(command.cwd) / named)
    found = newest(_place(command, origins))
    return None if found is None else str(found)


def _global_batch(settings: Settings) -> int | None:
    micro_batch, accumulation = settings.get(MICRO_BATCH), settings.get(ACCUMULATION)
    return micro_batch * accumulation if isinstance(micro_batch, int) and isinstance(accumulation, int) else None


def _int(origins: Origins, key: str) -> int | None:
    value = origins[key].value if key in origins else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(origins: Origins, key: str) -> str | None:
    value = origins[key].value if key in origins else None
    return value if isinstance(value, str) else None


def _warnings(origins: Origins) -> tuple[str, ...]:
    if origins.get("always_save_checkpoint", Origin(value=True)).value is False:
        return (
            "it saves only when the validation loss improves (always_save_checkpoint is False): work since the last "
            "improvement is lost on a restart",
        )
    return ()
