"""The chunked loss is the plain loss: its value and its gradients, in every dtype, at every number of chunks."""

import pytest
import torch
from gpusup.trainer.loss import CHUNK_LOGITS, ChunkedCrossEntropy, rows_in_chunk
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# Largest difference of any value or gradient, as a fraction of the largest value: a few roundings of the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
Gradients = tuple[Tensor, Tensor, Tensor]


def loss_and_gradients(
    chunks: int, dtype: torch.dtype, hidden: Tensor, weight: Tensor, targets: Tensor, factor: float = 1.0
) -> Gradients:
    """The loss, and the gradients of `factor` times it."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = ChunkedCrossEntropy(chunks)(hidden, weight, targets)
    (loss * factor).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def random_problem(seed: int, rows: int, vocabulary: int, width: int, spread: float) -> Gradients:
    """Hidden states, weight and targets; `spread` is the standard deviation of the logits."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * (spread / width**0.5)
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def assert_equal(got: Gradients, wanted: Gradients, tolerance: float) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.isfinite(one).all()
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    chunks=st.integers(0, 9),
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 300),
    width=st.integers(1, 24),
    spread=st.sampled_from([0.01, 1.0, 10.0]),
    seed=st.integers(0, 2**32),
)
def test_chunked_equals_plain_when_shapes_and_dtypes_vary(
    dtype: torch.dtype, chunks: int, rows: int, vocabulary: int, width: int, spread: float, seed: int
) -> None:
    """More chunks than rows, a ragged last chunk and one row among them."""
    problem = random_problem(seed, rows, vocabulary, width, spread)
    # Relative to the plain loss in the same dtype, so that only what the chunks add is seen.
    plain = loss_and_gradients(1, dtype, *problem)
    assert_equal(loss_and_gradients(chunks, dtype, *problem), plain, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunked_stays_finite_when_logits_are_extreme(dtype: torch.dtype) -> None:
    """Certain and right, certain and wrong: probabilities of 1 and of 0 in float32."""
    hidden = torch.tensor([[200.0, 0.0], [200.0, 0.0], [0.0, -200.0], [0.0, 0.0]])
    weight = torch.tensor([[100.0, 1.0], [-100.0, 3.0], [0.5, 100.0]])
    targets = torch.tensor([0, 1, 2, 0])
    plain = loss_and_gradients(1, dtype, hidden, weight, targets)
    assert plain[0] > 50_000
    assert_equal(loss_and_gradients(3, dtype, hidden, weight, targets), plain, TOLERANCE[dtype])


def test_small_probabilities_reach_the_gradient_when_in_float16() -> None:
    """Of 40,000 tokens each has a probability of 2.5e-5, and its gradient, over 400,000 tokens, 6e-11."""
    hidden, weight, targets = random_problem(1, 16, 40_000, 32, 0.01)
    factor = 1 / 400_000
    exact = loss_and_gradients(1, torch.float32, hidden, weight, targets, factor)
    chunked = loss_and_gradients(4, torch.float16, hidden, weight, targets, factor)
    unseen = torch.ones(40_000, dtype=torch.bool)
    unseen[targets] = False  # weights of tokens that are no target: all they get is from small probabilities
    norm = exact[2][unseen].norm()
    assert norm > 0
    assert (chunked[2][unseen] - exact[2][unseen]).norm() <= 0.01 * norm


def test_weight_gradient_stays_finite_when_one_target_fills_a_float16_chunk() -> None:
    """Its sum over 4096 tokens is beyond 65504 at the scale in which float16 gradients are held."""
    hidden = torch.ones(4096, 8)
    weight, targets = torch.zeros(16, 8), torch.zeros(4096, dtype=torch.int64)
    exact = loss_and_gradients(1, torch.float32, hidden, weight, targets)
    assert_equal(loss_and_gradients(2, torch.float16, hidden, weight, targets), exact, TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_alone_equals_differentiable_loss_when_nothing_is_differentiated(dtype: torch.dtype) -> None:
    hidden, weight, targets = random_problem(2, 50, 100, 16, 3.0)
    weight.requires_grad_()
    loss = ChunkedCrossEntropy(7)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        differentiable = loss(hidden, weight, targets)
        with torch.no_grad():
            alone = loss(hidden, weight, targets)
    assert differentiable.requires_grad
    assert not alone.requires_grad
    assert torch.equal(differentiable, alone)


def test_gradients_add_up_when_the_loss_is_used_twice_in_a_step() -> None:
    """Two micro-batches of different sizes through one loss, backward after both."""
    loss = ChunkedCrossEntropy(3)
    hidden, weight, targets = random_problem(3, 30, 64, 8, 1.0)
    weight.requires_grad_()
    (loss(hidden[:20], weight, targets[:20]) + loss(hidden[20:], weight, targets[20:])).backward()
    assert weight.grad is not None
    whole = loss_and_gradients(1, torch.float32, hidden, weight.detach(), targets)[2]
    assert (weight.grad - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_second_backward_is_refused_when_the_gradients_were_handed_out() -> None:
    hidden, weight, targets = random_problem(4, 6, 10, 4, 1.0)
    loss = ChunkedCrossEntropy(2)(hidden, weight.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="use loss_chunks=1"):
        loss.backward()


@given(rows=st.integers(1, 100_000), vocabulary=st.integers(1, 300_000), chunks=st.integers(0, 64))
def test_chunks_hold_every_row_and_no_more_logits_than_allowed(rows: int, vocabulary: int, chunks: int) -> None:
    size = rows_in_chunk(rows, vocabulary, chunks, "cpu")
    number = -(-rows // size)
    assert 1 <= size <= rows
    if chunks:
        assert number <= chunks
    else:
        assert size == 1 or (size - 1) * vocabulary < CHUNK_LOGITS["cpu"]


def test_automatic_chunks_are_of_one_size_when_the_rows_allow_it() -> None:
    """What is compiled for one size of chunk serves all of them."""
    assert rows_in_chunk(12 * 256, 50304, 0, "cpu") == 512
    assert rows_in_chunk(16 * 1024, 50304, 0, "cuda") == 2048
    assert rows_in_chunk(12 * 256, 256, 0, "cpu") == 12 * 256
