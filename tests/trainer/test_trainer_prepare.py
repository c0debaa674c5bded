"""Text to tokens: the text comes back, bad files are refused with a reason, documents that hold no text are counted."""

import json
import os
import pty
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from gpusup.trainer import bpe
from gpusup.trainer.errors import TrainerError
from gpusup.trainer.preparation import Options, belongs_to_validation, prepare
from gpusup.trainer.shards import open_stream
from gpusup.trainer.sources import ParquetSource
from trainer_runs import ROOT

SHARD = ROOT / "data" / "prose" / "000_00000.parquet"
DEADLINE_S = 120
HALF = Options(val_fraction=0.5, encoder="tiktoken")


def parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({column: pyarrow.array(texts, pyarrow.string())}), path)
    return path


def documents(folder: Path, split: str) -> list[str]:
    """The texts of a split, cut at the end-of-text tokens."""
    tokens, encoding = np.concatenate(open_stream(folder, split).parts), bpe.gpt2()
    ends = np.flatnonzero(tokens == bpe.END_OF_TEXT)
    assert ends[-1] == len(tokens) - 1
    return [encoding.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def both(folder: Path) -> list[str]:
    return documents(folder, "train") + documents(folder, "val")


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "trainer/prepare.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shipped_shard_round_trips(tmp_path: Path) -> None:
    """Every document comes back, in order, from one of the two splits; in a pipe there are plain lines and no bar."""
    done = command(SHARD, "-o", tmp_path, "--encoder", "tiktoken")
    assert done.returncode == 0, done.stderr
    table = pyarrow.parquet.read_table(SHARD)
    texts = table["text"].to_pylist()
    to_val = [belongs_to_validation(zlib.crc32(text.encode()), 0.01) for text in texts]
    assert documents(tmp_path, "train") == [text for text, val in zip(texts, to_val, strict=True) if not val]
    assert documents(tmp_path, "val") == [text for text, val in zip(texts, to_val, strict=True) if val]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == sum(table["token_count"].to_pylist()) + len(texts)
    assert meta["sources"][0]["name"] == SHARD.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train-00000.tok", "val-00000.tok"]
    assert "\r" not in done.stderr
    assert "100%" in done.stderr
    assert "MB/s" in done.stderr
    assert "already holds" in command(SHARD, "-o", tmp_path).stderr


def test_terminal_gets_a_bar(tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "trainer/prepare.py", str(SHARD), "-o", str(tmp_path)],
        cwd=ROOT,
        stderr=writer,
        stdout=subprocess.DEVNULL,
    )
    os.close(writer)
    shown = b""
    while part := read_terminal(reader):
        shown += part
    assert child.wait(DEADLINE_S) == 0
    assert b"\r[########################] 100%" in shown


def read_terminal(reader: int) -> bytes:
    try:
        return os.read(reader, 1 << 16)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_shipped_shard_is_prose_with_the_columns_of_fineweb() -> None:
    table = pyarrow.parquet.read_table(SHARD)
    columns = "text id dump url date file_path language language_score token_count"
    assert table.column_names == columns.split()
    texts = table["text"].to_pylist()
    assert sum(map(len, texts)) > 1_000_000
    assert len(set(texts)) == len(texts)


def test_result_is_the_same_for_any_number_of_workers_and_either_encoder(tmp_path: Path) -> None:
    prepare([SHARD], tmp_path / "one", Options(workers=1, encoder="tiktoken", shard_tokens=100_000))
    prepare([SHARD], tmp_path / "three", Options(workers=3, encoder="auto", shard_tokens=100_000))
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert len(list(tmp_path.glob("one/train-*.tok"))) == 7


def test_plain_bin_holds_the_tokens_of_the_shards_and_is_a_source_itself(tmp_path: Path) -> None:
    """The split of a document is the same whether its text or its tokens were given."""
    texts: list[str | None] = [
        f"text {number}, na\u00efve \U0001f642 \u65e5\u672c" * (number + 1) for number in range(50)
    ]
    source = parquet(tmp_path / "a.parquet", texts)
    prepare([source], tmp_path / "shards", HALF)
    plain = Options(val_fraction=0.5, encoder="tiktoken", shard_tokens=None)
    prepare([source], tmp_path / "plain", plain)
    for split in ("train", "val"):
        values = np.fromfile(tmp_path / "plain" / f"{split}.bin", "<u2")  # as nanoGPT reads it
        assert np.array_equal(values, np.concatenate(open_stream(tmp_path / "shards", split).parts))
    whole = tmp_path / "whole.bin"
    whole.write_bytes((tmp_path / "plain" / "train.bin").read_bytes() + (tmp_path / "plain" / "val.bin").read_bytes())
    prepare([whole], tmp_path / "again", plain)
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_bin_without_a_last_end_and_with_empty_documents_is_read(tmp_path: Path) -> None:
    encoding, end = bpe.gpt2(), bpe.END_OF_TEXT
    tokens: list[int] = [end]
    for number in range(40):
        tokens += [*encoding.encode_ordinary(f"document {number}"), end]
    np.asarray([*tokens, end, *encoding.encode_ordinary("the last")], "<u2").tofile(tmp_path / "a.bin")
    meta = prepare([tmp_path / "a.bin"], tmp_path / "out", HALF)
    assert set(both(tmp_path / "out")) == {*(f"document {number}" for number in range(40)), "the last"}
    assert meta["left_out"] == {"empty": 2}


