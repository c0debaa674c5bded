"""GPU memory through NVML, behind a thread: a sick driver can keep a call for ever, and must not keep gpusup."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from .nvml_library import Gpu, GpuMemory, Library, Trouble, Vitals, is_present

__all__ = ["Gpu", "GpuMemory", "Nvml", "Trouble", "Vitals"]

PATIENCE_S = 5.0  # for one answer; a healthy driver takes microseconds, one that wakes a GPU up to seconds

T = TypeVar("T")


class Nvml:
    """What NVML says; None, or nothing, where it could not be observed in time."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._questions: queue.SimpleQueue[tuple[Callable[[Library], Any], Future[Any]]] = queue.SimpleQueue()
        self._unanswered: Future[Any] | None = None
        self._absent = not is_present()
        if not self._absent:
            threading.Thread(target=self._answer, daemon=True, name="nvml").start()

    @property
    def problem(self) -> str:
        """Why nothing can be observed; empty when NVML answers."""
        if self._absent:
            return "no NVIDIA driver on this machine"
        answer = self._ask(lambda library: library.problem)
        return f"NVML did not answer within {self._patience_s:g} s" if answer is None else answer

    @property
    def driver(self) -> str:
        return self._ask(lambda library: library.driver) or ""

    @property
    def trouble(self) -> Trouble | None:
        """What is wrong with the GPU, as far as NVML has said."""
        return self._ask(lambda library: library.trouble)

    def gpus(self) -> list[Gpu]:
        """The devices this process may see, `CUDA_VISIBLE_DEVICES` respected, in its order."""
        return self._ask(Library.gpus) or []

    def memory(self, uuid: str) -> GpuMemory | None:
        return self._ask(lambda library: library.memory(uuid))

    def vitals(self, uuid: str) -> Vitals:
        """Temperature and power."""
        return self._ask(lambda library: library.vitals(uuid)) or Vitals()

    def process_bytes(self, uuid: str) -> dict[int, int] | None:
        """Memory per process on the device. Expensive: at a start and after a failure, never in the loop."""
        return self._ask(lambda library: library.process_bytes(uuid))

    def _ask(self, question: Callable[[Library], T]) -> T | None:
        """While one question is not answered, no other is asked."""
        if self._absent or (self._unanswered is not None and not self._unanswered.done()):
            return None
        answer: Future[T] = Future()
        self._questions.put((question, answer))
        try:
            return answer.result(self._patience_s)
        except TimeoutError:
            self._unanswered = answer
            return None

    def _answer(self) -> None:
        library: Library | None = None
        while True:
            question, answer = self._questions.get()
            try:
                library = library or Library()
                answer.set_result(question(library))
            except Exception:  # a library of another version, or none: could not observe
                answer.set_result(None)
