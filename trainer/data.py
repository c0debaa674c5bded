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
from .shards import Stream, open_stream


class Tokens:
    """The tokens of one split; samples may begin anywhere in it, and cross from one shard into the next."""

    def __init__(self, stream: Stream, block_size: int, vocab_size: int) -> None:
        """`block_size` is the longest sample that will be asked for, in tokens. Raises TrainerError."""
        self.path = stream.path
        self.vocabulary = stream.vocabulary
        self.fingerprint = stream.fingerprint
        self.vocab_size = vocab_size
        self.block_size = block_size
        self._parts = stream.parts
        self._part_tokens = len(stream.parts[0])
        self._count = sum(map(len, stream.parts))
        if self._count <= block_size:
            raise TrainerError(
                f"{self.path}: {self._count} tokens are too few for block_size={block_size}; "
                f"prepare more text or lower block_size"
            )

    @classmethod
    def open(cls, data_dir: Path, split: str, block_size: int, vocab_size: int) -> "Tokens":
        """The tokens that prepare.py wrote for `split` (train or val), or a plain nanoGPT .bin."""
        return cls(open_stream(data_dir, split), block_size, vocab_size)

    def __len__(self) -> int:
        return self._count

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
        window = np.stack([self._window(int(start), block_size + 1) for start in starts])
        if window.max() >= self.vocab_size:
            raise TrainerError(
                f"{self.path}: holds the token {window.max()}, but vocab_size={self.vocab_size}; "
                f"prepare the text again or raise vocab_size"
            )
        tokens = torch.from_numpy(window.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def _window(self, start: int, count: int) -> npt.NDArray[np.uint16]:
        """`count` tokens from number `start` on."""
        part, at = divmod(start, self._part_tokens)
        pieces = [self._parts[part][at : at + count]]
        while (taken := sum(map(len, pieces))) < count:
            part += 1
            pieces.append(self._parts[part][: count - taken])
        return np.concatenate(pieces)


def scramble(seed: int, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Evenly distributed 64-bit values from a seed and counters (the SplitMix64 generator, random access)."""
    state = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + _mix(np.asarray([seed], dtype=np.uint64))
    return _mix(state)


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
