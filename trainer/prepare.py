"""Turn parquet files with a `text` column into the tokens that train.py reads.

    python trainer/prepare.py FILE.parquet ... -o DIR [--val-fraction 0.01]
    python -m gpusup.trainer.prepare FILE.parquet ... -o DIR [--val-fraction 0.01]

DIR gets train.bin and val.bin (raw uint16, each document followed by the end-of-text token 50256) and meta.json. A
document goes to one of the two by a checksum of its text: the split does not depend on the order of the files, and the
same text is never in both.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if not __package__:  # run by path: what must be importable is this package, not the modules inside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "trainer"

import numpy as np
import pyarrow
import pyarrow.parquet

from . import bpe
from .data import TOKEN
from .errors import TrainerError

BATCH_ROWS = 512  # documents in memory at once
BAR_WIDTH = 30
LINE_EVERY_S = 5.0


class Progress:
    """A bar on a terminal, a plain line every few seconds in a pipe; on standard error."""

    def __init__(self, total_rows: int) -> None:
        self.total_rows = max(total_rows, 1)
        self.rows = self.tokens = 0
        self.begin_s = self.shown_s = time.monotonic()

    def add(self, rows: int, tokens: int) -> None:
        """Count what is done and show it when it is time."""
        self.rows += rows
        self.tokens += tokens
        now_s = time.monotonic()
        if now_s - self.shown_s < (0.1 if sys.stderr.isatty() else LINE_EVERY_S) and self.rows < self.total_rows:
            return
        self.shown_s = now_s
        share = self.rows / self.total_rows
        line = (
            f"{share:4.0%}  {self.rows:,} of {self.total_rows:,} documents, {self.tokens:,} tokens, "
            f"{self.tokens / max(now_s - self.begin_s, 1e-9):,.0f} tok/s"
        )
        if sys.stderr.isatty():
            filled = round(share * BAR_WIDTH)
            print(f"\r[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)


class TokenFile:
    """A token file under way: it gets its name only when all of it is on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f"{path.name}.tmp")
        self.file: BinaryIO = self.temporary.open("wb")
        self.documents = self.tokens = 0

    def append(self, tokens: list[int]) -> None:
        """One document, and the end of it."""
        np.asarray([*tokens, bpe.END_OF_TEXT], dtype=TOKEN).tofile(self.file)
        self.documents += 1
        self.tokens += len(tokens) + 1

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.temporary.replace(self.path)

    def discard(self) -> None:
        """Nothing remains of a file that was not finished."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def prepare(sources: list[Path], out: Path, val_fraction: float) -> dict[str, object]:
    """Write the tokens of `sources` to `out`; the content of meta.json. A TrainerError leaves `out` as it was."""
    if not 0 < val_fraction < 1:
        raise TrainerError(f"--val-fraction {val_fraction}: give a number between 0 and 1, such as 0.01")
    files = [(path, open_source(path)) for path in sources]
    out.mkdir(parents=True, exist_ok=True)
    train, val = TokenFile(out / "train.bin"), TokenFile(out / "val.bin")
    try:
        encode(files, train, val, val_fraction)
        for part in (train, val):
            if not part.documents:
                raise TrainerError(
                    f"no document fell to {part.path.name} ({train.documents + val.documents} in all, "
                    f"--val-fraction {val_fraction}); give more text or another fraction"
                )
        meta: dict[str, object] = {
            "vocabulary": {"encoding": "gpt2", "size": bpe.VOCABULARY, "end_of_text": bpe.END_OF_TEXT},
            "dtype": "uint16, little-endian",
            "val_fraction": val_fraction,
            "train": {"documents": train.documents, "tokens": train.tokens},
            "val": {"documents": val.documents, "tokens": val.tokens},
            "sources": [{"name": path.name, "sha256": sha256(path)} for path in sources],
        }
        (out / "meta.json").unlink(missing_ok=True)  # it never describes other tokens than those beside it
        train.finish()
        val.finish()
    except BaseException:
        train.discard()
        val.discard()
        raise
    temporary = out / "meta.json.tmp"
    temporary.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    temporary.replace(out / "meta.json")
    return meta


def encode(
    files: list[tuple[Path, pyarrow.parquet.ParquetFile]], train: TokenFile, val: TokenFile, val_fraction: float
) -> None:
    """Append the documents of all files to the one or the other token file."""
    encoding = bpe.gpt2()
    progress = Progress(sum(file.metadata.num_rows for _, file in files))
    for path, file in files:
        for rows, texts in batches(path, file):
            documents = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
            for text, tokens in zip(texts, documents, strict=True):
                (val if belongs_to_validation(text, val_fraction) else train).append(tokens)
            progress.add(rows, sum(map(len, documents)))
    progress.close()


def open_source(path: Path) -> pyarrow.parquet.ParquetFile:
    """A parquet file with a column of text, open. Raises TrainerError saying why it is not one."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except FileNotFoundError:
        raise TrainerError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise TrainerError(f"{path}: not a whole parquet file; download it again ({first_line(error)})") from None
    columns = file.schema_arrow.names
    if "text" not in columns:
        raise TrainerError(f"{path}: no column named text; it has {', '.join(columns) or 'none'}")
    kind = file.schema_arrow.field("text").type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise TrainerError(f"{path}: the column text holds {kind}, not strings")
    return file


def batches(path: Path, file: pyarrow.parquet.ParquetFile) -> Iterator[tuple[int, list[str]]]:
    """The rows of a file, a few at a time: how many were read, and the texts of those that have one."""
    read = 0
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=["text"]):
            texts = batch.column(0).to_pylist()
            read += len(texts)
            yield len(texts), [text for text in texts if text]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TrainerError(
            f"{path}: damaged after document {read:,}; download it again ({first_line(error)})"
        ) from None


def belongs_to_validation(text: str, val_fraction: float) -> bool:
    """Whether a document is for validation, decided by its text alone."""
    return zlib.crc32(text.encode()) < val_fraction * 2**32


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def main() -> None:
    """Read the command line and prepare."""
    parser = argparse.ArgumentParser(prog="prepare.py", description="Turn parquet files into the tokens of train.py.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.parquet", help="must have a column named text")
    parser.add_argument(
        "-o", "--out", required=True, type=Path, metavar="DIR", help="gets train.bin, val.bin, meta.json"
    )
    parser.add_argument("--val-fraction", type=float, default=0.01, help="share of the documents (default: 0.01)")
    options = parser.parse_args()
    try:
        meta = prepare(options.files, options.out, options.val_fraction)
    except TrainerError as error:
        raise SystemExit(f"prepare.py: {error}") from None
    print(f"{options.out}: train {meta['train']}, val {meta['val']}")
    print(f"next: trainer/train.py --data_dir={options.out}")


if __name__ == "__main__":
    main()
