"""What gpusup must know of a trainer family, and the family that nothing is known of."""

from pathlib import Path
from typing import Protocol

from msgspec import Struct

from ..core.events import CheckpointPlan, Origin
from ..core.policy import Scalar, Settings
from .command import Command


class Reading(Struct, frozen=True, kw_only=True):
    """What could be read of a run before it starts, without executing anything."""

    settings: Settings = {}
    origins: dict[str, Origin] = {}
    no_effect: dict[str, str] = {}
    """Knob -> why changing it would change nothing here."""
    global_batch_size: int | None = None
    accumulation_multiple: int = 1
    target_steps: int | None = None
    checkpoints: CheckpointPlan = CheckpointPlan()
    device: str | None = None
    resumes_from: str | None = None
    """The checkpoint file the command itself asks to go on from."""
    warnings: tuple[str, ...] = ()


class Seen(Struct, frozen=True, kw_only=True):
    """What a line of output tells: `step` optimizer steps are completed."""

    step: int
    loss: float | None = None
    step_s: float | None = None


class Dialect(Protocol):
    """A trainer family."""

    name: str
    rewrites_in_place: bool
    """Whether each checkpoint overwrites the one before, so that only a copy of ours is safe."""

    def read(self, command: Command) -> Reading: ...

    def argv(self, command: tuple[str, ...], args_from: int, changed: Settings, resume: str | None) -> tuple[str, ...]:
        """The command line with `changed` knobs; resuming from the checkpoint file `resume` when it is given."""

    def with_cadence(self, command: tuple[str, ...], args_from: int, every_steps: int) -> tuple[str, ...]:
        """The command line with a checkpoint every so many steps."""

    def parse(self, line: str) -> Seen | None: ...

    def checkpoint_file(self, place: Path) -> Path | None:
        """The one file that is rewritten in place, for dialects that do."""


class Generic:
    """An executable nothing is known of: it is watched and explained; no setting is changed."""

    name = "generic"
    rewrites_in_place = False

    def read(self, command: Command) -> Reading:
        return Reading(warnings=("no dialect knows this trainer: its settings cannot be read or changed",))

    def argv(self, command: tuple[str, ...], args_from: int, changed: Settings, resume: str | None) -> tuple[str, ...]:
        return command

    def with_cadence(self, command: tuple[str, ...], args_from: int, every_steps: int) -> tuple[str, ...]:
        return command

    def parse(self, line: str) -> Seen | None:
        return None

    def checkpoint_file(self, place: Path) -> Path | None:
        return None


def with_option(arguments: tuple[str, ...], key: str, value: Scalar) -> tuple[str, ...]:
    """`--key=value` in place of the last token for `key`, other tokens for it removed; at the end if there is none.

    At the end too if a config file comes later: what it assigns would go before the option.
    """
    token = f"--{key}={value}"
    places = [i for i, argument in enumerate(arguments) if argument.startswith(f"--{key}=")]
    if not places or any(not argument.startswith("--") for argument in arguments[places[-1] :]):
        return (*(argument for i, argument in enumerate(arguments) if i not in places), token)
    return tuple(token if i == places[-1] else argument for i, argument in enumerate(arguments) if i not in places[:-1])
