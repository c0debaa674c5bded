"""What each change of settings did to peak memory, as measured.

Stated only between attempts that completed the same phase at the same sequence length; one that ran out of memory there
gives a lower bound of its need.
"""

from msgspec import Struct

from .state import Attempt, State


class Effect(Struct, frozen=True, kw_only=True):
    """Peaks of one phase before and after; `..._at_least` marks a lower bound."""

    before: int
    """Attempt numbers."""
    after: int
    phase: str
    block_size: int | None
    before_bytes: int
    after_bytes: int
    before_at_least: bool = False
    after_at_least: bool = False


def effects(state: State) -> list[Effect]:
    """One effect per pair of successive attempts with different settings and a phase that can be compared."""
    found = []
    for before, after in zip(state.attempts, state.attempts[1:], strict=False):
        if before.settings == after.settings:
            continue
        effect = _compare(before, after)
        if effect is not None:
            found.append(effect)
    return found


def _compare(before: Attempt, after: Attempt) -> Effect | None:
    known_before, known_after = _known(before), _known(after)
    shared = [key for key in known_after if key in known_before]
    for phase, block_size in sorted(shared, key=lambda key: (key[0] == "train", key[1] or 0), reverse=True):
        (before_bytes, before_bound), (after_bytes, after_bound) = (
            known_before[phase, block_size],
            known_after[phase, block_size],
        )
        return Effect(
            before=before.n,
            after=after.n,
            phase=phase,
            block_size=block_size,
            before_bytes=before_bytes,
            after_bytes=after_bytes,
            before_at_least=before_bound,
            after_at_least=after_bound,
        )
    return None


def _known(attempt: Attempt) -> dict[tuple[str, int | None], tuple[int, bool]]:
    """(phase, sequence length) -> bytes and whether that is a lower bound."""
    known = {(peak.phase, peak.block_size): (peak.bytes, False) for peak in attempt.peaks}
    oom = attempt.oom
    if oom is not None and oom.at_least_bytes is not None:
        phase = "train" if oom.phase in (None, "forward", "backward", "clip", "optimizer", "compile") else oom.phase
        own = attempt.settings.get("block_size")
        lengths = (oom.block_size, attempt.block_size, own if isinstance(own, int) else None)
        block_size = next((length for length in lengths if length is not None), None)
        measured, _ = known.get((phase, block_size), (0, False))
        known[phase, block_size] = (max(oom.at_least_bytes, measured), True)
    return known
