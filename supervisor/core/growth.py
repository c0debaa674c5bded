"""How memory grew before it ran out: a leak, a spike, or the steady state of settings that are too large.

Told from the memory in use once a second, of the machine's own counters; no trainer needs to report anything.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

Growth = Literal["leak", "spike", "steady"]

LEAST_SAMPLES = 30
LEAK_SHARE = 0.05  # of the memory in use, over the second half of the attempt
RISING_SHARE = 0.9  # of the eighths of that half
SPIKE_SHARE = 0.85  # what was in use before it, of what was wanted at once


def growth_of(in_use_bytes: Sequence[int], wanted_bytes: int | None) -> Growth | None:
    """What the samples of one attempt (in use, oldest first) say; None when there are too few.

    `wanted_bytes` is what was in use and asked for when memory was refused. A leak rises through the second half of the
    attempt, eighth by eighth; a spike comes out of a level line that leaves room.
    """
    if len(in_use_bytes) < LEAST_SAMPLES:
        return None
    half = in_use_bytes[len(in_use_bytes) // 2 :]
    # The least of each part: a caching allocator's peaks hide what is never given back.
    levels = [min(half[len(half) * part // 8 : len(half) * (part + 1) // 8]) for part in range(8)]
    rising = sum(later > earlier for earlier, later in pairwise(levels))
    if levels[-1] - levels[0] >= LEAK_SHARE * levels[-1] and rising >= RISING_SHARE * 7:
        return "leak"
    if wanted_bytes is not None and max(half) <= SPIKE_SHARE * wanted_bytes:
        return "spike"
    return "steady"
