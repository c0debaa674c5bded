"""What encodes: processes or threads that get pieces of text and give back tokens. Processes end with their parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

from . import bpe, encoder

END = bpe.END_OF_TEXT.to_bytes(2, "little")


@dataclass(frozen=True)
class Piece:
    """A document, or one part of a long one."""

    split: int  # index into SPLITS
    content: bytes  # UTF-8, or tokens
    ends: bool  # whether the document ends here
    is_tokens: bool = False


def start(workers: int, encoder_name: str) -> Executor:
    """So many processes that can `encode`; threads, where the encoder lets go of the interpreter while it works."""
    if encoder_name == "gigatoken":
        return ThreadPoolExecutor(workers, initializer=_load, initargs=(encoder_name,))
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of pyarrow's threads
    return ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(encoder_name,))


def _load(encoder_name: str) -> None:
    global _encoder
    _encoder = encoder.make(encoder_name)


def _begin(encoder_name: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _load(encoder_name)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_encoder: encoder.Encoder


def encode(pieces: Sequence[Piece]) -> tuple[bytes, bytes]:
    """The tokens of the pieces, little-endian uint16: those of the training and those of the validation documents.

    The end-of-text token follows every document.
    """
    encoded = iter(_encoder.encode([piece.content for piece in pieces if not piece.is_tokens]))
    parts: tuple[list[bytes | memoryview], list[bytes | memoryview]] = ([], [])
    for piece in pieces:
        parts[piece.split].append(piece.content if piece.is_tokens else next(encoded))
        if piece.ends:
            parts[piece.split].append(END)
    return b"".join(parts[0]), b"".join(parts[1])
