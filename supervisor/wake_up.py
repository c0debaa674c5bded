"""Signals as a readable descriptor and a list: the handler only notes them, the loop acts on them."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


class WakeUp:
    """While entered, `SIGNALS` are appended to `received` and make `fd` readable; a closed terminal is ignored."""

    def __init__(self, received: list[int]) -> None:
        self._received = received

    def __enter__(self) -> "WakeUp":
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self.fd)
        os.close(self._write)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def drain(self) -> None:
        try:
            while os.read(self.fd, 512):
                pass
        except BlockingIOError:
            pass
