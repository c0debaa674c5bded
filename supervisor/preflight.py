"""Before the first attempt: read what can be read, and make the run's first event of it."""

import os
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from .core.events import CheckpointPlan, RunCreated
from .core.policy import Policy
from .dialects.base import Dialect, Reading
from .dialects.command import Command
from .errors import UsageError
from .gpu import Gpu, Nvml
from .shim import boot_id


class Wanted(Struct, frozen=True, kw_only=True):
    """What the person asked for on gpusup's own command line; it goes before the policy's words."""

    name: str | None = None
    memory_budget_bytes: int | None = None
    checkpoint_every: int | None = None
    observe: bool = False


class Prepared(Struct, frozen=True, kw_only=True):
    run: RunCreated
    reading: Reading
    notes: tuple[str, ...]


def prepare(command: Command, dialect: Dialect, policy: Policy, policy_name: str, wanted: Wanted) -> Prepared:
    """Everything known of the run before it starts. Executes nothing of the trainer, and leaves no trace.

    Raises:
        UsageError: a config file cannot be read, or a budget cannot be set here.
    """
    every = wanted.checkpoint_every or policy.checkpoint_every
    notes = []
    if every is not None and not wanted.observe:
        command, note = _saving_every(command, dialect, every)
        notes.append(note)
    reading = dialect.read(command)
    gpus = Nvml().gpus() if reading.device is None or "cuda" in reading.device else []
    trains_on: Literal["gpu", "host"] = "gpu" if gpus or "cuda" in (reading.device or "") else "host"
    budget = wanted.memory_budget_bytes or policy.memory_budget_bytes
    if budget is not None and trains_on == "gpu" and not gpus:
        raise UsageError(
            "a memory budget was asked for, the trainer wants CUDA, and no GPU can be seen; use --device=cpu"
        )
    if budget is not None and trains_on == "gpu" and command.processes > 1:
        raise UsageError("a memory budget on the GPU is for one process; run one rank, or without --memory-budget")
    gpu = _watched(gpus, reading.device) if command.processes == 1 else None
    run = RunCreated(
        run_id="",
        name=wanted.name or Path(command.script or command.argv[0]).stem,
        policy_name=policy_name,
        policy=policy,
        command=command.argv,
        interpreter=command.interpreter,
        cwd=command.cwd,
        dialect=dialect.name,
        settings=reading.settings,
        origins=reading.origins,
        no_effect=reading.no_effect,
        global_batch_size=reading.global_batch_size,
        accumulation_multiple=reading.accumulation_multiple,
        target_steps=reading.target_steps,
        checkpoints=reading.checkpoints,
        memory_budget_bytes=budget,
        budget_where=None if budget is None else ("device" if trains_on == "gpu" else "host"),
        trains_on=trains_on,
        gpu_uuid=gpu.uuid if gpu else None,
        gpu_name=gpu.name if gpu else None,
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        observe=wanted.observe,
        boot_id=boot_id(),
        args_from=command.args_from,
    )
    return Prepared(run=run, reading=reading, notes=tuple(notes))


def _saving_every(command: Command, dialect: Dialect, steps: int) -> tuple[Command, str]:
    """The command with a checkpoint every so many steps, and what was changed for it."""
    argv = dialect.with_cadence(command.argv, command.args_from, steps)
    added = " ".join(token for token in argv if token not in command.argv)
    done = f"as agreed: {added}" if added else "not possible: how this trainer is told is not known"
    return replace(command, argv=argv), f"checkpoint_every {steps}, {done}"


def _watched(gpus: list[Gpu], device: str | None) -> Gpu | None:
    """The GPU a single process trains on: `cuda` is the first that is visible, `cuda:1` the second."""
    _, _, index = (device or "").partition(":")
    wanted = int(index) if index.isdigit() else 0
    return gpus[wanted] if wanted < len(gpus) else None


def worst_case_loss(plan: CheckpointPlan) -> str:
    """What a restart can cost, in words."""
    if not plan.place:
        return "unknown: gpusup knows of no checkpoint of this trainer"
    if plan.every_steps is None:
        return "unknown: how often it saves could not be read"
    return f"{plan.every_steps} optimizer steps (it saves every {plan.every_steps})"
