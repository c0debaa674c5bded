"""What a checkpoint holds of a run, and how a run takes it back."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import checkpoint, interchange, rng
from .data import Tokens
from .distributed import World
from .errors import TrainerError
from .model import GPT, Shape

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights and AdamW's state by name, the live ones: `model.NAME`, `optimizer.NAME.exp_avg`, ..."""
    named = dict(model.named_parameters())
    weights = {f"model.{name}": parameter.detach() for name, parameter in named.items()}
    moments = {
        f"optimizer.{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in named.items()
        for key in MOMENTS
    }
    return weights | moments


@torch.no_grad()
def put_back(saved: Mapping[str, Tensor], model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Take over what `tensors` gave, in place: it needs no more memory than starting.

    Moments that are missing stay as they are. Raises KeyError when a weight is missing.
    """
    for name, own in tensors(model, optimizer).items():
        if name.startswith("model.") or name in saved:
            own.copy_(saved[name])


def restore(
    loaded: checkpoint.Loaded,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    world: World,
) -> None:
    """Take over weights, moments, loss scale and random state."""
    put_back(loaded.tensors, model, optimizer)
    if loaded.meta["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(loaded.meta["scaler"])  # absent when the run was not in float16 before
    generators = loaded.meta["rng"]
    if len(generators) == world.size:
        rng.restore(generators[world.rank], device)
    else:  # other processes, other shares of the samples: dropout cannot be the same, and must differ between them
        torch.manual_seed(loaded.step * world.size + world.rank)


def versions() -> dict[str, str]:
    """Of what computes: the same ones are needed for the same bits."""
    return {"torch": str(torch.__version__), "numpy": np.__version__, "python": sys.version.split()[0]}


def check_resumable(loaded: checkpoint.Loaded, shape: Shape, tokens: Tokens, now: Mapping[str, object]) -> list[str]:
    """Raise TrainerError when this run cannot go on from the checkpoint; otherwise what will not be as it was."""
    for name, value in asdict(shape).items():
        before = loaded.meta["shape"][name]
        if before != value:
            raise TrainerError(
                f"{loaded.path} has {name}={before}, this run {name}={value}; "
                f"use the same, or start from scratch in another out_dir"
            )
    before = loaded.meta["tokenizer"]
    if before and tokens.vocabulary and before != tokens.vocabulary:
        raise TrainerError(
            f"{loaded.path} was trained on tokens of {before}, this run's data are tokens of {tokens.vocabulary}: "
            f"the same numbers mean other texts; use the data it was trained on, or start from scratch"
        )
    differs = [
        f"note: {name} was {loaded.meta['config'][name]} and is now {value}: "
        f"this run does not continue {loaded.path} exactly"
        for name, value in now.items()
        if loaded.meta["config"][name] != value
    ]
    if loaded.meta["data"] != tokens.fingerprint:
        differs.append(
            f"note: the training data are not those of before: this run does not continue {loaded.path} exactly"
        )
    return differs


def start_from(path: Path, model: GPT, optimizer: torch.optim.Optimizer) -> interchange.Foreign:
    """Take the weights of another program's checkpoint, and AdamW's state where it has one.

    Raises TrainerError when it is of another shape, saying which settings would fit.
    """
    foreign = interchange.load(path)
    own = asdict(model.shape)
    needed = [f"--{name}={value}" for name, value in asdict(foreign.shape).items() if own[name] != value]
    if needed:
        raise TrainerError(f"{path} is a model of another shape; start with {' '.join(needed)}")
    put_back(foreign.tensors, model, optimizer)
    return foreign
