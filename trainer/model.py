"""The GPT-2 architecture: learned positions, pre-LayerNorm blocks, GELU, an output head tied to the embedding."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name everybody knows it by)
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .allocator import empty_at_page
from .loss import ChunkedCrossEntropy


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What fixes the parameters of a model; a checkpoint fits only a model of the same shape."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int  # longest context, in tokens
    vocab_size: int
    bias: bool  # in Linear and LayerNorm


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.n_head = shape.n_head
        self.dropout = dropout
        self.qkv = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.out = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, n_embd) -> the same."""
        rows, tokens, width = x.shape
        heads = (part.view(rows, tokens, self.n_head, -1).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
        query, key, value = heads  # each (rows, n_head, tokens, width / n_head)
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=drop, is_causal=True)
        return cast(Tensor, self.out(mixed.transpose(1, 2).reshape(rows, tokens, width)))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each behind a LayerNorm and added to the stream."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.attention = Attention(shape, dropout)
        self.norm_2 = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.up = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.down = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, n_embd) -> the same."""
        x = x + self.drop(self.attention(self.norm_1(x)))
        return x + cast(Tensor, self.drop(self.down(F.gelu(self.up(self.norm_2(x))))))


class GPT(nn.Module):
    """A language model whose forward pass gives the loss."""

    def __init__(
        self, shape: Shape, dropout: float, *, loss_chunks: int = 0, activation_checkpointing: bool = False
    ) -> None:
        """`loss_chunks` as in ChunkedCrossEntropy; with `activation_checkpointing` a block keeps only its input."""
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.positions = nn.Embedding(shape.block_size, shape.n_embd)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.n_layer))
        self.norm = nn.LayerNorm(shape.n_embd, bias=shape.bias)
        self.loss = ChunkedCrossEntropy(loss_chunks)
        self.activation_checkpointing = activation_checkpointing

    @classmethod
    def new(cls, shape: Shape, dropout: float, device: torch.device, seed: int, **options: Any) -> "GPT":
        """A model on `device` with weights that depend on nothing but `shape`, the kind of device and `seed`."""
        with device, _Uninitialized():  # so that no weight is made twice
            model = cls(shape, dropout, **options)
        generator = torch.Generator(device).manual_seed(seed)
        for name, parameter in model.named_parameters():
            parameter.data = empty_at_page(parameter)
            initialize(name, parameter, shape.n_layer, generator)
        return model

    def compile(self, **options: Any) -> None:
        """Compile the blocks and the loss, not all in one: the graph of a block serves every layer."""
        for block in self.blocks:
            block.compile(**options)
        self.loss.compile(**options)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Token ids (rows, tokens) -> what the output head sees (rows, tokens, n_embd)."""
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.drop(self.tokens(inputs) + self.positions(places))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.activation_checkpointing else block(x)
        return cast(Tensor, self.norm(x))

    def logits(self, inputs: Tensor) -> Tensor:
        """Token ids (rows, tokens) -> logits (rows, tokens, vocab_size)."""
        return F.linear(self.hidden(inputs), self.tokens.weight)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The SUM of the token losses (nats, float32) of int64 ids, both of shape (rows, tokens).

        A sum, because sums of unequal micro-batches add up exactly where means do not. The loss alone, because logits
        that leave the function would have to exist.
        """
        return self.loss(self.hidden(inputs).flatten(0, 1), self.tokens.weight, targets.flatten())

    def parameter_count(self) -> int:
        """Number of trainable values; the tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def decay_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Parameter groups for AdamW: matrices and embeddings decay, biases and gains do not."""
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]


class _Uninitialized(TorchFunctionMode):
    """Inside, modules are made without the initial values of their own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def initialize(name: str, parameter: nn.Parameter, n_layer: int, generator: torch.Generator) -> None:
    """GPT-2's initial weights; what a block adds to the stream is scaled down, so that the sum keeps unit variance."""
    if parameter.dim() < 2:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    else:
        std = 0.02 / math.sqrt(2 * n_layer) if name.endswith(("out.weight", "down.weight")) else 0.02
        parameter.normal_(std=std, generator=generator)
