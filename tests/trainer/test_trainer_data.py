"""The order of the samples, the plan of the batches, the schedules: pure functions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gpusup.trainer import schedule
from gpusup.trainer.data import Tokens, scramble
from gpusup.trainer.errors import TrainerError
from hypothesis import given
from hypothesis import strategies as st


@given(seed=st.integers(0, 2**40), first=st.integers(0, 2**40), sizes=st.lists(st.integers(1, 20), min_size=1))
def test_order_does_not_depend_on_how_it_is_cut(seed: int, first: int, sizes: list[int]) -> None:
    """Sample numbers asked for in pieces give what they give at once."""
    numbers = np.arange(first, first + sum(sizes), dtype=np.uint64)
    cuts = np.split(numbers, np.cumsum(sizes)[:-1])
    assert np.array_equal(np.concatenate([scramble(seed, cut) for cut in cuts]), scramble(seed, numbers))


def test_order_spreads_evenly_and_changes_with_the_seed() -> None:
    """Every tenth of the file is drawn about equally often."""
    numbers = np.arange(100_000, dtype=np.uint64)
    tenths = np.bincount((scramble(1, numbers) % np.uint64(10)).astype(int), minlength=10)
    assert tenths.min() > 9_600
    assert tenths.max() < 10_400
    assert not np.array_equal(scramble(1, numbers), scramble(2, numbers))


def test_samples_start_at_the_same_token_when_they_are_shorter(tokens: Path) -> None:
    """A sequence-length warm-up sees the beginnings of the samples that the full length would have seen."""
    data = Tokens(tokens / "train.bin", block_size=32, vocab_size=256)
    long_inputs, long_targets = data.training(3, 100, 5, 32)
    short_inputs, short_targets = data.training(3, 100, 5, 8)
    assert torch.equal(short_inputs, long_inputs[:, :8])
    assert torch.equal(short_targets, long_targets[:, :8])
    assert torch.equal(long_inputs[:, 1:], long_targets[:, :-1])


def test_validation_samples_are_the_same_for_every_micro_batch(tokens: Path) -> None:
    data = Tokens(tokens / "val.bin", block_size=32, vocab_size=256)
    whole, _ = data.validation(24, 0, 24, 32)
    parts = torch.cat([data.validation(24, first, 5 if first < 20 else 4, 32)[0] for first in range(0, 24, 5)])
    assert torch.equal(whole, parts)


def test_token_file_is_refused_when_missing_too_short_odd_or_of_another_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    with pytest.raises(TrainerError, match=r"no such token file.*prepare\.py"):
        Tokens(path, 8, 256)
    path.write_bytes(b"\0" * 7)
    with pytest.raises(TrainerError, match="whole number"):
        Tokens(path, 8, 256)
    path.write_bytes(b"\0" * 16)
    with pytest.raises(TrainerError, match="too few for block_size=8"):
        Tokens(path, 8, 256)
    path.write_bytes(b"\xff\x00" * 50)
    with pytest.raises(TrainerError, match="the token 255, but vocab_size=255"):
        Tokens(path, 8, 255).training(0, 0, 4, 8)


@given(global_batch_size=st.integers(1, 2000), batch_size=st.integers(1, 2000))
def test_micro_batches_fill_the_global_batch_exactly(global_batch_size: int, batch_size: int) -> None:
    rows = schedule.micro_batches(global_batch_size, batch_size)
    assert sum(rows) == global_batch_size
    assert set(rows[:-1]) <= {batch_size}
    assert 0 < rows[-1] <= batch_size


@given(doublings=st.integers(0, 8), warmup_iters=st.integers(0, 500))
def test_stages_share_the_warmup_equally(doublings: int, warmup_iters: int) -> None:
    """Every stage before the last gets its share, give or take a step; after the warm-up it is the full length."""
    sizes = schedule.stages(4, 4 << doublings)
    steps = [schedule.block_size_at(step, sizes, warmup_iters) for step in range(warmup_iters)]
    assert steps == sorted(steps)
    assert schedule.block_size_at(warmup_iters, sizes, warmup_iters) == 4 << doublings
    if doublings:
        shares = [steps.count(size) for size in sizes[:-1]]
        assert max(shares) - min(shares) <= 1
        assert sum(shares) == warmup_iters


def test_stages_are_refused_when_doublings_miss_the_full_length() -> None:
    with pytest.raises(ValueError, match="block_size_start=48 never gives block_size=128"):
        schedule.stages(48, 128)


@given(warmup_iters=st.integers(0, 20), decay_iters=st.integers(0, 20), step=st.integers(0, 40))
def test_learning_rate_stays_between_its_bounds(warmup_iters: int, decay_iters: int, step: int) -> None:
    """Also where the warm-up or the decay has no steps at all, or the one is longer than the other."""
    rate = schedule.learning_rate_at(step, 1.0, 0.1, warmup_iters, decay_iters)
    assert 0 < rate <= 1.0
    assert rate >= 0.1 or step < warmup_iters
