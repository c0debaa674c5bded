"""Where the text comes from: parquet files with a column of strings, and nanoGPT's plain .bin files of GPT-2 tokens.

Both are read as a stream, in order, about a megabyte at a time.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from . import bpe, encoder
from .errors import TrainerError
from .shards import TOKEN

BATCH_BYTES = 1 << 20
BATCH_ROWS = 512  # at most: where texts repeat, the size of a row group does not tell theirs
UNREADABLE = (pyarrow.ArrowException, OSError, UnicodeDecodeError)  # what pyarrow raises for a broken file


@dataclass
class Batch:
    """Consecutive documents of one file."""

    rows: int  # how many rows or documents were read, those left out included
    documents: Sequence[memoryview]  # UTF-8, or for a .bin the tokens, little-endian uint16
    left_out: Counter[str] = field(default_factory=Counter)  # why, and how many


def expand(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, folders as the parquet files in and below them, sorted. Raises TrainerError."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*.parquet") if file.is_file())
            if not found:
                raise TrainerError(f"{path}: no *.parquet file in this folder; give another folder, or files")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise TrainerError(f"{path}: no such file; check the path")
    if twice := [path for path, count in Counter(path.resolve() for path in files).items() if count > 1]:
        raise TrainerError(f"{twice[0]}: given twice; name each file once")
    return files


def open_source(path: Path, column: str) -> "ParquetSource | BinSource":
    """A source of either kind, checked as far as that is possible without reading it. Raises TrainerError."""
    return BinSource(path) if path.suffix == ".bin" else ParquetSource(path, column)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ParquetSource:
    """The strings of one column of a parquet file."""

    holds_tokens = False

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        try:
            with self._open() as file:
                self.rows: int = file.metadata.num_rows
                schema = file.schema_arrow
        except UNREADABLE as error:
            raise TrainerError(f"{path}: not a whole parquet file; download it again ({first_line(error)})") from None
        if column not in schema.names:
            raise TrainerError(
                f"{path}: no column named {column}; it has {', '.join(schema.names) or 'none'}: see --text-column"
            )
        kind = schema.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise TrainerError(f"{path}: the column {column} holds {kind}, not strings; choose with --text-column")

    def _open(self) -> pyarrow.parquet.ParquetFile:
        """Without read-ahead and with a small buffer: a row group is never in memory as a whole."""
        return pyarrow.parquet.ParquetFile(
            self.path, pre_buffer=False, buffer_size=BATCH_BYTES, page_checksum_verification=True
        )

    def text(self, document: memoryview) -> Iterator[memoryview]:
        """The text of a document, UTF-8, in parts."""
        yield document

    def pieces(self, document: memoryview) -> list[memoryview] | None:
        """What can be encoded one by one; None when that would take too much memory."""
        ends = encoder.cuts(document)
        return [document[begin:end] for begin, end in pairwise(ends)] if ends else None

    def batches(self, first_row: int) -> Iterator[Batch]:
        """The documents from row `first_row` on. Raises TrainerError when the file is damaged."""
        row = 0
        try:
            with self._open() as file:
                for group in range(file.metadata.num_row_groups):
                    facts = file.metadata.row_group(group)
                    if row + facts.num_rows <= first_row:
                        row += facts.num_rows
                        continue
                    for read in file.iter_batches(
                        batch_size=self._batch_rows(facts), row_groups=[group], columns=[self.column], use_threads=False
                    ):
                        begin = min(max(first_row - row, 0), read.num_rows)
                        row += read.num_rows
                        if begin < read.num_rows:
                            yield _texts(read.column(0)[begin:])
        except UNREADABLE as error:
            raise TrainerError(
                f"{self.path}: damaged after document {row:,}; download it again ({first_line(error)})"
            ) from None

    def _batch_rows(self, facts: pyarrow.parquet.RowGroupMetaData) -> int:
        """So many rows as make about BATCH_BYTES of text, by the mean over the row group."""
        text_bytes: int = sum(
            facts.column(index).total_uncompressed_size
            for index in range(facts.num_columns)
            if facts.column(index).path_in_schema == self.column
        )
        rows: int = facts.num_rows
        return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(text_bytes, 1)))


def _texts(strings: pyarrow.Array) -> Batch:
    """The strings of an array that are text, as views of its memory."""
    wide = pyarrow.types.is_large_string(strings.type)
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, "<i8" if wide else "<i4", len(strings) + 1, strings.offset * (8 if wide else 4))
    text = memoryview(data if data is not None else b"")
    present = [True] * len(strings) if not strings.null_count else strings.is_valid().to_pylist()
    all_valid = _is_utf8(strings)
    batch, documents = Batch(len(strings), ()), []
    for index, (begin, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        if not present[index]:
            batch.left_out["null"] += 1
        elif begin == end:
            batch.left_out["empty"] += 1
        elif not all_valid and not _is_utf8(strings[index : index + 1]):
            batch.left_out["not UTF-8"] += 1
        else:
            documents.append(text[begin:end])
    batch.documents = documents
    return batch


def _is_utf8(strings: pyarrow.Array) -> bool:
    try:
        strings.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


class BinSource:
    """The documents of a plain file of GPT-2 tokens, little-endian uint16, each ended by the end-of-text token."""

    holds_tokens = True

    def __init__(self, path: Path) -> None:
        self.path = path
        size_bytes = path.stat().st_size
        if size_bytes % TOKEN.itemsize or not size_bytes:
            raise TrainerError(f"{path}: {size_bytes} bytes are no uint16 tokens; give a file as nanoGPT writes it")
        self._tokens = np.memmap(path, dtype=TOKEN, mode="r")
        self.rows = sum(len(ends) for ends in self._ends()) + int(self._tokens[-1] != bpe.END_OF_TEXT)

    def _ends(self) -> Iterator[npt.NDArray[np.int64]]:
        """Where documents end, a megabyte at a time."""
        for begin in range(0, len(self._tokens), BATCH_BYTES):
            yield np.flatnonzero(self._tokens[begin : begin + BATCH_BYTES] == bpe.END_OF_TEXT) + begin

    def text(self, document: memoryview) -> Iterator[memoryview]:
        """The text of a document, UTF-8, in parts."""
        begins, lengths, text = self._table
        for tokens in map(partial(np.frombuffer, dtype=TOKEN), self.pieces(document)):
            ends = np.cumsum(lengths[tokens])
            shift = np.repeat(begins[tokens] - (ends - lengths[tokens]), lengths[tokens])
            yield memoryview(text[np.arange(ends[-1]) + shift])

    def pieces(self, document: memoryview) -> list[memoryview]:
        """The tokens of a document in parts of bounded size."""
        return [document[begin : begin + BATCH_BYTES] for begin in range(0, len(document), BATCH_BYTES)]

    @cached_property
    def _table(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Of every token, where its bytes begin in the third array, and how many they are."""
        encoding = bpe.gpt2()
        tokens = [encoding.decode_single_token_bytes(number) for number in range(bpe.END_OF_TEXT)]
        lengths = np.asarray([len(token) for token in tokens], dtype=np.int64)
        return np.cumsum(lengths) - lengths, lengths, np.frombuffer(b"".join(tokens), np.uint8)

    def batches(self, first_row: int) -> Iterator[Batch]:
        """The documents from number `first_row` on, without their end-of-text tokens. Raises TrainerError."""
        row, begin = 0, 0
        last = [] if self._tokens[-1] == bpe.END_OF_TEXT else [np.asarray([len(self._tokens)])]
        for ends in chain(self._ends(), last):
            begins = [begin, *(ends[:-1] + 1).tolist()] if len(ends) else []
            skipped = min(max(first_row - row, 0), len(ends))
            batch = Batch(len(ends) - skipped, ())
            documents = []
            for start, end in list(zip(begins, ends.tolist(), strict=True))[skipped:]:
                tokens = self._tokens[start:end]
                if start == end:
                    batch.left_out["empty"] += 1
                elif tokens.max() >= bpe.VOCABULARY:
                    raise TrainerError(
                        f"{self.path}: holds the token {tokens.max()} in document {row:,}; GPT-2's end at "
                        f"{bpe.VOCABULARY - 1}, so this is a file of another vocabulary"
                    )
                else:
                    documents.append(tokens.view(np.uint8).data)
            batch.documents = documents
            row += len(ends)
            begin = int(ends[-1]) + 1 if len(ends) else begin
            if batch.rows:
                yield batch


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