def test_folder_is_read_below_and_in_order(tmp_path: Path) -> None:
    for name in ("b/2.parquet", "a/1.parquet", "b/c/3.parquet"):
        parquet(tmp_path / "in" / name, [f"{name} {number}" for number in range(20)])
    (tmp_path / "in" / "notes.txt").write_text("no parquet")
    meta = prepare([tmp_path / "in"], tmp_path / "out", HALF)
    assert [source["name"] for source in meta["sources"]] == ["1.parquet", "2.parquet", "3.parquet"]
    assert len(both(tmp_path / "out")) == 60


def test_documents_without_text_are_counted_and_left_out(tmp_path: Path) -> None:
    """A null, an empty text, one that is not UTF-8; a document cannot end itself."""
    texts = [f"number {number} <|endoftext|> goes on".encode() for number in range(20)]
    values = pyarrow.array([*texts, None, b"", b"\xff\xfe broken", None], pyarrow.binary())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": values.view(pyarrow.string())}), path)
    done = command(path, "-o", tmp_path / "out", "--val-fraction", 0.5, "--text-column", "body")
    assert done.returncode == 0, done.stderr
    assert "left out: 1 empty, 1 not UTF-8, 2 null" in done.stdout
    assert sorted(both(tmp_path / "out")) == sorted(text.decode() for text in texts)


def damaged(path: Path, texts: list[str | None]) -> Path:
    """A file whose pages are broken, while its footer is whole."""
    whole = bytearray(parquet(path, texts).read_bytes())
    whole[4:200] = bytes(196)
    path.write_bytes(whole)
    return path


def test_file_is_refused_with_a_reason(tmp_path: Path) -> None:
    texts: list[str | None] = [f"some text, number {i}" for i in range(50)]
    whole = parquet(tmp_path / "whole.parquet", texts)
    truncated = tmp_path / "truncated.parquet"
    truncated.write_bytes(whole.read_bytes()[:-20])
    junk = tmp_path / "junk.parquet"
    junk.write_text("this is not parquet, however long it may be")
    (tmp_path / "empty.parquet").touch()
    numbers = tmp_path / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), numbers)
    (tmp_path / "odd.bin").write_bytes(b"\0" * 7)
    (tmp_path / "foreign.bin").write_bytes(b"\xff\xff" * 8)
    (tmp_path / "nothing").mkdir()
    cases = {
        tmp_path / "missing.parquet": "no such file",
        tmp_path / "empty.parquet": "not a whole parquet file",
        junk: "not a whole parquet file",
        truncated: "not a whole parquet file",
        numbers: "holds int64, not strings",
        parquet(tmp_path / "column.parquet", texts, "body"): "no column named text; it has body",
        parquet(tmp_path / "none.parquet", []): "no document fell to train",
        damaged(tmp_path / "damaged.parquet", texts): "damaged after document",
        tmp_path / "odd.bin": "7 bytes are no uint16 tokens",
        tmp_path / "foreign.bin": "holds the token 65535 in document 0",
        tmp_path / "nothing": "no \\*.parquet file",
    }
    for path, message in cases.items():
        with pytest.raises(TrainerError, match=message):
            prepare([path], tmp_path / "out", Options(encoder="tiktoken", restart=True))
        assert {path.name for path in (tmp_path / "out").glob("*")} <= {"unfinished"}, path


def test_damage_anywhere_is_refused_or_read_but_never_a_surprise(tmp_path: Path) -> None:
    """Bytes overwritten at random, half of them in the footer; where a changed byte is still text, it is read."""
    whole, path, outcomes = SHARD.read_bytes(), tmp_path / "damaged.parquet", set()
    for seed in range(60):
        chance = random.Random(seed)
        changed = bytearray(whole)
        for _ in range(chance.choice((1, 3, 50))):
            changed[chance.randrange(0 if seed % 2 else len(whole) - 6000, len(whole))] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            outcomes.add(sum(batch.rows for batch in ParquetSource(path, "text").batches(0)) > 0)
        except TrainerError:
            outcomes.add("refused")
    assert outcomes == {True, "refused"}


def test_same_file_twice_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ["a", "b"])
    with pytest.raises(TrainerError, match="given twice"):
        prepare([tmp_path, path], tmp_path / "out", HALF)


def test_earlier_tokens_stay_until_new_ones_are_complete(tmp_path: Path) -> None:
    texts: list[str | None] = [f"some text, number {i}" for i in range(50)]
    out = tmp_path / "out"
    prepare([parquet(tmp_path / "good.parquet", texts)], out, Options(val_fraction=0.5, shard_tokens=40))
    before = content(out)
    with pytest.raises(TrainerError, match="damaged"):
        prepare([damaged(tmp_path / "bad.parquet", texts)], out, HALF)
    assert {name: (out / name).read_bytes() for name in before} == before
    prepare([parquet(tmp_path / "other.parquet", texts[:40])], out, Options(val_fraction=0.5, restart=True))
    assert sorted(content(out)) == ["meta.json", "train-00000.tok", "val-00000.tok"]
    assert len(both(out)) == 40


def test_token_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"mine")
    with pytest.raises(TrainerError, match=r"train\.bin: in the way, and not made by prepare\.py"):
        prepare([SHARD], tmp_path / "out", HALF)
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"mine"


def test_command_says_what_is_wrong_and_ends_with_two(tmp_path: Path) -> None:
    done = command(SHARD, "-o", tmp_path, "--val-fraction", 1)
    assert done.returncode == 2
    assert done.stderr == "prepare.py: --val-fraction 1.0: give a number between 0 and 1, such as 0.01\n"
