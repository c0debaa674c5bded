"""When a trainer that makes no step hangs, and when it is only slow."""

from gpusup.supervisor.core.pace import Pace, StepTimes
from hypothesis import given
from hypothesis import strategies as st


def paced(pace: Pace, counts: list[tuple[int, float]]) -> list[float | None]:
    """What is said when each count is seen at its time, and in between every ten seconds, as the loop looks often."""
    said, now, count = list[float | None](), 0.0, 0
    for later_count, at in counts:
        while at - now > 10:
            now += 10
            said.append(pace.hangs_since(count, now))
        count, now = later_count, at
        said.append(pace.hangs_since(count, now))
    return said


def test_trainer_that_has_made_no_two_steps_yet_may_load_and_compile_for_ever() -> None:
    assert not any(paced(Pace(10.0, 0.0), [(0, 5000.0), (1, 5001.0), (1, 90000.0)]))


def test_no_step_for_so_long_is_a_hang() -> None:
    assert paced(Pace(10.0, 0.0), [(1, 1.0), (2, 1.25), (2, 11.0), (2, 11.25)]) == [None, None, None, 10.0]


def test_steps_that_are_told_rarely_are_no_hang() -> None:
    """Every hundredth of twenty seconds each: the first time between two is as long as all others."""
    assert not any(paced(Pace(1800.0, 0.0), [(at, 2000.0 * at) for at in range(1, 20)]))


def test_evaluation_may_take_longer() -> None:
    pace = Pace(10.0, 0.0)
    paced(pace, [(1, 1.0), (2, 1.25)])
    assert pace.hangs_since(2, 31.0, patience=4.0) is None
    assert pace.hangs_since(2, 41.25, patience=4.0) == 40.0


def test_machine_that_slept_is_no_hang() -> None:
    pace = Pace(100.0, 0.0)
    paced(pace, [(1, 1.0), (2, 2.0), (2, 30.0)])
    assert pace.hangs_since(2, 90_000.0) is None
    assert pace.hangs_since(2, 90_050.0) is None


def test_never_is_never() -> None:
    assert not any(paced(Pace(0.0, 0.0), [(1, 1.0), (2, 2.0), (2, 1e5)]))


@given(st.lists(st.floats(0.1, 300), min_size=3, max_size=30), st.floats(10, 100))
def test_pause_not_longer_than_what_was_seen_is_no_hang(gaps_s: list[float], limit_s: float) -> None:
    """Evaluations and saves come again and again."""
    counts, now = [(1, 1.0)], 1.0
    for count, gap_s in enumerate([max(gaps_s), *gaps_s], 2):
        now += gap_s
        counts.append((count, now))
    assert not any(paced(Pace(limit_s, 0.0), counts))


def test_steps_far_slower_than_usual_are_told_once_there_are_some_in_a_row() -> None:
    times = StepTimes()
    told = [times.usual_if_slow(step_s) for step_s in [0.1] * 30 + [0.4] * 10]
    assert told == [None] * 34 + [0.1] * 6


def test_evaluation_now_and_then_and_slow_drift_are_not_told() -> None:
    times = StepTimes()
    assert not any(times.usual_if_slow(5.0 if at % 10 == 9 else 0.1) for at in range(300))
    drifting = StepTimes()
    assert not any(drifting.usual_if_slow(0.1 * 1.01**at) for at in range(300))
