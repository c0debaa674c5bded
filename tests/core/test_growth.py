"""Leaks, spikes and settings that are simply too large, told from memory in use once a second."""

from gpusup.supervisor.core.growth import LEAST_SAMPLES, growth_of
from hypothesis import given
from hypothesis import strategies as st

GIB = 1 << 30


@given(st.integers(60, 2000), st.integers(0, 50), st.floats(1.2, 3))
def test_steady_rise_is_a_leak_though_it_is_uneven(count: int, noise: int, rise: float) -> None:
    samples = [round((8 + rise * at / count) * GIB) + (at * 7919 % (noise + 1) << 18) for at in range(count)]
    assert growth_of(samples, 12 * GIB) == "leak"


@given(st.integers(LEAST_SAMPLES, 2000), st.integers(0, 255))
def test_level_line_near_the_limit_is_no_leak_and_no_spike(count: int, noise: int) -> None:
    samples = [11 * GIB + (at * 7919 % (noise + 1) << 20) for at in range(count)]
    assert growth_of(samples, 12 * GIB) == "steady"


def test_refusal_out_of_a_level_line_with_room_is_a_spike() -> None:
    assert growth_of([8 * GIB] * 100, 13 * GIB) == "spike"
    assert growth_of([8 * GIB] * 100, None) == "steady"


def test_warm_up_of_the_first_steps_is_no_leak() -> None:
    samples = [at * GIB // 4 for at in range(40)] + [11 * GIB] * 200
    assert growth_of(samples, 12 * GIB) == "steady"


def test_sawtooth_of_a_cache_is_no_leak() -> None:
    samples = [9 * GIB + (at % 20) * (GIB // 10) for at in range(400)]
    assert growth_of(samples, 12 * GIB) != "leak"


def test_few_samples_say_nothing() -> None:
    assert growth_of([GIB] * (LEAST_SAMPLES - 1), 12 * GIB) is None
