"""When a trainer that makes no step hangs, and when it is only slow."""

from gpusup.supervisor.core.pace import SLOWEST_TIMES, Pace, StepTimes
from hypothesis import given
from hypothesis import strategies as st


def test_trainer_that_has_made_no_step_yet_may_load_and_compile_for_ever() -> None:
    assert Pace(10.0, 0, 0.0).hangs_since(0, 1e9) is None
    assert Pace(10.0, 500, 0.0).hangs_since(500, 1e9) is None


def test_no_step_for_so_long_is_a_hang() -> None:
    pace = Pace(10.0, 0, 0.0)
    assert pace.hangs_since(1, 1.0) is None
    assert pace.hangs_since(1, 10.9) is None
    assert pace.hangs_since(1, 11.0) == 10.0


def test_never_is_never() -> None:
    pace = Pace(0.0, 0, 0.0)
    assert pace.hangs_since(1, 1.0) is None
    assert pace.hangs_since(1, 1e9) is None


@given(st.lists(st.floats(0.1, 1000), min_size=2, max_size=50), st.floats(0.1, 100))
def test_pause_as_long_as_ones_before_is_no_hang(gaps_s: list[float], limit_s: float) -> None:
    """Evaluations and saves come again and again."""
    pace, now = Pace(limit_s, 0, 0.0), 0.0
    pace.hangs_since(1, now)
    longest_s = limit_s / 2
    for step, gap_s in enumerate(gaps_s, 2):
        gap_s = min(gap_s, SLOWEST_TIMES * longest_s * 0.9) if step > 2 else min(gap_s, limit_s * 0.9)
        assert pace.hangs_since(step - 1, now + gap_s) is None
        now += gap_s
        assert pace.hangs_since(step, now) is None
        longest_s = max(gap_s, longest_s if step > 2 else gap_s)


def test_steps_far_slower_than_usual_are_told_once_there_are_some_in_a_row() -> None:
    times = StepTimes()
    told = [times.usual_if_slow(step_s) for step_s in [0.1] * 30 + [0.4] * 10]
    assert told == [None] * 34 + [0.1] * 6


def test_evaluation_now_and_then_and_slow_drift_are_not_told() -> None:
    times = StepTimes()
    assert not any(times.usual_if_slow(5.0 if at % 10 == 9 else 0.1) for at in range(300))
    drifting = StepTimes()
    assert not any(drifting.usual_if_slow(0.1 * 1.01**at) for at in range(300))
