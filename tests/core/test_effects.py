"""Effects on memory are stated only where two attempts can be compared."""

import pytest
from gpusup.supervisor.core.effects import effects
from gpusup.supervisor.core.events import PeakMeasured, SupervisorStarted
from lives import COMPILE_OFF, SMALLER, Life, created, policy


def life() -> Life:
    return Life(created(policy(COMPILE_OFF, SMALLER)))


def test_peaks_of_the_same_phase_and_length_are_compared() -> None:
    run = life()
    run.peak(900, 128)
    run.peak(1000, 128)
    run.oom()
    run.peak(600, 128)
    [effect] = effects(run.state)
    assert (effect.before, effect.after, effect.phase, effect.block_size) == (1, 2, "train", 128)
    assert (effect.before_bytes, effect.after_bytes) == (1000, 600)
    assert (effect.before_at_least, effect.after_at_least) == (False, False)


def test_other_sequence_lengths_are_not_compared() -> None:
    run = life()
    run.peak(1000, 128)
    run.oom()
    run.peak(600, 64)
    assert effects(run.state) == []


def test_other_phases_are_not_compared() -> None:
    run = life()
    run.tell(PeakMeasured(attempt=1, phase="eval", bytes=5, block_size=128))
    run.oom()
    run.peak(600, 128)
    assert effects(run.state) == []


def test_attempt_that_never_completed_the_phase_gives_no_effect() -> None:
    run = life()
    run.peak(1000, 128)
    run.oom()
    run.oom()
    assert effects(run.state) == []


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer", None])
def test_failed_request_is_a_lower_bound_of_training(phase: str | None) -> None:
    run = life()
    run.oom(phase=phase, at_least=2000, block_size=128)
    run.peak(600, 128)
    [effect] = effects(run.state)
    assert (effect.before_bytes, effect.before_at_least, effect.after_at_least) == (2000, True, False)


def test_failed_request_in_the_evaluation_says_nothing_of_training() -> None:
    run = life()
    run.oom(phase="eval", at_least=2000, block_size=128)
    run.peak(600, 128)
    assert effects(run.state) == []


def test_oom_at_another_length_is_not_compared() -> None:
    run = life()
    run.oom(at_least=2000, block_size=64)
    run.peak(600, 128)
    assert effects(run.state) == []


def test_lower_bounds_on_both_sides_are_marked() -> None:
    run = life()
    run.oom(at_least=2000, block_size=128)
    run.oom(at_least=1500, block_size=128)
    [effect] = effects(run.state)
    assert (effect.before_at_least, effect.after_at_least) == (True, True)


def test_attempt_with_the_same_settings_has_no_effect() -> None:
    run = life()
    run.peak(1000, 128)
    run.user_stops()
    run.left()
    run.tell(SupervisorStarted(pid=2))
    run.peak(900, 128)
    assert run.n == 2
    assert effects(run.state) == []


def test_each_change_is_compared_with_the_attempt_right_before_it() -> None:
    run = life()
    for peak in (1000, 900, 700):
        run.peak(peak, 128)
        run.oom()
    assert [(e.before, e.after, e.before_bytes, e.after_bytes) for e in effects(run.state)] == [
        (1, 2, 1000, 900),
        (2, 3, 900, 700),
    ]


def test_training_is_preferred_to_other_phases_and_long_sequences_to_short_ones() -> None:
    run = life()
    for peaks in ((1, 10, 100), (2, 20, 200)):
        run.tell(PeakMeasured(attempt=run.n, phase="load", bytes=peaks[0], block_size=512))
        run.peak(peaks[1], 64)
        run.peak(peaks[2], 128)
        if run.n == 1:
            run.oom()
    [effect] = effects(run.state)
    assert (effect.phase, effect.block_size, effect.after_bytes) == ("train", 128, 200)
