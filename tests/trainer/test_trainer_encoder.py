"""Exactly tiktoken's tokens, whatever the text, the encoder, and the place where a long text is cut."""

import subprocess
import sys
from array import array
from itertools import pairwise
from pathlib import Path

import pytest
from gpusup.trainer import bpe, encoder
from gpusup.trainer.encoder import CHOICES, CUT, NASTY, TiktokenEncoder, choose, cuts
from hypothesis import given
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from trainer_runs import ROOT

SHARD = str(ROOT / "data" / "prose" / "000_00000.parquet")
ALPHABET = (
    "aZ01.,!'\"-<|>=/+ \n\t\r\x0b\x1c\x85\xa0\u1680\u2003\u2028\u3000"
    "\u00e9\u044f\u65e5\u3053\u3002\u3001\uff0c\u0663\u200b\u0301\U0001f642"
)
TEXTS = st.one_of(
    st.text(ALPHABET, max_size=60),
    st.text(max_size=60),
    st.lists(
        st.sampled_from(["'ll", "'s", "<|endoftext|>", "   ", "\n\n", "x1", "YWJj0KCk9=", "word", " ", *ALPHABET])
    ).map("".join),
)


def reference(text: str) -> bytes:
    return array("H", bpe.gpt2().encode_ordinary(text)).tobytes()


def test_encoding_is_gpt2() -> None:
    assert bpe.gpt2().encode_ordinary("Hello world, na\u00efve \u65e5\u672c") == [
        15496, 995, 11, 41492, 10545, 245, 98, 17312, 105
    ]  # fmt: skip


def test_ranks_are_those_that_tiktoken_reads() -> None:
    folder = bpe._packaged()
    if folder is None:
        pytest.skip("GPT-2's files are not installed")
    files = str(folder / "vocab.bpe"), str(folder / "encoder.json")
    assert bpe.gpt2()._mergeable_ranks == data_gym_to_mergeable_bpe_ranks(*files)


@given(text=TEXTS)
def test_text_may_be_cut_at_every_place_that_the_pattern_finds(text: str) -> None:
    content = text.encode()
    ends = [0, *(found.end() for found in CUT.finditer(content)), len(content)]
    pieces = [content[begin:end] for begin, end in pairwise(ends)]
    assert b"".join(TiktokenEncoder().encode(pieces)) == reference(text)


def test_long_text_is_cut_in_pieces_and_an_unbroken_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "PIECE_BYTES", 64)
    monkeypatch.setattr(encoder, "UNBROKEN_BYTES", 256)
    text = ("some words   and\n\nmore, 'quoted' \u65e5\u672c\u3002 " * 50).encode()
    ends = cuts(memoryview(text))
    assert ends is not None
    assert ends[0] == 0
    assert ends[-1] == len(text)
    sizes = [end - begin for begin, end in pairwise(ends)]
    assert max(sizes[:-1]) < 128
    assert len(sizes) > 20
    assert cuts(memoryview(b"a" * 256)) == [0, 256]
    assert cuts(memoryview(b"a" * 257)) is None
    assert cuts(memoryview(text + b" " * 300)) is None


@pytest.mark.parametrize(
    "text",
    [
        *NASTY,
        "x" + " " * 150_000 + "y",
        "\n" * 120_000,
        "a \xa0" + "\u3000" * 200_000 + " y " + " " * 150_000,
        "!\x1c" + "\x1c" * 150_000 + "!",
    ],
)
def test_nasty_text_has_tiktokens_tokens(text: str) -> None:
    assert TiktokenEncoder().encode([text.encode()]) == [reference(text)]


def test_white_space_on_which_tiktoken_panics_is_encoded() -> None:
    """A million spaces inside a text overflow its regular expressions; one run of them is merged like any other."""
    (tokens,) = TiktokenEncoder().encode([b"x" + b" " * 1_000_001 + b"y"])
    spaces = array("H", bpe.gpt2()._core_bpe.encode_single_piece(b" " * 1_000_000)).tobytes()
    assert tokens == reference("x") + spaces + reference(" y")


def test_gigatoken_is_used_only_where_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    assert choose("auto", [b"some text"]) == ("gigatoken", None)
    assert choose("tiktoken", []) == ("tiktoken", None)
    right = encoder.GigatokenEncoder.encode

    def wrong(self: encoder.GigatokenEncoder, pieces: list[bytes]) -> list[memoryview]:
        return [
            tokens if b"text" not in piece else tokens[2:]
            for piece, tokens in zip(pieces, right(self, pieces), strict=True)
        ]

    monkeypatch.setattr(encoder.GigatokenEncoder, "encode", wrong)
    name, why = choose("auto", [b"some text"])
    assert name == "tiktoken"
    assert why is not None
    assert "differs from tiktoken on" in why


def test_every_character_has_the_same_tokens_with_gigatoken() -> None:
    pytest.importorskip("gigatoken")
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = [f"a{''.join(characters[at : at + 16])} {characters[at]}" for at in range(0, len(characters), 16)]
    ours = encoder.make("gigatoken").encode([text.encode() for text in texts])
    assert [bytes(tokens) for tokens in ours] == [reference(text) for text in texts]


def test_missing_gigatoken_is_said_when_it_was_asked_for(tmp_path: Path) -> None:
    """A package of that name that cannot be imported stands before the real one."""
    (tmp_path / "gigatoken.py").write_text("raise ImportError('not here')\n")
    done = subprocess.run(
        [sys.executable, "-m", "gpusup.trainer.prepare", SHARD, "-o", str(tmp_path / "out"), "--encoder", "gigatoken"],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("gigatoken is not installed")
    assert "(tiktoken, " in done.stderr


def test_command_offers_the_encoders() -> None:
    from gpusup.trainer.prepare import parser

    assert next(action.choices for action in parser()._actions if action.dest == "encoder") == CHOICES
