"""Parquet to tokens: the text comes back, and bad files are refused with a reason."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from gpusup.trainer import bpe
from gpusup.trainer.errors import TrainerError
from gpusup.trainer.prepare import belongs_to_validation, prepare
from trainer_runs import ROOT

SHARD = ROOT / "data" / "prose" / "000_00000.parquet"


def parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({column: pyarrow.array(texts, pyarrow.string())}), path)
    return path


def documents(path: Path) -> list[str]:
    """The texts of a token file, cut at the end-of-text tokens."""
    tokens, encoding = np.fromfile(path, "<u2"), bpe.gpt2()
    ends = np.flatnonzero(tokens == bpe.END_OF_TEXT)
    assert ends[-1] == len(tokens) - 1
    return [encoding.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def test_shipped_shard_round_trips(tmp_path: Path) -> None:
    """Every document comes back, in order, from one of the two files; in a pipe there are plain lines and no bar."""
    done = subprocess.run(
        [sys.executable, "trainer/prepare.py", str(SHARD), "-o", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    table = pyarrow.parquet.read_table(SHARD)
    texts = table["text"].to_pylist()
    assert documents(tmp_path / "train.bin") == [text for text in texts if not belongs_to_validation(text, 0.01)]
    assert documents(tmp_path / "val.bin") == [text for text in texts if belongs_to_validation(text, 0.01)]
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["train"]["tokens"] + meta["val"]["tokens"] == sum(table["token_count"].to_pylist()) + len(texts)
    assert meta["sources"][0]["name"] == SHARD.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert "\r" not in done.stderr
    assert "100%" in done.stderr


def test_shipped_shard_is_prose_with_the_columns_of_fineweb() -> None:
    table = pyarrow.parquet.read_table(SHARD)
    columns = "text id dump url date file_path language language_score token_count"
    assert table.column_names == columns.split()
    texts = table["text"].to_pylist()
    assert sum(map(len, texts)) > 1_000_000
    assert len(set(texts)) == len(texts)


def test_encoding_is_gpt2() -> None:
    assert bpe.gpt2().encode_ordinary("Hello world, naïve 日本") == [
        15496, 995, 11, 41492, 10545, 245, 98, 17312, 105
    ]  # fmt: skip


def test_special_token_in_a_text_is_ordinary_text(tmp_path: Path) -> None:
    """A document cannot end itself; documents without text are left out."""
    texts: list[str | None] = [f"number {i} <|endoftext|> goes on" for i in range(20)]
    prepare([parquet(tmp_path / "a.parquet", [*texts, None, ""])], tmp_path / "out", 0.5)
    assert len(documents(tmp_path / "out" / "train.bin") + documents(tmp_path / "out" / "val.bin")) == 20


def damaged(path: Path, texts: list[str | None]) -> Path:
    """A file whose pages are broken, while its footer is whole."""
    content = bytearray(parquet(path, texts).read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
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
    cases = {
        tmp_path / "missing.parquet": "no such file",
        tmp_path / "empty.parquet": "not a whole parquet file",
        junk: "not a whole parquet file",
        truncated: "not a whole parquet file",
        numbers: "holds int64, not strings",
        parquet(tmp_path / "column.parquet", texts, "body"): "no column named text; it has body",
        parquet(tmp_path / "none.parquet", []): "no document fell to train.bin",
        damaged(tmp_path / "damaged.parquet", texts): "damaged after document",
    }
    for path, message in cases.items():
        with pytest.raises(TrainerError, match=message):
            prepare([path], tmp_path / "out", 0.1)
        assert not list((tmp_path / "out").glob("*")), path


def test_earlier_tokens_stay_when_preparing_again_fails(tmp_path: Path) -> None:
    texts: list[str | None] = [f"some text, number {i}" for i in range(50)]
    prepare([parquet(tmp_path / "good.parquet", texts)], tmp_path / "out", 0.2)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(TrainerError, match="damaged"):
        prepare([damaged(tmp_path / "bad.parquet", texts)], tmp_path / "out", 0.2)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_command_says_what_is_wrong_when_the_fraction_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpusup.trainer.prepare", str(SHARD), "-o", str(tmp_path), "--val-fraction", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == "prepare.py: --val-fraction 1.0: give a number between 0 and 1, such as 0.01\n"
