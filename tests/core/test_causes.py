"""What lies behind a failure decides what is done about it, and the history of the run tells what that is."""

import pytest
from gpusup.supervisor.core.decide import EXIT_NO_PROGRESS, EXIT_STOPPED
from gpusup.supervisor.core.events import Finished, GpuTrouble, HangDetected, OomDetected
from gpusup.supervisor.core.oom_cause import cause_of
from gpusup.supervisor.core.policy import Restore
from gpusup.supervisor.core.verdict import OomNumbers
from lives import COMPILE_OFF, GIB, SMALLER, START, Life, created, kinds, policy, story


def life() -> Life:
    return Life(created(policy(SMALLER)))


def finished(life: Life) -> Finished:
    assert life.state.finished is not None
    return life.state.finished


# --- what is done -----------------------------------------------------------------------------------------------------


def test_leak_goes_on_with_the_same_settings_as_long_as_there_are_new_steps() -> None:
    told = life()
    for step in (500, 1000, 1500):
        told.steps(step)
        told.saved(step)
        assert kinds(told.oom(cause="leak")) == ["AttemptPlanned"]
        assert told.attempt.settings == START
    told.oom(cause="leak")
    assert told.batch == "8x6", "without a new step it is no leak that a fresh process would cure"
    assert not told.state.known_to_fail(START)


def test_memory_not_given_back_is_tried_once_more_before_anything_is_changed() -> None:
    told = life()
    assert kinds(told.oom(cause="not_given_back")) == ["AttemptPlanned"]
    assert told.attempt.settings == START
    told.oom(cause="not_given_back")
    assert told.batch == "8x6"


def test_lost_gpu_stops_the_run_and_a_gpu_that_is_well_again_does_not() -> None:
    told = life()
    told.steps(100)
    told.tell(GpuTrouble(attempt=1, trouble="lost"))
    told.ended(code=1)
    assert (finished(told).result, finished(told).exit_code) == ("stopped", EXIT_STOPPED)
    again = life()
    again.steps(100)
    again.tell(GpuTrouble(attempt=1, trouble="lost"), GpuTrouble(attempt=1, trouble="none"))
    again.steps(200)
    assert story(again.oom()) == ["micro-batch 12 x 4 -> 8 x 6"]


def test_hang_is_asked_to_save_and_goes_on_and_a_second_one_without_a_step_ends_the_run() -> None:
    told = life()
    told.steps(100)
    assert story(told.tell(HangDetected(attempt=1, step=100, silent_s=1800.0))) == ["save"]
    assert kinds(told.left()) == ["AttemptPlanned"]
    told.tell(HangDetected(attempt=2, step=100, silent_s=1800.0))
    told.left()
    assert finished(told).exit_code == EXIT_NO_PROGRESS


# --- what it is -------------------------------------------------------------------------------------------------------


def oom(step: int, cause: str = "own_growth", foreign: int | None = 0) -> OomDetected:
    numbers = OomNumbers(tried_to_allocate_bytes=GIB, free_bytes=0)
    return OomDetected(
        attempt=1, diagnosis="device_oom", step=step, message="", cause=cause, foreign_bytes=foreign, numbers=numbers
    )


@pytest.mark.parametrize(
    ("event", "growth", "held", "cause"),
    [
        (oom(500), None, False, "own_growth"),
        (oom(500), "steady", False, "own_growth"),
        (oom(500), "leak", False, "leak"),
        (oom(500), "spike", False, "spike"),
        (oom(500, cause="evaluation"), "leak", False, "evaluation"),
        (oom(3), "leak", False, "own_growth"),  # a model that is loaded grows too
        (oom(0), None, True, "not_given_back"),
        (oom(500), None, True, "own_growth"),  # hours later it has been
        (oom(0, foreign=4 * GIB), None, False, "foreign"),
        (oom(0, foreign=4 * GIB), None, True, "not_given_back"),
    ],
)
def test_cause_is_told_by_how_memory_grew_and_who_held_it(
    event: OomDetected, growth: None, held: bool, cause: str
) -> None:
    told = life()
    told.steps(500)
    assert cause_of(event, told.state, growth, held) == cause


def test_settings_that_ran_before_and_fail_while_resuming_fail_by_loading() -> None:
    told = life()
    told.steps(500)
    told.saved(500)
    told.ended(code=None)  # nobody saw it: the same settings again
    assert told.n == 2
    assert cause_of(oom(500), told.state, None, False) == "resume"
    told.steps(501)
    assert cause_of(oom(501), told.state, None, False) == "own_growth"


def test_speedup_on_probation_that_hangs_is_taken_back() -> None:
    told = Life(created(policy(COMPILE_OFF, SMALLER, restore=Restore(after_steps=100))))
    told.steps(50)
    told.saved(50)
    told.oom()
    told.oom()
    told.restores(150)
    assert (told.batch, told.attempt.settings["compile"]) == ("8x6", True)
    told.steps(160)
    told.tell(HangDetected(attempt=told.n, step=160, silent_s=1800.0))
    told.saved(160)
    assert story(told.left()) == ["back: compile on -> off"]
