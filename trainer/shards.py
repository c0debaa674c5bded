"""Token shards: the files that prepare.py writes and data.py reads. docs/data-format.md has the layout.

A split is one stream of tokens cut at fixed counts into `train-00000.tok`, `train-00001.tok`, ...; documents may cross
a cut. A plain nanoGPT `train.bin` is read as a stream in one piece.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import TrainerError

TOKEN = np.dtype("<u2")
SPLITS = ("train", "val")
MAGIC = b"GPUSUPTK"
VERSION = 1
HASH_BYTES = 32
# magic, version, header bytes, tokens, shard number, shards in the split, dtype, vocabulary, its size, end of text,
# split, fingerprint, number of sources; the SHA-256 of each source follows
FIXED = struct.Struct("<8sIIQII8s16sII8s32sI4x")
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Header:
    """What a shard says about itself."""

    tokens: int  # in this shard
    number: int  # of this shard, from 0
    shards: int  # in this split
    vocabulary: str  # name of the tokenizer
    vocabulary_size: int
    end_of_text: int  # the token after every document
    split: str
    fingerprint: bytes  # SHA-256 of everything that decides which tokens there are
    sources: tuple[bytes, ...]  # SHA-256 of each source file, in order

    @property
    def size_bytes(self) -> int:
        return header_bytes(len(self.sources))

    def pack(self) -> bytes:
        fixed = FIXED.pack(
            MAGIC,
            VERSION,
            self.size_bytes,
            self.tokens,
            self.number,
            self.shards,
            TOKEN.str.encode(),
            self.vocabulary.encode(),
            self.vocabulary_size,
            self.end_of_text,
            self.split.encode(),
            self.fingerprint,
            len(self.sources),
        )
        return (fixed + b"".join(self.sources)).ljust(self.size_bytes, b"\0")


def header_bytes(sources: int) -> int:
    """Size of a header that names so many sources: where the tokens begin."""
    return -(-(FIXED.size + HASH_BYTES * sources) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tok"


def read_header(path: Path) -> Header:
    """The header of a shard whose size it agrees with. Raises TrainerError."""
    with path.open("rb") as file:
        fixed = file.read(FIXED.size)
        if len(fixed) < FIXED.size or not fixed.startswith(MAGIC):
            raise TrainerError(f"{path}: not a token shard; prepare the text again")
        _, version, size_bytes, tokens, number, shards, dtype, vocabulary, size, end, split, fingerprint, sources = (
            FIXED.unpack(fixed)
        )
        if version != VERSION or _text(dtype) != TOKEN.str:
            raise TrainerError(f"{path}: written in version {version} of the format, this is {VERSION}; prepare again")
        hashes = file.read(HASH_BYTES * sources)
    expected_bytes = size_bytes + tokens * TOKEN.itemsize
    if path.stat().st_size != expected_bytes or size_bytes != header_bytes(sources):
        raise TrainerError(
            f"{path}: {path.stat().st_size:,} bytes, its header says {expected_bytes:,}; copy it again or prepare again"
        )
    return Header(
        tokens=tokens,
        number=number,
        shards=shards,
        vocabulary=_text(vocabulary),
        vocabulary_size=size,
        end_of_text=end,
        split=_text(split),
        fingerprint=fingerprint,
        sources=tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)),
    )


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "replace")


@dataclass(frozen=True)
class Stream:
    """The tokens of a split, memory-mapped: they cost address space, not memory."""

    path: Path  # its first file
    parts: Sequence[npt.NDArray[np.uint16]]  # all but the last of the same length
    vocabulary: str | None  # name of the tokenizer; a plain .bin does not say
    fingerprint: str  # equal only for the same tokens; of a plain .bin it is the size alone


def open_stream(data_dir: Path, split: str) -> Stream:
    """The shards of `split` in `data_dir`, otherwise its plain .bin.

    Raises TrainerError when there is neither, or when a shard is missing, damaged, or of another preparation.
    """
    paths = sorted(data_dir.glob(f"{split}-*.tok"))
    plain = data_dir / f"{split}.bin"
    if not paths and not plain.exists():
        raise TrainerError(
            f"{plain}: no such token file, nor {shard_name(split, 0)} beside it; "
            f"make it with `trainer/prepare.py FILE.parquet -o {data_dir}`"
        )
    if not paths:
        size_bytes = plain.stat().st_size
        if size_bytes % TOKEN.itemsize:
            raise TrainerError(f"{plain}: {size_bytes} bytes is not a whole number of uint16 tokens; prepare it again")
        return Stream(plain, [_map(plain, 0, size_bytes // TOKEN.itemsize)], None, f"bin:{size_bytes}")
    headers = [read_header(path) for path in paths]
    first = headers[0]
    alike = all(header.fingerprint == first.fingerprint and header.shards == len(paths) for header in headers)
    if not alike or [header.number for header in headers] != list(range(len(paths))):
        raise TrainerError(f"{data_dir}: the {split} shards are not one whole set; run prepare.py again, or copy again")
    if len({header.tokens for header in headers[:-1]}) > 1:
        raise TrainerError(f"{data_dir}: the {split} shards are not of one length; prepare the text again")
    parts = [_map(path, header.size_bytes, header.tokens) for path, header in zip(paths, headers, strict=True)]
    return Stream(paths[0], parts, first.vocabulary, first.fingerprint.hex())


def _map(path: Path, offset_bytes: int, tokens: int) -> npt.NDArray[np.uint16]:
    if not tokens:  # nothing to map
        return np.zeros(0, dtype=TOKEN)
    return np.memmap(path, dtype=TOKEN, mode="r", offset=offset_bytes, shape=(tokens,))
