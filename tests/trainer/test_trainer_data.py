"""The order of the samples, the plan of the batches, the schedules: pure functions."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gpusup.trainer import schedule
from gpusup.trainer.data import Tokens, scramble
from gpusup.trainer.errors import TrainerError
from gpusup.trainer.shards import Header, shard_name
from hypothesis import given
from hypothesis import strategies as st
from trainer_runs import ROOT


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
    data = Tokens.open(tokens, "train", block_size=32, vocab_size=256)
    long_inputs, long_targets = data.training(3, 100, 5, 32)
    short_inputs, short_targets = data.training(3, 100, 5, 8)
    assert torch.equal(short_inputs, long_inputs[:, :8])
    assert torch.equal(short_targets, long_targets[:, :8])
    assert torch.equal(long_inputs[:, 1:], long_targets[:, :-1])


def test_validation_samples_are_the_same_for_every_micro_batch(tokens: Path) -> None:
    data = Tokens.open(tokens, "val", block_size=32, vocab_size=256)
    whole, _ = data.validation(24, 0, 24, 32)
    parts = torch.cat([data.validation(24, first, 5 if first < 20 else 4, 32)[0] for first in range(0, 24, 5)])
    assert torch.equal(whole, parts)


def shards(folder: Path, values: np.ndarray, cut: int, split: str = "train", fingerprint: bytes = b"f" * 32) -> Path:
    """Token shards as docs/data-format.md describes them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [values[begin : begin + cut].astype("<u2") for begin in range(0, len(values), cut)]
    for number, part in enumerate(parts):
        header = Header(len(part), number, len(parts), "gpt2", 50257, 50256, split, fingerprint, (b"s" * 32,) * 3)
        (folder / shard_name(split, number)).write_bytes(header.pack() + part.tobytes())
    return folder


@pytest.mark.parametrize("cut", [7, 33, 1000, 60_000])
def test_samples_do_not_depend_on_where_the_stream_is_cut(tokens: Path, tmp_path: Path, cut: int) -> None:
    """Shards give the samples that one plain file gives, those across a cut included, and a short last shard too."""
    values = np.fromfile(tokens / "train.bin", "<u2")[:5_000]
    plain = tmp_path / "plain"
    plain.mkdir()
    values.tofile(plain / "train.bin")
    one = Tokens.open(plain, "train", block_size=32, vocab_size=256)
    many = Tokens.open(shards(tmp_path / "cut", values, cut), "train", block_size=32, vocab_size=256)
    assert len(one) == len(many) == 5_000
    for ours, theirs in zip(many.training(3, 0, 500, 32), one.training(3, 0, 500, 32), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(many.validation(400, 0, 400, 32), one.validation(400, 0, 400, 32), strict=True):
        assert torch.equal(ours, theirs)


def test_tokens_say_which_tokenizer_and_which_data_they_are_of(tokens: Path, tmp_path: Path) -> None:
    values = np.arange(100) % 50
    first = Tokens.open(shards(tmp_path / "a", values, 30), "train", 8, 256)
    same = Tokens.open(shards(tmp_path / "b", values, 50), "train", 8, 256)
    other = Tokens.open(shards(tmp_path / "c", values, 30, fingerprint=b"g" * 32), "train", 8, 256)
    plain = Tokens.open(tokens, "train", 8, 256)
    assert first.vocabulary == "gpt2"
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert plain.vocabulary is None
    assert plain.fingerprint == "bin:120000"


def test_tokens_are_refused_when_missing_too_short_odd_or_of_another_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    with pytest.raises(TrainerError, match=r"no such token file.*prepare\.py"):
        Tokens.open(tmp_path, "train", 8, 256)
    path.write_bytes(b"\0" * 7)
    with pytest.raises(TrainerError, match="whole number"):
        Tokens.open(tmp_path, "train", 8, 256)
    path.write_bytes(b"")
    with pytest.raises(TrainerError, match="too few for block_size=8"):
        Tokens.open(tmp_path, "train", 8, 256)
    path.write_bytes(b"\0" * 16)
    with pytest.raises(TrainerError, match="too few for block_size=8"):
        Tokens.open(tmp_path, "train", 8, 256)
    path.write_bytes(b"\xff\x00" * 50)
    with pytest.raises(TrainerError, match="the token 255, but vocab_size=255"):
        Tokens.open(tmp_path, "train", 8, 255).training(0, 0, 4, 8)


def test_shards_are_refused_when_one_is_missing_cut_short_foreign_or_of_another_set(tmp_path: Path) -> None:
    values = np.arange(100) % 50

    def refused(change: Callable[[Path], object], message: str) -> None:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        change(shards(tmp_path / "data", values, 30))
        with pytest.raises(TrainerError, match=message):
            Tokens.open(tmp_path / "data", "train", 8, 256)

    refused(lambda data: (data / "train-00001.tok").unlink(), "not one whole set")
    refused(lambda data: (data / "train-00003.tok").unlink(), "not one whole set")
    refused(lambda data: os.truncate(data / "train-00002.tok", 200), "its header says")
    refused(lambda data: os.truncate(data / "train-00002.tok", 20), "not a token shard")
    refused(lambda data: (data / "train-00001.tok").write_bytes(bytes(252)), "not a token shard")
    refused(
        lambda data: shutil.copy(
            shards(tmp_path / "other", values, 30, fingerprint=b"g" * 32) / "train-00001.tok", data
        ),
        "not one whole set",
    )


def test_documented_way_reads_a_shard(tmp_path: Path) -> None:
    """The five lines of docs/data-format.md, run as they stand there."""
    text = (ROOT / "docs" / "data-format.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    shards(tmp_path, np.arange(100), 70)
    found: dict[str, object] = {"path": str(tmp_path / "train-00001.tok")}
    exec(code[1], found)
    assert isinstance(found["tokens"], np.ndarray)
    assert found["tokens"].tolist() == list(range(70, 100))


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
