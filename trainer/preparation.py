"""From text to tokens: one process reads and writes, in order; the others encode.

The order of the sources alone decides the result, so that it is the same, byte for byte, for any number of workers,
either encoder, and any number of interruptions.
"""

import copy
import errno
import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from isal import isal_zlib

from . import bpe, encoder, sources
from .errors import TrainerError
from .pool import Encoded, Piece, Pool, WorkerKilled
from .progress import ProgressBar
from .shards import SPLITS, VERSION, Header
from .sources import BinSource, ParquetSource
from .workspace import READING, Progress, StreamWriter, Workspace

TASK_BYTES = 1 << 20  # text given to a worker at once
COMMIT_EVERY_S = 2.0  # what an interruption can cost
SAMPLE_DOCUMENTS = 64  # on which a faster encoder is compared
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
VOCABULARY = {"encoding": "gpt2", "size": bpe.VOCABULARY, "end_of_text": bpe.END_OF_TEXT}


@dataclass(frozen=True)
class Options:
    """How to prepare; all but the last four decide the result."""

    text_column: str = "text"
    val_fraction: float = 0.01  # of the documents
    shard_tokens: int | None = 100_000_000  # None: plain .bin files
    workers: int = 1
    encoder: str = "auto"
    restart: bool = False


@dataclass
class Task:
    """Pieces that are encoded together."""

    pieces: list[Piece] = field(default_factory=list)
    size_bytes: int = 0
    reached: Progress | None = None  # the place after it; None in the middle of a document


def prepare(paths: Sequence[Path], out: Path, options: Options) -> dict[str, Any]:
    """Write the tokens of the documents in `paths` to `out`; the content of meta.json.

    An interrupted preparation is continued. Raises TrainerError; the tokens that were in `out` are then still there.
    """
    if not 0 < options.val_fraction < 1:
        raise TrainerError(f"--val-fraction {options.val_fraction}: give a number between 0 and 1, such as 0.01")
    if options.workers < 1 or (options.shard_tokens is not None and options.shard_tokens < 1):
        raise TrainerError("--workers and --shard-tokens must be at least 1")
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others keep what a long document needed once
    files = sources.expand(paths)
    opened = [sources.open_source(path, options.text_column) for path in files]
    try:
        return _prepare(opened, out, options)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise TrainerError(
                f"{out}: the disk is full ({error.strerror}); make room and give the same command again, it continues"
            ) from None
        raise TrainerError(
            f"{error.filename or out}: {error.strerror}; nothing is lost, give the command again"
        ) from None


def _prepare(opened: Sequence[ParquetSource | BinSource], out: Path, options: Options) -> dict[str, Any]:
    paths = [source.path for source in opened]
    before = [stamp(path) for path in paths]
    plan = make_plan(paths, options)
    workspace = Workspace(out, plan)
    try:
        if meta := workspace.finished():
            say(f"{out} already holds these tokens")
            return meta
        progress = workspace.resume(options.restart)
        if progress.stage != READING:
            workspace.install(progress)
        else:
            writers = workspace.writers(progress)
            try:
                progress = encode_all(opened, workspace, writers, progress, options)
                if changed := [path for path, was in zip(paths, before, strict=True) if stamp(path) != was]:
                    workspace.discard()
                    raise TrainerError(f"{changed[0]}: changed while it was read; give the command again")
                complete(workspace, writers, progress)
            finally:
                for writer in writers:
                    writer.close()
        result = workspace.finished()
        assert result is not None
        return result
    finally:
        workspace.close()


