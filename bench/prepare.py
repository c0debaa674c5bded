"""Speed and memory of trainer/prepare.py beside nanoGPT's way of preparing data, on the same text.

    python bench/prepare.py --peer-python VENV/bin/python [--megabytes 150] [--rounds 3]

`--peer-python` is an interpreter that has `datasets` and `tiktoken`; without it, only ours is measured. nanoGPT's way:
`load_dataset`, `map(num_proc=2)`, and the tokens written through a memory map. All run with two workers, one after the
other, round after round; times include the start of the program. Memory is the sum of PSS over the process tree.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
from gpusup.trainer import bpe
from gpusup.trainer.shards import SPLITS, open_stream
from table import row

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
DOCUMENT_CHARS = 3000
SAMPLE_EVERY_S = 0.05
PEER = "nanoGPT's way"
FOLDERS = ("/usr/share/doc", "/usr/share/man", "/usr/share/perl", sys.prefix, sys.base_prefix)
SUFFIXES = {".py", ".md", ".rst", ".txt", ".pod", ".html", ""}
PLAIN = re.compile(r"[^\W\d_]+|[ \n.,;:'\"()?!-]+")
# The names under which tiktoken looks for its two files.
CACHE_NAMES = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}
PEER_SCRIPT = """
import sys
import datasets, numpy, tiktoken
source, out, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
encoding = tiktoken.get_encoding("gpt2")

def tokens_of(row):
    tokens = encoding.encode_ordinary(row["text"])
    tokens.append(encoding.eot_token)
    return {"ids": tokens, "len": len(tokens)}

if __name__ == "__main__":
    whole = datasets.load_dataset("parquet", data_files=source, cache_dir=out + "/cache", split="train")
    parts = whole.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    parts = parts.map(tokens_of, remove_columns=["text"], num_proc=workers)
    for name, part in parts.items():
        count = numpy.sum(part["len"], dtype=numpy.uint64)
        file = numpy.memmap(f"{out}/{name}.bin", dtype=numpy.uint16, mode="w+", shape=(count,))
        at, shards = 0, min(1024, len(part))
        for index in range(shards):
            rows = part.shard(num_shards=shards, index=index, contiguous=True).with_format("numpy")["ids"]
            tokens = numpy.concatenate(list(rows))
            file[at : at + len(tokens)] = tokens
            at += len(tokens)
        file.flush()
"""


def paragraphs() -> Iterator[str]:
    """Text found on this machine, each paragraph once: the shipped prose first."""
    seen = set[bytes]()
    texts = iter(pyarrow.parquet.read_table(ROOT / "data" / "prose" / "000_00000.parquet")["text"].to_pylist())
    for text in (*texts, *files()):
        for paragraph in text.split("\n\n"):
            digest = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
            if digest not in seen and is_prose(paragraph):
                seen.add(digest)
                yield " ".join(line.strip() for line in paragraph.splitlines())


def is_prose(paragraph: str) -> bool:
    """Whether it is mostly letters and the punctuation of sentences: web text is, most files here are not."""
    return len(paragraph) > 60 and paragraph.count(" ") > 8 and len(PLAIN.sub("", paragraph)) < 0.07 * len(paragraph)


def files() -> Iterator[str]:
    for folder in FOLDERS:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 20:
                with suppress(UnicodeDecodeError, OSError):
                    yield path.read_text("utf-8")


def build_corpus(path: Path, size_bytes: int) -> tuple[int, int]:
    """Documents like FineWeb's in length; the bytes of text in all, and how many of them are there only once."""
    unique: list[str] = []
    unique_bytes = 0
    for paragraph in paragraphs():
        unique.append(paragraph)
        unique_bytes += len(paragraph.encode()) + 1
        if unique_bytes >= size_bytes:
            break
    shuffled = random.Random(7)
    documents: list[str] = []
    total_bytes, document = 0, ""
    while total_bytes < size_bytes:
        shuffled.shuffle(unique)
        for paragraph in unique:
            document += ("\n" if document else "") + paragraph
            if len(document) >= DOCUMENT_CHARS:
                documents.append(document)
                total_bytes += len(document.encode())
                document = ""
            if total_bytes >= size_bytes:
                break
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, compression="zstd", row_group_size=1000)
    return total_bytes, min(unique_bytes, total_bytes)


@dataclass
class Way:
    """One way of preparing, and what was measured of it."""

    name: str
    command: list[str]
    out: Path
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    tokens: int = 0
    digest: str = ""

    def run(self, environment: dict[str, str]) -> None:
        """Once, from nothing."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        before = os.times()
        begin_s = time.monotonic()
        child = subprocess.Popen(self.command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        peak = PeakMemory(child.pid)
        _, errors = child.communicate()
        self.wall_s.append(time.monotonic() - begin_s)
        self.peak_bytes.append(peak.stop())
        if child.returncode:
            raise SystemExit(f"{self.name} failed: {errors.decode()[-2000:]}")
        after = os.times()
        self.cpu_s.append(after.children_user + after.children_system - before.children_user - before.children_system)

    def check(self) -> None:
        """Count and sum up what was written."""
        streams = [self.out / f"{split}.bin" for split in ("train", "test")]
        if streams[1].exists():
            self.tokens = sum(path.stat().st_size // 2 for path in streams)
            return
        digest = hashlib.sha256()
        for split in SPLITS:
            for part in open_stream(self.out, split).parts:
                self.tokens += len(part)
                digest.update(np.ascontiguousarray(part))
        self.digest = digest.hexdigest()


class PeakMemory(threading.Thread):
    """Samples the PSS of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak_bytes, self.ended = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_EVERY_S):
            with suppress(psutil.Error):
                root = psutil.Process(self.pid)
                self.peak_bytes = max(self.peak_bytes, sum(map(pss_bytes, [root, *root.children(recursive=True)])))

    def stop(self) -> int:
        self.ended.set()
        self.join()
        return self.peak_bytes


