"""How long a trainer takes for its steps, when it has become slow, and when it has stopped making any."""

import statistics
from collections import deque

SLOWEST_TIMES = 20
"""Evaluating, saving and a reader that falls behind are part of the slowest step; a hang is something else."""


class Pace:
    """The steps of one attempt as they were seen; times are monotonic seconds."""

    def __init__(self, hang_after_s: float, from_step: int, now: float) -> None:
        """0 as `hang_after_s`: it never hangs."""
        self._hang_after_s = hang_after_s
        self._from_step = self._step = from_step
        self._stepped_at = now
        self._slowest_s = 0.0

    def hangs_since(self, step: int, now: float) -> float | None:
        """Seconds without a step, when that is a hang. Before its first step a trainer loads and compiles, or its steps
        are not counted at all: nothing is said of it then."""
        if step != self._step:
            if self._step > self._from_step:
                self._slowest_s = max(self._slowest_s, now - self._stepped_at)
            self._step, self._stepped_at = step, now
        silent_s = now - self._stepped_at
        counted = self._hang_after_s > 0 and self._step > self._from_step
        return silent_s if counted and silent_s >= max(self._hang_after_s, SLOWEST_TIMES * self._slowest_s) else None


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
