"""GPT-2's tokens, fast: two encoders with one result, and where a long text may be cut without changing it.

All of it rests on how GPT-2 splits text before merging bytes: into runs of letters, digits, other characters or white
space, where one space goes with the run after it. A run that is not white space therefore never depends on what
precedes it, and ends where it would end if the text ended there.
"""

import base64
import functools
import mmap
import re
import sys
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from . import bpe

CHOICES = ("auto", "tiktoken", "gigatoken")
PIECE_BYTES = 1 << 20  # a longer text is cut
UNBROKEN_BYTES = 4 << 20  # the longest stretch without a place to cut; encoding it takes about 50 times its size
REMEMBERED_BYTES = 256 << 20  # of words, by gigatoken; some million of them
REPLACED_AFTER_BYTES = 16 << 20  # of text, at least: something else may be what takes the memory
LONG_CHARS = 100_000
LONG_WHITE_SPACE = re.compile(rf"[^\S\x1c-\x1f]{{{LONG_CHARS},}}")  # at a million, tiktoken's matching overflows

# Between what is matched and the next character GPT-2 always splits. First, what is surely not white space before it.
CUT = re.compile(
    rb"(?:[!-~]|[\xc3-\xdf].|[\xe0\xe4-\xef]..|\xe3[\x81-\x83].|[\xf0-\xf4]...)(?=[ \t\n\r])"  # before white space
    rb"|[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])"  # in base64
    rb"|(?:[\xe5-\xe8]..|\xe3\x81.)(?=\xe3\x80[\x81\x82]|\xef\xbc\x8c)",  # Chinese or Japanese, before a comma or stop
    re.DOTALL,
)

NASTY = (
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|>\n",
    "it's we'll I'VE 'S 'tis \f'll x''s",
    "x  y   z\n\n  a \n b\t\tc \r\n d  ",
    "\u00a0\u00a0x \u3000 y\u2028\u0085z \u200b \u180e q",
    "\x00\x1c\x1d \x1fa\x7f \x1c b",
    "na\u00efve na\u0131ve \u65e5\u672c\u8a9e\u3002\u3053\u308c\u306f \u0e20\u0e32\u0e29\u0e32 \u0627\u0644\u0639",
    "\u0e34\u0301\u0327 \u0301a e\u0301\u0327",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff \ufffd\ufeff",
    "1234567890 12,345.67e-8 x1y2 \u0663\u0664 \u00bd\u00b2 \u2167",
    "a" * 700 + " " * 700 + "!" * 700 + "\n" * 701,
    "  leading and trailing   ",
)


class Encoder(Protocol):
    """Turns pieces of text into GPT-2's tokens."""

    name: str

    def encode(self, pieces: list[bytes]) -> Sequence[bytes | memoryview]:
        """Of each piece, valid UTF-8, its tokens as little-endian uint16. No end-of-text token is added."""


class TiktokenEncoder:
    """tiktoken, except that it never meets the white space that makes its regular expressions overflow."""

    name = "tiktoken"

    def __init__(self) -> None:
        core = bpe.gpt2()._core_bpe
        self._to_buffer: Callable[[str, frozenset[str]], bytes] = core.encode_to_tiktoken_buffer
        self._one_run: Callable[[bytes], list[int]] = core.encode_single_piece

    def encode(self, pieces: list[bytes]) -> list[bytes]:
        return [self._encode(str(piece, "utf-8")) for piece in pieces]

    def _encode(self, text: str) -> bytes:
        if len(text) < LONG_CHARS:
            return self._ordinary(text)
        tokens, begin = bytearray(), 0
        for run in LONG_WHITE_SPACE.finditer(text):
            tokens += self._ordinary(text[begin : run.start()])
            begin = run.end() - (run.end() < len(text))  # its last character goes with the text after it
            tokens += packed(self._one_run(text[run.start() : begin].encode()))
        return bytes(tokens) + self._ordinary(text[begin:])

    def _ordinary(self, text: str) -> bytes:
        """No special tokens; a buffer of uint32, so that no list of integers is made."""
        return np.frombuffer(self._to_buffer(text, frozenset()), np.uint32).astype("<u2").tobytes()


class GigatokenEncoder:
    """gigatoken, given tiktoken's own ranks. It remembers every word it has met, so now and then it is replaced."""

    name = "gigatoken"

    def __init__(self) -> None:
        self._replacing = threading.Lock()
        self._load()
        self._limit_bytes = resident_bytes() + REMEMBERED_BYTES

    def _load(self) -> None:
        import gigatoken

        ranks = sorted(bpe.gpt2()._mergeable_ranks.items(), key=lambda item: item[1])
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
            file.flush()
            self._tokenizer = gigatoken.Tokenizer.from_tiktoken(file.name, pretokenizer="gpt2", special_tokens={})
        self._encoded_bytes = 0  # by this one

    def encode(self, pieces: list[bytes]) -> list[memoryview]:
        with self._replacing:
            if self._encoded_bytes > REPLACED_AFTER_BYTES and resident_bytes() > self._limit_bytes:
                self._load()
            self._encoded_bytes += sum(map(len, pieces))
        layout = self._tokenizer.encode_batch(pieces, parallel=False).layout
        tokens = memoryview(layout.content.data.astype("<u2")).cast("B")
        ends = (layout.offsets.data * 2).tolist()
        return [tokens[begin:end] for begin, end in pairwise(ends)]


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@functools.cache
def make(name: str) -> Encoder:
    """The encoder that `choose` has named."""
    return GigatokenEncoder() if name == "gigatoken" else TiktokenEncoder()


def choose(name: str, sample: Iterable[bytes]) -> tuple[str, str | None]:
    """The encoder to use, and why it is not the faster one; checked here and now on `sample` and on nasty strings."""
    encoding = bpe.gpt2()
    if name == "tiktoken":
        return name, None
    try:
        encoder = make("gigatoken")
        pieces = [*(text.encode() for text in NASTY), *sample]
        for piece, tokens in zip(pieces, encoder.encode(pieces), strict=True):
            if bytes(tokens) != packed(encoding.encode_ordinary(str(piece, "utf-8"))):
                return "tiktoken", f"gigatoken differs from tiktoken on {str(piece, 'utf-8')[:40]!r}; using tiktoken"
    except ImportError:
        missing = "gigatoken is not installed (`pip install gigatoken==0.10.0` is several times faster)"
        return "tiktoken", f"{missing}; using tiktoken" if name == "gigatoken" else None
    except Exception as error:  # another version of it, with another interface: whatever it raises, there is tiktoken
        return "tiktoken", f"gigatoken does not work here ({type(error).__name__}: {error}); using tiktoken"
    return "gigatoken", None


def cuts(text: memoryview) -> list[int] | None:
    """Where pieces of a text begin and end, in bytes; None when a stretch of it is too long to be encoded.

    The tokens of the pieces, one after the other, are the tokens of the text.
    """
    ends = [0]
    while len(text) - ends[-1] > PIECE_BYTES:
        found = CUT.search(text, ends[-1] + PIECE_BYTES - 1, ends[-1] + UNBROKEN_BYTES)
        if found is None:
            if len(text) - ends[-1] > UNBROKEN_BYTES:
                return None
            break
        ends.append(found.end())
    return [*ends, len(text)]


def packed(tokens: Sequence[int]) -> bytes:
    """Little-endian uint16."""
    packed = array("H", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
