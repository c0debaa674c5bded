"""The global batch is held exactly, or not at all."""

import pytest
from gpusup.supervisor.core.batch import accumulation_for, divisors, exact_micro_batches
from hypothesis import given
from hypothesis import strategies as st

SIZES = st.integers(1, 5000)


@given(SIZES)
def test_divisors_are_all_of_them_ascending(n: int) -> None:
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@given(SIZES, st.integers(1, 16))
def test_every_exact_micro_batch_holds_the_global_batch_and_no_other_does(held: int, ranks: int) -> None:
    exact = exact_micro_batches(held, ranks)
    for micro in range(1, held + 1):
        holds = held % micro == 0 and (held // micro) % ranks == 0
        assert (micro in exact) == holds
        if holds:
            assert accumulation_for(held, micro) * micro == held


@given(SIZES, SIZES)
def test_micro_batch_that_does_not_divide_is_refused(held: int, micro: int) -> None:
    if held % micro:
        with pytest.raises(ValueError, match=f"micro-batch {micro} does not divide the global batch {held}"):
            accumulation_for(held, micro)


def test_gpt2_ladder_is_finer_than_halving() -> None:
    assert exact_micro_batches(480)[:10] == [1, 2, 3, 4, 5, 6, 8, 10, 12, 15]
    assert exact_micro_batches(480, 8)[-3:] == [20, 30, 60]
