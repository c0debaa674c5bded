"""Tokens for the trainer's tests."""

from pathlib import Path

import numpy as np
import pytest


def write_tokens(folder: Path, vocabulary: int, count: int = 60_000) -> Path:
    """Tokens with something to learn: each is near the one before it."""
    walk = np.cumsum(np.random.default_rng(7).integers(-3, 4, count)) % vocabulary
    folder.mkdir(parents=True, exist_ok=True)
    walk.astype("<u2").tofile(folder / "train.bin")
    walk[: count // 10].astype("<u2").tofile(folder / "val.bin")
    return folder


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir for the vocabulary of the tiny model."""
    return write_tokens(tmp_path_factory.mktemp("tokens"), 256)


@pytest.fixture(scope="session")
def many_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir for a vocabulary large enough that the logits are most of the memory."""
    return write_tokens(tmp_path_factory.mktemp("many"), 16384)