def stamp(path: Path) -> tuple[int, int]:
    """What changes when somebody writes to the file."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def make_plan(paths: Sequence[Path], options: Options) -> dict[str, Any]:
    """Everything that decides the result."""
    with ThreadPoolExecutor(options.workers) as threads:
        hashes = list(threads.map(sources.sha256, paths))
    return {
        "version": VERSION,
        "vocabulary": VOCABULARY,
        "text_column": options.text_column,
        "val_fraction": options.val_fraction,
        "shard_tokens": options.shard_tokens,
        "sources": [
            {"name": path.name, "size_bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, hashes, strict=True)
        ],
    }


def fingerprint(plan: dict[str, Any]) -> bytes:
    """SHA-256 of what decides which tokens there are, and in which order; not of how they are cut into files."""
    decisive = {key: plan[key] for key in ("version", "vocabulary", "text_column", "val_fraction")}
    decisive["sources"] = [source["sha256"] for source in plan["sources"]]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).digest()


def encode_all(
    opened: Sequence[ParquetSource | BinSource],
    workspace: Workspace,
    writers: list[StreamWriter],
    progress: Progress,
    options: Options,
) -> Progress:
    """Append to `writers` what is still missing after `progress`; the place reached."""
    name, why = encoder.choose(options.encoder, sample(opened))
    if why:
        say(why)
    if progress.source or progress.row:
        say(f"continuing after {progress.text_bytes / 1e6:,.0f} MB of text")
    bar = ProgressBar([source.rows for source in opened], progress, f"{name}, workers: {options.workers}")
    committed_s = time.monotonic()
    with Pool(options.workers, name) as pool:
        try:
            for task, tokens in in_order(pool, options.workers, tasks(opened, progress, options.val_fraction)):
                for writer, part in zip(writers, tokens, strict=True):
                    writer.append(part)
                if task.reached is None:
                    continue
                progress = task.reached
                if time.monotonic() - committed_s > COMMIT_EVERY_S:
                    workspace.commit(progress, writers)
                    committed_s = time.monotonic()
                bar.show(progress, sum(writer.tokens for writer in writers))
        except WorkerKilled:
            raise TrainerError(
                f"{workspace.out}: a worker was killed, perhaps because memory ran out; "
                f"give the same command again, it continues (--workers N needs less memory with a smaller N)"
            ) from None
        finally:
            bar.close()
    return progress


def sample(opened: Sequence[ParquetSource | BinSource]) -> Iterator[bytes]:
    """A few documents to compare encoders on."""
    for source in opened:
        if isinstance(source, ParquetSource):
            for batch in islice(source.batches(0), 1):
                short = (document for document in batch.documents if len(document) <= encoder.PIECE_BYTES)
                yield from map(bytes, islice(short, SAMPLE_DOCUMENTS))
            return


def in_order(pool: Pool, workers: int, given: Iterable[Task]) -> Iterator[tuple[Task, Encoded]]:
    """Every task with its tokens, as given; a few are under way at any time."""
    under_way: deque[tuple[Task, Future[Encoded]]] = deque()
    for task in given:
        under_way.append((task, pool.submit(task.pieces)))
        if len(under_way) > 2 * workers + 1:
            first, future = under_way.popleft()
            yield first, future.result()
    for task, future in under_way:
        yield task, future.result()


def tasks(opened: Sequence[ParquetSource | BinSource], begin: Progress, val_fraction: float) -> Iterator[Task]:
    """What is to be encoded after `begin`, in pieces of about a megabyte."""
    done, task = copy.deepcopy(begin), Task()
    for number in range(begin.source, len(opened)):
        source = opened[number]
        done.source, done.row = number, begin.row if number == begin.source else 0
        for batch in source.batches(done.row):
            for document in batch.documents:
                pieces = source.pieces(document)
                if pieces is None:
                    done.leave_out("unbroken")
                    continue
                checksum = 0
                for part in source.text(document):
                    checksum = isal_zlib.crc32(part, checksum)
                    done.text_bytes += len(part)
                split = int(belongs_to_validation(checksum, val_fraction))
                done.documents[split] += 1
                for index, piece in enumerate(pieces, 1):
                    task.pieces.append(Piece(split, bytes(piece), index == len(pieces), source.holds_tokens))
                    task.size_bytes += len(piece)
                    if task.size_bytes >= TASK_BYTES:
                        yield task
                        task = Task()
            done.row += batch.rows
            for why, count in batch.left_out.items():
                done.leave_out(why, count)
            if task.size_bytes >= TASK_BYTES // 2:
                task.reached = copy.deepcopy(done)
                yield task
                task = Task()
    done.source, done.row = len(opened), 0
    task.reached = done
    yield task


def belongs_to_validation(checksum: int, val_fraction: float) -> bool:
    """Whether a document is for validation, decided by the CRC-32 of its text alone."""
    return checksum < val_fraction * 2**32


def complete(workspace: Workspace, writers: list[StreamWriter], progress: Progress) -> None:
    """Finish the files, and put them in their place."""
    plan = workspace.plan
    for split, documents in zip(SPLITS, progress.documents, strict=True):
        if not documents:
            workspace.discard()
            raise TrainerError(
                f"no document fell to {split} ({sum(progress.documents)} in all, --val-fraction "
                f"{plan['val_fraction']}); give more text or another fraction"
            )
    header = Header(
        tokens=0,
        number=0,
        shards=0,
        vocabulary=plan["vocabulary"]["encoding"],
        vocabulary_size=bpe.VOCABULARY,
        end_of_text=bpe.END_OF_TEXT,
        split="",
        fingerprint=fingerprint(plan),
        sources=tuple(bytes.fromhex(source["sha256"]) for source in plan["sources"]),
    )
    for writer in writers:
        writer.finish(header)
    workspace.commit(progress, writers)
    paths = [[writer.path(number) for number in range(writer.shards)] for writer in writers]
    meta = {
        **plan,
        "dtype": "uint16, little-endian",
        "fingerprint": fingerprint(plan).hex(),
        "text_bytes": progress.text_bytes,
        "left_out": dict(sorted(progress.left_out.items())),
        **{
            writer.split: {"documents": documents, "tokens": writer.tokens, "files": [path.name for path in names]}
            for writer, documents, names in zip(writers, progress.documents, paths, strict=True)
        },
        "file_bytes": {path.name: path.stat().st_size for names in paths for path in names},
    }
    workspace.install(progress, meta)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
