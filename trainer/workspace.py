"""A preparation under way: a folder inside the output folder, from which it continues after any interruption.

The streams of tokens grow in it; now and then they are made durable and `progress.json` is replaced by one that says
how far that is. Whatever was written after that is cut off when the work continues. The files move to their final
names when all of them are complete.
"""

import fcntl
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from .durable import sync_directory
from .errors import TrainerError
from .shards import SPLITS, TOKEN, Header, header_bytes, shard_name

FOLDER = "unfinished"
META = "meta.json"
READING, COMPLETE, MOVING = "reading", "complete", "moving"


@dataclass
class Progress:
    """How far a preparation has come; all counts are of the documents before this place."""

    source: int = 0  # index of the file
    row: int = 0  # rows of it that are done
    text_bytes: int = 0
    documents: list[int] = field(default_factory=lambda: [0, 0])  # by split
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # by split
    left_out: dict[str, int] = field(default_factory=dict)  # documents, by reason
    stage: str = READING

    def leave_out(self, why: str, count: int = 1) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + count


class StreamWriter:
    """Appends tokens to a split, cut into files of `shard_tokens` tokens."""

    def __init__(self, folder: Path, split: str, shard_tokens: int | None, header: int, tokens: int) -> None:
        """Continue after `tokens` tokens: what was written beyond them is removed. None: one file without header."""
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.header_bytes = header if shard_tokens else 0
        self.tokens = tokens
        self.file: BinaryIO | None = None
        for path in self._files()[self.shards :]:
            path.unlink()
        if self._in_shard():
            self._open()

    @property
    def shards(self) -> int:
        return -(-self.tokens // self.shard_tokens) if self.shard_tokens else min(self.tokens, 1)

    def path(self, number: int) -> Path:
        return self.folder / (shard_name(self.split, number) if self.shard_tokens else f"{self.split}.bin")

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.split}-*.tok" if self.shard_tokens else f"{self.split}.bin"))

    def _in_shard(self) -> int:
        return self.tokens % self.shard_tokens if self.shard_tokens else self.tokens

    def _open(self) -> None:
        """The file that the next token belongs to, cut behind the last."""
        number = self.tokens // self.shard_tokens if self.shard_tokens else 0
        path = self.path(number)
        self.file = path.open("r+b" if path.exists() else "w+b", buffering=1 << 20)
        self.file.truncate(self.header_bytes + self._in_shard() * TOKEN.itemsize)
        self.file.seek(0, os.SEEK_END)

    def append(self, tokens: bytes) -> None:
        """Little-endian uint16."""
        rest = memoryview(tokens)
        while rest:
            if self.file is None:
                self._open()
            assert self.file is not None
            room = (self.shard_tokens - self._in_shard()) * TOKEN.itemsize if self.shard_tokens else len(rest)
            self.file.write(rest[:room])
            self.tokens += len(rest[:room]) // TOKEN.itemsize
            rest = rest[room:]
            if self.shard_tokens and not self._in_shard():
                self.sync()
                self.file.close()
                self.file = None

    def finish(self, header: Header) -> None:
        """Give every shard its header: only now can it be taken for one."""
        self.sync()
        self.close()
        for number in range(self.shards if self.shard_tokens else 0):
            assert self.shard_tokens is not None
            tokens = min(self.shard_tokens, self.tokens - number * self.shard_tokens)
            with self.path(number).open("r+b") as file:
                file.write(replace(header, split=self.split, number=number, shards=self.shards, tokens=tokens).pack())
                file.flush()
                os.fsync(file.fileno())

    def sync(self) -> None:
        """Make what was appended durable."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Let go of the file; a full disk may keep its last bytes from being written."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
            self.file = None


class Workspace:
    """The folder of one preparation; one process at a time works in it."""

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        """Lock `out`, made if need be. `plan` is what decides the result, as JSON. Raises TrainerError when locked."""
        self.out, self.plan = out, plan
        self.folder = out / FOLDER
        out.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise TrainerError(f"{out}: another prepare.py is at work there; wait for it, or use another -o") from None

    def close(self) -> None:
        os.close(self._lock)

    def finished(self) -> dict[str, Any] | None:
        """meta.json of `out`, if these very tokens are already there in full."""
        meta = _read(self.out / META)
        if meta is None or any(meta.get(key) != value for key, value in self.plan.items()):
            return None
        files = [self.out / name for split in SPLITS for name in meta[split]["files"]]
        if not all(path.is_file() and path.stat().st_size == meta["file_bytes"][path.name] for path in files):
            return None
        if _read(self.folder / "plan.json") in (None, self.plan):
            shutil.rmtree(self.folder, ignore_errors=True)
        return meta

    def resume(self, restart: bool) -> Progress:
        """Where to go on: the place an interrupted preparation of the same plan has reached, otherwise the beginning.

        Raises TrainerError when the unfinished work is of another plan, or would replace files that are not ours.
        """
        earlier = _read(self.folder / "plan.json")
        if earlier is not None and not restart:
            if earlier != self.plan:
                raise TrainerError(
                    f"{self.folder}: unfinished work of another preparation ({_difference(earlier, self.plan)}); "
                    f"put that back to continue, or begin anew with --restart"
                )
            return Progress(**(_read(self.folder / "progress.json") or {}))
        if not (self.out / META).exists() and (theirs := [path for path in self._tokens(self.out) if path.exists()]):
            raise TrainerError(f"{theirs[0]}: in the way, and not made by prepare.py; move it or use another -o")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self._write("plan.json", self.plan)
        return Progress()

    def writers(self, progress: Progress) -> list[StreamWriter]:
        """One for each split, after the tokens that are known to be whole."""
        header = header_bytes(len(self.plan["sources"]))
        limit = self.plan["shard_tokens"]
        return [
            StreamWriter(self.folder, split, limit, header, tokens)
            for split, tokens in zip(SPLITS, progress.tokens, strict=True)
        ]

    def commit(self, progress: Progress, writers: list[StreamWriter]) -> None:
        """Make all that was appended durable, then say so."""
        for writer in writers:
            writer.sync()
        progress.tokens = [writer.tokens for writer in writers]
        self._write("progress.json", asdict(progress))

    def install(self, progress: Progress, meta: dict[str, Any] | None = None) -> None:
        """Put the complete files in the place of any earlier ones. Interrupted, it is to be called again."""
        if progress.stage == READING:
            self._write(META, meta)
            progress.stage = COMPLETE
            self._write("progress.json", asdict(progress))
        if progress.stage == COMPLETE:
            (self.out / META).unlink(missing_ok=True)  # it never describes other tokens than those beside it
            for path in self._tokens(self.out):
                path.unlink(missing_ok=True)
            sync_directory(self.out)
            progress.stage = MOVING
            self._write("progress.json", asdict(progress))
        for path in [*self._tokens(self.folder), self.folder / META]:
            if path.exists():
                path.replace(self.out / path.name)
        sync_directory(self.out)
        self.discard()

    def discard(self) -> None:
        """Forget the unfinished work."""
        shutil.rmtree(self.folder)

    def _tokens(self, folder: Path) -> list[Path]:
        return [path for split in SPLITS for path in [*sorted(folder.glob(f"{split}-*.tok")), folder / f"{split}.bin"]]

    def _write(self, name: str, content: object) -> None:
        """Replace a file of the folder, durably."""
        temporary = self.folder / f"{name}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / name)
        sync_directory(self.folder)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _difference(earlier: dict[str, Any], plan: dict[str, Any]) -> str:
    """The first thing in which two plans differ, in words."""
    for key, value in plan.items():
        if key != "sources" and earlier.get(key) != value:
            return f"{key} was {earlier.get(key)}, is {value}"
    before, now = earlier["sources"], plan["sources"]
    if len(before) != len(now):
        return f"{len(before)} sources then, {len(now)} now"
    return next(f"{new['name']} is not the same file" for old, new in zip(before, now, strict=True) if old != new)
