"""What encodes: processes or threads that get pieces of text and give back tokens.

Each process has a pipe of its own and shares no lock, so that one may be killed at any moment without a sibling or the
parent waiting for ever; when the parent dies, the pipe ends, and the process with it.
"""

import multiprocessing
import queue
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType

from . import bpe, encoder

END = bpe.END_OF_TEXT.to_bytes(2, "little")


@dataclass(frozen=True)
class Piece:
    """A document, or one part of a long one."""

    split: int  # index into SPLITS
    content: bytes  # UTF-8, or tokens
    ends: bool  # whether the document ends here
    is_tokens: bool = False


Encoded = tuple[bytes, bytes]  # little-endian uint16, of the training and of the validation documents


class WorkerKilled(Exception):
    """A process ended without having been asked to."""


class Pool:
    """So many workers; to be used in a `with` statement."""

    def __init__(self, count: int, encoder_name: str) -> None:
        """Threads, where the encoder lets go of the interpreter while it works; otherwise processes."""
        self._processes: list[Worker] = []
        self._idle: queue.SimpleQueue[Callable[[Sequence[Piece]], Encoded]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count)
        for _ in range(count):
            if encoder_name == "gigatoken":
                self._idle.put(partial(encode, encoder.make(encoder_name)))
            else:
                self._processes.append(Worker(encoder_name))
                self._idle.put(self._processes[-1].encode)

    def submit(self, pieces: Sequence[Piece]) -> "Future[Encoded]":
        """Encode as soon as a worker is free. The result may raise WorkerKilled."""
        return self._threads.submit(self._encode, pieces)

    def _encode(self, pieces: Sequence[Piece]) -> Encoded:
        worker = self._idle.get()
        try:
            return worker(pieces)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.end()


class Worker:
    """A process that encodes."""

    def __init__(self, encoder_name: str) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of pyarrow's threads
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, encoder_name), daemon=True)
        self._process.start()
        other.close()

    def encode(self, pieces: Sequence[Piece]) -> Encoded:
        try:
            self._connection.send(pieces)
            encoded: Encoded = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerKilled from None
        return encoded

    def end(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, encoder_name: str) -> None:
    """Encode whatever comes, until nothing can come any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    chosen = encoder.make(encoder_name)
    with suppress(EOFError, OSError):
        while True:
            connection.send(encode(chosen, connection.recv()))


def encode(chosen: encoder.Encoder, pieces: Sequence[Piece]) -> Encoded:
    """The tokens of the pieces, with the end-of-text token after every document."""
    encoded = iter(chosen.encode([piece.content for piece in pieces if not piece.is_tokens]))
    parts: tuple[list[bytes | memoryview], list[bytes | memoryview]] = ([], [])
    for piece in pieces:
        parts[piece.split].append(piece.content if piece.is_tokens else next(encoded))
        if piece.ends:
            parts[piece.split].append(END)
    return b"".join(parts[0]), b"".join(parts[1])
