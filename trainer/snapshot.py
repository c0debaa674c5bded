"""What a checkpoint holds of a run, and how a run takes it back."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, rng
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


def restore(
    loaded: checkpoint.Loaded,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    world: World,
) -> None:
    """Take over weights, moments, loss scale and random state, in place: it needs no more memory than starting."""
    with torch.no_grad():
        for name, tensor in tensors(model, optimizer).items():
            tensor.copy_(loaded.tensors[name])
    if loaded.meta["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(loaded.meta["scaler"])  # absent when the run was not in float16 before
    generators = loaded.meta["rng"]
    if len(generators) == world.size:
        rng.restore(generators[world.rank], device)
    else:  # other processes, other shares of the samples: dropout cannot be the same, and must differ between them
        torch.manual_seed(loaded.step * world.size + world.rank)


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


def start_from(path: Path, model: GPT, optimizer: torch.optim.Optimizer) -> int:
    """Take the weights of another program's checkpoint, and AdamW's state where it has one; the steps it had taken.

    Raises TrainerError when it is of another shape, saying which settings would fit.
    """
    from . import interchange  # only a first start needs it

    foreign = interchange.load(path)
    if foreign.shape != model.shape:
        needed = " ".join(
            f"--{name}={value}" for name, value in asdict(foreign.shape).items() if asdict(model.shape)[name] != value
        )
        raise TrainerError(f"{path} is a model of another shape; start with {needed}")
    own = tensors(model, optimizer)
    with torch.no_grad():
        for name, tensor in foreign.tensors.items():
            own[name].copy_(tensor)
    return foreign.step
