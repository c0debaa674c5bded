"""How long optimizer steps take: only the steps, not the evaluations and saves between them."""

import time


class StepClock:
    """Mean time of the steps since it was last asked."""

    def __init__(self) -> None:
        self._steps = 0
        self._spent_s = 0.0
        self._begin_s = 0.0

    def start(self) -> None:
        """A step begins."""
        self._begin_s = time.perf_counter()
        self._steps += 1

    def stop(self) -> None:
        """The step is over, and was not asked about."""
        self._spent_s += time.perf_counter() - self._begin_s

    def lap(self) -> float:
        """Mean seconds of a step since the last lap, including the one under way, which ends here."""
        mean_s = (self._spent_s + time.perf_counter() - self._begin_s) / self._steps
        self._steps, self._spent_s = 0, 0.0
        return mean_s


def duration(seconds: float) -> str:
    """For people: 48s, 12m30s, 3h05m, 2d04h."""
    minutes, whole_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole_s:02d}s" if minutes else f"{whole_s}s"
