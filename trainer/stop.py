"""Notice of SIGTERM, which asks the trainer to save and leave."""

import signal
from types import FrameType
from typing import NoReturn


class StopRequest:
    """Notes SIGTERM, so that the step under way can be finished."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def obey(self) -> NoReturn:
        """End this process by the signal, so that its exit status tells the truth."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)  # reached only where the signal is blocked