def pss_bytes(process: psutil.Process) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def tiktoken_cache(folder: Path) -> Path:
    """GPT-2's two files where tiktoken expects them, so that the peer needs no web either."""
    packaged = bpe._packaged()
    if packaged is not None:
        folder.mkdir()
        for name, cached in CACHE_NAMES.items():
            shutil.copy(packaged / name, folder / cached)
    return folder


def table(ways: list[Way], text_bytes: int) -> None:
    """One line for each way: medians, smallest and largest; and the median of the paired ratios."""
    print(f"{'':<26}{'M tok/s':>9}{'MB/s':>8}{'s':>8}{'min-max':>14}{'CPU s':>8}{'peak MB':>9}{'times':>8}")
    for way in ways:
        wall_s = median(way.wall_s)
        times = median(base / own for base, own in zip(ways[0].wall_s, way.wall_s, strict=True))
        spread = f"{min(way.wall_s):.1f}-{max(way.wall_s):.1f}"
        print(
            f"{way.name:<26}{way.tokens / wall_s / 1e6:>9.2f}{text_bytes / wall_s / 1e6:>8.1f}{wall_s:>8.2f}"
            f"{spread:>14}{median(way.cpu_s):>8.1f}{max(way.peak_bytes) / 1e6:>9.0f}{times:>8.2f}"
        )


def rows(ways: list[Way]) -> None:
    """In the common table: how many times the peer's speed, and how much memory."""
    peer, *own = ways
    for way, wanted in zip(own, (">= 2.0", ">= 10.0"), strict=True):
        times = [base / mine for base, mine in zip(peer.wall_s, way.wall_s, strict=True)]
        rates = [f"{one.tokens / median(one.wall_s) / 1e6:.2f} Mtok/s" for one in (way, peer)]
        row(f"{way.name}: tokens/s, {WORKERS} workers", *rates, times, wanted)
        peaks = [max(one.peak_bytes) / 2**30 for one in (way, peer)]
        row(f"{way.name}: peak, GiB", *(f"{peak:.2f} GiB" for peak in peaks), peaks[:1], "<= 1.0")


def measure(peer_python: Path | None, megabytes: int, rounds: int, given: Path | None, folder: Path) -> list[Way]:
    """Run all ways in turn, `rounds` times, on `given` or on a corpus made up here; prints what was compared."""
    corpus, script = folder / "corpus.parquet", folder / "peer.py"
    if given:
        shutil.copy(given, corpus)
        text_bytes = sum(map(len, pyarrow.parquet.read_table(corpus)["text"].cast("binary").to_pylist()))
        print(f"{given.name}: {text_bytes / 1e6:.0f} MB of text; {WORKERS} workers", flush=True)
    else:
        text_bytes, unique_bytes = build_corpus(corpus, megabytes * 1_000_000)
        unique = f"{unique_bytes / 1e6:.0f} MB of it unique"
        print(f"{text_bytes / 1e6:.0f} MB of text, {unique}; {WORKERS} workers", flush=True)
    script.write_text(PEER_SCRIPT)
    ways = []
    if peer_python:
        command = [str(peer_python), str(script), str(corpus), str(folder / "peer"), str(WORKERS)]
        ways.append(Way(PEER, command, folder / "peer"))
    for encoder in ("tiktoken", "gigatoken"):
        own = [str(corpus), "-o", str(folder / encoder), "--workers", str(WORKERS), "--encoder", encoder]
        command = [sys.executable, str(ROOT / "trainer" / "prepare.py"), *own]
        ways.append(Way(f"prepare.py, {encoder}", command, folder / encoder))
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tiktoken_cache(folder / "bpe")), "HF_HUB_OFFLINE": "1"}
    for _ in range(rounds):
        for way in ways:
            way.run(environment)
            print(f"  {way.name}: {way.wall_s[-1]:.1f} s", file=sys.stderr, flush=True)
    for way in ways:
        way.check()
    table(ways, text_bytes)
    same = len({way.tokens for way in ways}) == 1 and len({way.digest for way in ways if way.digest}) == 1
    print("the tokens are the same" if same else f"the tokens DIFFER: {[(way.name, way.tokens) for way in ways]}")
    return ways


def main() -> None:
    """Build the corpus, run, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", type=Path, help="an interpreter with datasets and tiktoken")
    parser.add_argument("--megabytes", type=int, default=150, help="of text (default: 150)")
    parser.add_argument("--corpus", type=Path, help="a parquet file with a column text, instead of one made up here")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(options.peer_python, options.megabytes, options.rounds, options.corpus, Path(name))


if __name__ == "__main__":
    main()
