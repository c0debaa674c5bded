"""Which tokens a sample holds: a pure function of (seed, global sample number).

Nothing else enters: not the micro-batch, not how often the run was restarted, not the evaluations in between. A run
therefore resumes its data with one integer, the number of samples it has consumed.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import TrainerError

TOKEN = np.dtype("<u2")


class Tokens:
    """A token file (raw little-endian uint16), memory-mapped: it costs address space, not memory."""

    def __init__(self, path: Path, block_size: int, vocab_size: int) -> None:
        """Open `path`; `block_size` is the longest sample that will be asked for, in tokens."""
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError:
            raise TrainerError(
                f"{path}: no such token file; make it with `trainer/prepare.py FILE.parquet -o {path.parent}`"
            ) from None
        if size_bytes % TOKEN.itemsize:
            raise TrainerError(f"{path}: {size_bytes} bytes is not a whole number of uint16 tokens; prepare it again")
        if size_bytes // TOKEN.itemsize <= block_size:
            raise TrainerError(
                f"{path}: {size_bytes // TOKEN.itemsize} tokens are too few for block_size={block_size}; "
                f"prepare more text or lower block_size"
            )
        self.path = path
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.values = np.memmap(path, dtype=TOKEN, mode="r")

    def __len__(self) -> int:
        return len(self.values)

    def training(self, seed: int, first: int, count: int, block_size: int) -> tuple[Tensor, Tensor]:
        """Samples number `first` to `first + count - 1` of the training order, `block_size` tokens each.

        A sample starts at the same token whatever `block_size` is, so a sequence-length warm-up keeps the order too.
        """
        numbers = np.arange(first, first + count, dtype=np.uint64)
        return self._samples(scramble(seed, numbers) % np.uint64(self._starts), block_size)

    def validation(self, total: int, first: int, count: int, block_size: int) -> tuple[Tensor, Tensor]:
        """Samples `first` to `first + count - 1` of `total` fixed ones, spread evenly over the file."""
        numbers = np.arange(first, first + count, dtype=np.uint64)
        return self._samples(numbers * np.uint64(self._starts) // np.uint64(total), block_size)

    @property
    def _starts(self) -> int:
        return len(self) - self.block_size  # a sample needs one token more than its length: the last target

    def _samples(self, starts: npt.NDArray[np.uint64], block_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64, both (len(starts), block_size); the targets are the inputs one token later."""
        window = self.values[starts[:, None] + np.arange(block_size + 1, dtype=np.uint64)]
        if window.max() >= self.vocab_size:
            raise TrainerError(
                f"{self.path}: holds the token {window.max()}, but vocab_size={self.vocab_size}; "
                f"prepare the text again or raise vocab_size"
            )
        tokens = torch.from_numpy(window.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]


def scramble(seed: int, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Evenly distributed 64-bit values from a seed and counters (the SplitMix64 generator, random access)."""
    state = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + _mix(np.asarray([seed], dtype=np.uint64))
    return _mix(state)


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
