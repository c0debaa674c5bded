"""Train nanoGPT's model with its own optimizer, and ours, from the same weights on the same batches."""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
from gpusup.trainer.model import GPT, Shape
from gpusup.trainer.optimizer import AdamW
from torch import Tensor, nn

SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=50304, bias=True)
ROWS = 2
LEARNING_RATE, BETAS, WEIGHT_DECAY, GRAD_CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
# nanoGPT's name for a module of ours
NAMES = {
    "tokens": "transformer.wte",
    "positions": "transformer.wpe",
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def largest_difference(nanogpt: Path, steps: int) -> float:
    """The largest difference of the two losses (nats, float32) at any of `steps` optimizer steps."""
    torch.set_num_threads(1)  # so small a model gains nothing from more
    ours = GPT.new(SHAPE, 0.0, torch.device("cpu"), seed=1)
    theirs = their_model(nanogpt, ours)
    our_optimizer = AdamW(ours.decay_groups(WEIGHT_DECAY), LEARNING_RATE, BETAS)
    with contextlib.redirect_stdout(io.StringIO()):
        their_optimizer = theirs.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, "cpu")
    apart = 0.0
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        # Some ids are far more frequent than others, so there is something to learn.
        tokens = (torch.rand(ROWS, SHAPE.block_size + 1, generator=generator) ** 4 * SHAPE.vocab_size).long()
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        our_loss = ours(inputs, targets) / targets.numel()
        _, their_loss = theirs(inputs, targets)
        for model, optimizer, loss in ((ours, our_optimizer, our_loss), (theirs, their_optimizer, their_loss)):
            update(model, optimizer, loss)
        apart = max(apart, abs(our_loss.item() - their_loss.item()))
    return apart


def their_model(nanogpt: Path, ours: GPT) -> Any:
    """nanoGPT's model with the weights of ours."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**vars(ours.shape), dropout=0.0))
    weights = {their_name(name): weight for name, weight in ours.state_dict().items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict(weights)
    return model


def their_name(name: str) -> str:
    """What nanoGPT calls the parameter that is called `name` here."""
    module, _, kind = name.rpartition(".")
    if module == "norm":
        return f"transformer.ln_f.{kind}"
    if module.startswith("blocks."):
        _, number, part = module.split(".", 2)
        return f"transformer.h.{number}.{NAMES[part]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimizer step, with clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    optimizer.step()
