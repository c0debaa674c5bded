"""The output head and its cross-entropy, a chunk of tokens at a time.

Of all that a step holds, the logits and what is made of them are the largest: (tokens, vocab_size), several times over.
Here they exist for one chunk only. As soon as a chunk has its logits they are turned, in place, into their own
gradient, and that into the gradients of the hidden states and of the weight. The backward pass only scales those, so
nothing is computed twice. The idea is that of Liger Kernel (Hsu et al., arXiv 2410.10989), here in plain PyTorch.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the name everybody knows it by)

# Logits in a chunk, at most, where the number of chunks is automatic: few enough to be a small part of a step's memory,
# so many that products run at full speed. Chunks small enough for a CPU's cache are slower than these, because each one
# adds to the whole gradient of the weight.
CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**27}
LEAST_CHUNK_LOGITS = 2**22  # fewer are not worth a chunk; up to that, a chunk is a quarter of a micro-batch at most
# float16 loses what is below 6e-8, as most probabilities in a large vocabulary are: its gradients are held times this.
FLOAT16_SCALE = 1024.0
SMALLEST = 1e-30  # probability whose logarithm float32 still gives exactly


class ChunkedCrossEntropy:
    """The SUM of the cross-entropies (nats, float32) of `hidden @ weight.T`, without all of the logits at once.

    Equal to the plain loss but for the order of float32 sums, and so are its gradients: products are in the autocast
    dtype, everything else in float32. The gradients serve one backward pass; a second one raises RuntimeError.
    """

    def __init__(self, chunks: int = 0) -> None:
        """`chunks` of each call: 1 is the plain loss, 0 chooses a number that suits the device."""
        self.chunks = chunks
        self.compiled = False
        self.plain, self.turn = plain_loss, turn_into_gradient

    def compile(self, **options: Any) -> None:
        """From now on, fuse what is done to the logits; each shape is compiled at its first call."""
        self.compiled = True
        self.plain = torch.compile(plain_loss, **options)
        self.turn = torch.compile(turn_into_gradient, **options)

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Of `hidden` (tokens, width), `weight` (vocab_size, width) and int64 `targets` (tokens,), all valid ids."""
        if self.chunks == 1:
            return self.plain(hidden, weight, targets)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        rows = rows_in_chunk(len(hidden), len(weight), self.chunks, device)
        with torch.autocast(device, enabled=False):
            if torch.is_grad_enabled():
                loss = _Differentiable.apply(hidden, weight, targets, rows, dtype, self)  # type: ignore[no-untyped-call]
                return cast(Tensor, loss)
            return self.value(hidden.to(dtype), weight.to(dtype), targets, rows)

    def value(self, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        """The loss alone; `hidden` and `weight` are in the dtype of their product."""
        total = torch.zeros((), device=hidden.device)
        logits = hidden.new_empty(rows, len(weight))  # one buffer for all: fresh memory costs more than the sums in it
        scratch = _float32_like(logits)
        for states, ids in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            chunk = torch.mm(states, weight.t(), out=logits[: len(ids)])
            total -= log_probabilities(chunk, scratch[: len(ids)]).gather(1, ids[:, None]).sum()
        return total

    def gradients(self, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and its gradients times `scale_of` the dtype of `hidden`; all float32."""
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight, dtype=torch.float32)
        logits = hidden.new_empty(rows, len(weight))
        scratch = None if self.compiled else _float32_like(logits)
        parts = (torch.split(tensor, rows) for tensor in (hidden, targets, grad_hidden))
        for number, (states, ids, grad) in enumerate(zip(*parts, strict=True)):
            chunk = torch.mm(states, weight.t(), out=logits[: len(ids)])
            total += self.turned(chunk, None if scratch is None else scratch[: len(ids)], states, weight, ids)
            grad.copy_(product(chunk, weight))
            if chunk.dtype == torch.float32:  # without a second tensor of the weight's size
                torch.addmm(grad_weight, chunk.t(), states, beta=float(number > 0), out=grad_weight)
            elif number:
                grad_weight += product(chunk.t(), states)
            else:
                grad_weight.copy_(product(chunk.t(), states))
        return total, grad_hidden, grad_weight

    def turned(self, logits: Tensor, scratch: Tensor | None, states: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        """Turn `logits` into their gradient; their loss. On a CPU by way of probabilities, one pass less, if it can."""
        if scratch is not None and not logits.is_cuda:
            loss = turn_by_probabilities(logits, scratch, ids)
            if loss.isfinite():
                return loss
            torch.mm(states, weight.t(), out=logits)  # again, for they are gone
        return self.turn(logits, scratch, ids)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        dtype: torch.dtype,
        loss: ChunkedCrossEntropy,
    ) -> Tensor:
        total, *gradients = loss.gradients(hidden.to(dtype), weight.to(dtype), targets, rows)
        ctx.gradients, ctx.scale, ctx.dtypes = gradients, scale_of(dtype), (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss keeps its gradients for one backward pass; for more use loss_chunks=1")
        (of_hidden, of_weight), ctx.gradients = ctx.gradients, None
        factor = grad.float() / ctx.scale
        return of_hidden.mul_(factor).to(ctx.dtypes[0]), of_weight.mul_(factor).to(ctx.dtypes[1]), *[None] * 4


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same from all logits at once, in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def rows_in_chunk(rows: int, vocab_size: int, chunks: int, device: str) -> int:
    """Rows in each chunk; the last may have fewer. `chunks` 0: of one size if possible, as code is compiled for one."""
    if chunks == 0:
        logits = rows * vocab_size
        most = max(min(CHUNK_LOGITS[device], logits // 4), LEAST_CHUNK_LOGITS)
        least = -(-logits // most)
        chunks = next((number for number in range(least, 2 * least) if rows % number == 0), least)
    return -(-rows // min(chunks, rows))


def scale_of(dtype: torch.dtype) -> float:
    """What gradients of logits in `dtype` are held times."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def log_probabilities(logits: Tensor, scratch: Tensor | None) -> Tensor:
    """In float32: in `scratch`, which is `logits` itself where they are float32; None makes it here."""
    wide = logits.float() if scratch is None else scratch.copy_(logits)
    return torch.log_softmax(wide, -1, out=wide)


def turn_into_gradient(logits: Tensor, scratch: Tensor | None, targets: Tensor) -> Tensor:
    """Replace `logits` by the gradient of their loss, times `scale_of` their dtype; the loss, summed, in float32."""
    wide = log_probabilities(logits, scratch)
    at = targets[:, None]
    loss = -wide.gather(1, at).sum()
    wide.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=torch.float32))
    _store(logits, wide)
    return loss


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`; in float32, except that of bfloat16 on the CPU, which has no such product but float32's range."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.float16:  # whose range a sum over thousands of tokens can leave
        return torch.mm(left.float(), right.float())
    return torch.mm(left, right)


def turn_by_probabilities(logits: Tensor, scratch: Tensor, targets: Tensor) -> Tensor:
    """As `turn_into_gradient`, faster where nothing is fused; not finite where a probability is too small for it."""
    wide = scratch if scratch is logits else scratch.copy_(logits)
    torch.softmax(wide, -1, out=wide)
    at = targets[:, None]
    probabilities = wide.gather(1, at)
    wide.scatter_add_(1, at, torch.full_like(at, -1, dtype=torch.float32))
    _store(logits, wide)
    return torch.where(probabilities > SMALLEST, -probabilities.log(), math.inf).sum()


def _store(logits: Tensor, gradient: Tensor) -> None:
    """Put a float32 gradient where the logits were, times `scale_of` their dtype."""
    if scale_of(logits.dtype) != 1.0:
        gradient.mul_(scale_of(logits.dtype))
    logits.copy_(gradient)


def _float32_like(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
