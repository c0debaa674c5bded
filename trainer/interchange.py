"""Models to and from nanoGPT's `ckpt.pt` and Hugging Face's GPT-2: the same network under other names.

Hugging Face stores what is a matrix product's weight here as its transpose, and always has biases.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import safetensors_file
from .errors import TrainerError
from .model import GPT, Shape

OUTSIDE = {"tokens": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"}
IN_BLOCK = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm_2": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
TRANSPOSED = ("attention.qkv.weight", "attention.out.weight", "up.weight", "down.weight")
COMPILED = "_orig_mod."  # what torch.compile puts before names
END_OF_TEXT = 50256  # in GPT-2's vocabulary
GELU = "gelu"  # the exact one, as here and in nanoGPT; GPT-2 itself has the tanh approximation, "gelu_new"


@dataclass(frozen=True)
class Foreign:
    """A model that another program wrote: tensors named as in our checkpoints, `model.*` and perhaps `optimizer.*`."""

    shape: Shape
    tensors: dict[str, Tensor]
    step: int  # optimizer steps it was trained for; 0 where that is not known
    notes: tuple[str, ...] = ()  # what is not quite the same here


def load(path: Path) -> Foreign:
    """nanoGPT's `ckpt.pt`, or a Hugging Face GPT-2: its folder, or `model.safetensors` beside its `config.json`.

    Raises TrainerError when it is neither, or of an architecture that is not GPT-2's.
    """
    if path.is_dir():
        path /= "model.safetensors"
    if not path.is_file():
        raise TrainerError(f"{path}: no such file; give nanoGPT's ckpt.pt, or a folder with a model.safetensors")
    return _load_hugging_face(path) if path.suffix == ".safetensors" else _load_nanogpt(path)


def save_nanogpt(
    path: Path, step: int, meta: Mapping[str, Any], model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> None:
    """Write what nanoGPT's `--init_from=resume` goes on from, as the file `path`."""
    shape, config = Shape(**meta["shape"]), meta["config"]
    weights = {_their_name(name): tensor.clone() for name, tensor in model.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # one tensor under two names
    groups = _by_decay(shape)
    adamw = torch.optim.AdamW(
        [
            {"params": [model[name] for name in group], "weight_decay": decay}
            for group, decay in zip(groups, (config["weight_decay"], 0.0), strict=True)
        ],
        lr=config["learning_rate"],
        betas=(config["beta1"], config["beta2"]),
        fused=config["device"].startswith("cuda"),  # as nanoGPT has it
    ).state_dict()
    for number, name in enumerate(groups[0] + groups[1]):
        adamw["state"][number] = {key: optimizer[f"{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
    best = meta["best_val_loss"]
    content = {
        "model": weights,
        "optimizer": adamw,
        "model_args": {**asdict(shape), "dropout": config["dropout"]},
        "iter_num": step,
        "best_val_loss": torch.tensor(1e9 if best is None else best),
        "config": dict(config),
    }
    torch.save(content, path)


def save_hugging_face(folder: Path, meta: Mapping[str, Any], model: Mapping[str, Tensor]) -> None:
    """Write what `GPT2LMHeadModel.from_pretrained` loads: `model.safetensors` and `config.json` in `folder`."""
    shape, dropout = Shape(**meta["shape"]), meta["config"]["dropout"]
    weights = {_their_name(name): tensor.t() if _is_transposed(name) else tensor for name, tensor in model.items()}
    if not shape.bias:
        weights |= {_their_name(name): torch.zeros(size) for name, size in _biases(shape).items()}
    end_of_text = END_OF_TEXT if shape.vocab_size > END_OF_TEXT else None
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": GELU,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.n_embd,
        "n_positions": shape.block_size,
        "vocab_size": shape.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": dropout,
        "embd_pdrop": dropout,
        "resid_pdrop": dropout,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
        "bias": shape.bias,  # ours: without, the biases written are zeros and are left out again by `load`
    }
    safetensors_file.write(folder / "model.safetensors", weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _load_nanogpt(path: Path) -> Foreign:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        arguments = content["model_args"]
        shape = Shape(**{name: arguments[name] for name in Shape.__dataclass_fields__})
        weights = {name.removeprefix(COMPILED): tensor for name, tensor in content["model"].items()}
        model = _ours(path, shape, lambda name: weights[_their_name(name)])
        tensors = {f"model.{name}": tensor for name, tensor in model.items()}
        groups = _by_decay(shape)
        for number, name in enumerate(groups[0] + groups[1]):
            for key, value in content["optimizer"]["state"][number].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return Foreign(shape, tensors, int(content["iter_num"]))
    except pickle.UnpicklingError:
        raise TrainerError(f"{path}: holds more than plain data, so it is not loaded") from None
    except (RuntimeError, EOFError, KeyError, TypeError) as error:
        raise TrainerError(f"{path}: not a checkpoint of nanoGPT ({type(error).__name__}: {error})") from None


def _load_hugging_face(path: Path) -> Foreign:
    config_path = path.with_name("config.json")
    try:
        config = json.loads(config_path.read_text())
        if config["model_type"] != "gpt2":
            raise TrainerError(f"{config_path}: a model of the type {config['model_type']}; only gpt2 can be loaded")
        shape = Shape(
            n_layer=config["n_layer"],
            n_head=config["n_head"],
            n_embd=config["n_embd"],
            block_size=config["n_positions"],
            vocab_size=config["vocab_size"],
            bias=config.get("bias", True),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{config_path}: not the config.json of a GPT-2 ({type(error).__name__}: {error})") from None
    weights = safetensors_file.read(path)
    prefix = "" if "transformer.wte.weight" in weights else "transformer."  # GPT-2 as it was published has none

    def ours(name: str) -> Tensor:
        tensor = weights[_their_name(name).removeprefix(prefix)].float()
        return tensor.t() if _is_transposed(name) else tensor

    model = _ours(path, shape, ours)
    if not shape.bias and any(bool(ours(name).any()) for name in _biases(shape)):
        raise TrainerError(f"{config_path}: says bias is false, but {path.name} has biases that are not zero")
    return Foreign(shape, {f"model.{name}": tensor for name, tensor in model.items()}, 0, tuple(_notes(config)))


def _ours(path: Path, shape: Shape, find: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Every parameter by our name. Raises TrainerError when one is missing or has another size."""
    found = {}
    for name, size in _sizes(shape).items():
        try:
            found[name] = find(name)
        except KeyError as error:
            raise TrainerError(f"{path}: not a GPT-2 of the shape it states ({error.args[0]} is missing)") from None
        if found[name].shape != size:
            raise TrainerError(
                f"{path}: not a GPT-2 of the shape it states "
                f"({_their_name(name)} is {list(found[name].shape)}, not {list(size)})"
            )
    return found


def _notes(config: Mapping[str, Any]) -> list[str]:
    notes = []
    if (activation := config.get("activation_function", "gelu_new")) != GELU:
        notes.append(f"its activation is {activation}, here it is the exact GELU: losses differ a little at first")
    if (epsilon := config.get("layer_norm_epsilon", 1e-5)) != 1e-5:
        notes.append(f"its layer_norm_epsilon is {epsilon}, here it is 1e-5")
    return notes


def _sizes(shape: Shape) -> dict[str, torch.Size]:
    """The size of every parameter, in the model's order, without making the model."""
    with torch.device("meta"):
        model = GPT(shape, dropout=0.0)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _biases(shape: Shape) -> dict[str, torch.Size]:
    """The biases that a model of this shape would have."""
    sizes = _sizes(Shape(**{**asdict(shape), "bias": True}))
    return {name: size for name, size in sizes.items() if name.endswith(".bias")}


def _by_decay(shape: Shape) -> tuple[list[str], list[str]]:
    """Names in the order in which nanoGPT's optimizer numbers its parameters: those that decay, then the others."""
    sizes = _sizes(shape)
    return [name for name in sizes if len(sizes[name]) >= 2], [name for name in sizes if len(sizes[name]) < 2]


def _their_name(name: str) -> str:
    """`blocks.0.up.weight` -> `transformer.h.0.mlp.c_fc.weight`."""
    module, _, kind = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{kind}"
    _, number, inner = module.split(".", 2)
    return f"transformer.h.{number}.{IN_BLOCK[inner]}.{kind}"


def _is_transposed(name: str) -> bool:
    return name.endswith(TRANSPOSED)
