"""How long a trainer takes for its steps, when it has become slow, and when it has stopped making any."""

import statistics
from collections import deque

SLOWEST_TIMES = 20
"""A reader that falls behind, or a save, is part of the slowest step; a hang is something else."""
LOOKS_EVERY_S = 60.0
"""At least: after a longer gap the machine was asleep, or everything on it was stopped."""


class Pace:
    """The steps of one attempt as they were seen; times are monotonic seconds."""

    def __init__(self, hang_after_s: float, now: float) -> None:
        """0 as `hang_after_s`: it never hangs."""
        self._hang_after_s = hang_after_s
        self._count = 0
        self._stepped_at = self._looked_at = now
        self._slowest_s = 0.0

    def hangs_since(self, count: int, now: float, patience: float = 1.0) -> float | None:
        """Seconds without a step, when that is a hang. `count` changes with every step; `patience` is how many times as
        long as usual it may take now.

        Until the time between two steps was seen nothing is said: a trainer loads and compiles before its first, and
        some tell only every hundredth.
        """
        if now - self._looked_at > LOOKS_EVERY_S:
            self._stepped_at += now - self._looked_at
        self._looked_at = now
        if count != self._count:
            if self._count:
                self._slowest_s = max(self._slowest_s, now - self._stepped_at)
            self._count, self._stepped_at = count, now
        allowed_s = patience * max(self._hang_after_s, SLOWEST_TIMES * self._slowest_s)
        if not self._hang_after_s or not self._slowest_s or now - self._stepped_at < allowed_s:
            return None
        return now - self._stepped_at


USUAL_STEPS = 20
"""As many are needed to say what is usual."""
SLOW_STEPS = 5
"""As many in a row are no evaluation and no save."""
SLOW_TIMES = 3


class StepTimes:
    """Whether steps have become much slower than they were."""

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=200)
        self._slow = 0

    def usual_if_slow(self, step_s: float) -> float | None:
        """After one more step of `step_s` seconds: what used to be usual, when the last steps were all far above it."""
        if len(self._usual) < USUAL_STEPS:
            self._usual.append(step_s)
            return None
        usual_s = statistics.median(self._usual)
        if step_s < SLOW_TIMES * usual_s:
            self._slow = 0
            self._usual.append(step_s)
            return None
        self._slow += 1
        return usual_s if self._slow >= SLOW_STEPS else None
