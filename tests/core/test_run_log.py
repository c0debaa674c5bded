"""The post-mortem: what was lost, why, and what to start with next time."""

import msgspec
from gpusup.supervisor.core.events import CheckpointSaved, MemoryWaited, Note, Progress, SupervisorStarted
from gpusup.supervisor.core.policy import Restore
from gpusup.supervisor.core.run_log import RunLog, argv_changes, next_time, run_log, why
from gpusup.supervisor.core.unfold import unfold
from lives import COMPILE_OFF, GIB, SMALLER, START, WAIT, Life, created, policy, story


def life(*rungs: object, **changes: object) -> Life:
    return Life(created(policy(*rungs), **changes))  # type: ignore[arg-type]


def log_of(run: Life, supervised: bool = False) -> RunLog:
    return run_log(run.events, supervised)


def test_steps_done_again_are_lost_steps() -> None:
    run = life(SMALLER)
    run.steps(30)
    run.saved(40)
    run.steps(47)
    run.oom()
    assert log_of(run).run.lost_steps == 7
    run.steps(45)
    run.oom()
    assert log_of(run).run.lost_steps == 12, "41 to 47, and 41 to 45 once more"
    run.oom()
    assert log_of(run).run.lost_steps == 12, "it failed at once, so nothing more was lost"


def test_step_that_the_trainer_saved_before_it_left_is_not_lost() -> None:
    """Down the ladder, and back from a probation that did not fit."""
    run = Life(
        created(policy(COMPILE_OFF, SMALLER, restore=Restore(after_steps=10, order=("compile",), retry_failed=True)))
    )
    run.steps(30)
    run.tell(CheckpointSaved(attempt=run.n, step=31, path="/out/31", emergency=True))
    run.oom()
    assert (run.attempt.resume_step, run.attempt.settings["compile"]) == (31, False)
    run.restores(41)
    run.steps(45)
    run.tell(CheckpointSaved(attempt=run.n, step=45, path="/out/45", emergency=True))
    run.oom()
    assert (run.attempt.resume_step, run.attempt.settings["compile"]) == (45, False)
    assert log_of(run).run.lost_steps == 0


def test_what_is_told_once_in_an_attempt_is_known_to_whoever_takes_it_over() -> None:
    run = life(SMALLER)
    run.tell(Note(text="low", attempt=1, topic="alloc_retries"), Note(text="for a person"))
    assert run.attempt.told == {"alloc_retries"}
    run.oom()
    assert run.attempt.told == frozenset()


def test_everything_is_lost_without_a_checkpoint() -> None:
    run = life(SMALLER)
    run.steps(30)
    run.oom()
    assert log_of(run).run.lost_steps == 30
    assert run.attempt.from_step == 0


def test_seconds_are_lost_until_training_is_further_than_before() -> None:
    run = life(SMALLER)
    for at, step in ((10.0, 5), (20.0, 10)):
        run.now = at
        run.steps(step)
    run.now = 21.0
    run.oom()
    for at, step in ((40.0, 5), (60.0, 10), (70.0, 11), (80.0, 12)):
        run.now = at
        run.steps(step)
    summary = log_of(run).run
    assert summary.lost_s == 49.0
    assert summary.elapsed_s == 80.0


def test_checkpoint_beyond_the_furthest_step_ends_the_loss_too() -> None:
    run = life(SMALLER)
    run.oom()
    run.now = 5.0
    run.saved(1)
    assert log_of(run).run.lost_s == 5.0


def test_run_that_went_well_lost_nothing() -> None:
    run = life(SMALLER)
    run.now = 10.0
    run.steps(30)
    run.ended(code=0)
    summary = log_of(run).run
    assert (summary.lost_steps, summary.lost_s, summary.ooms, summary.attempts) == (0, 0.0, 0, 1)
    assert (summary.state, summary.exit_code, summary.next_time) == ("done", 0, "")
    assert summary.why == "finished with the settings it started with"


def test_unfinished_run_is_running_or_lost() -> None:
    run = life()
    assert log_of(run, supervised=True).run.state == "running"
    assert log_of(run, supervised=False).run.state == "lost"


def test_reason_names_the_settings_the_place_and_the_need() -> None:
    run = life(SMALLER, memory_budget_bytes=2 * GIB)
    run.steps(6)
    run.oom(GIB, block_size=1024)
    assert why(run.state) == (
        "micro-batch 12 x 4, bfloat16, compile on ran out of memory at step 7 (backward, sequence length 1024): "
        "1.00 GiB more were refused, and 2.00 GiB were allowed in all"
    )


def test_reason_without_numbers_claims_none() -> None:
    run = life(SMALLER)
    run.oom(phase=None)
    assert why(run.state).endswith(" more were refused")


def test_advice_is_what_fitted_last_as_settings_and_as_arguments() -> None:
    run = life(COMPILE_OFF, SMALLER)
    run.oom()
    run.saved(3)
    run.oom()
    assert run.attempt.argv[-1] == "--init_from=resume"
    run.steps(100)
    run.ended(code=0)
    assert next_time(run.state) == (
        "start with micro-batch 8 x 6, bfloat16, compile off "
        "(--compile=False --batch_size=8 --gradient_accumulation_steps=6)"
    )
    assert log_of(run).run.settings_at_start == START
    assert log_of(run).run.settings_at_end["batch_size"] == 8
    assert log_of(run).attempts[1].argv_changes == ("--compile=False",)


def test_advice_when_nothing_fitted() -> None:
    run = life(COMPILE_OFF)
    run.oom()
    run.oom()
    assert next_time(run.state).startswith("nothing that was tried fits")


def test_advice_after_a_wait_is_the_same_settings() -> None:
    run = life(WAIT)
    run.oom(foreign=8 * GIB)
    run.tell(MemoryWaited(enough=True, waited_s=3.0))
    run.steps(5)
    assert next_time(run.state) == "the same settings; they fitted in the end"


def test_attempts_show_which_arguments_changed() -> None:
    assert argv_changes(("p", "t.py", "--a=1"), ("p", "t.py", "--a=2", "--b=3")) == ("--a=2", "--b=3")
    assert argv_changes(("p", "t.py", "--a=1"), ("p", "t.py")) == ("(without --a=1)",)
    assert argv_changes(("p", "t.py"), ("p", "t.py")) == ()


def test_log_is_json_and_survives_the_round_trip() -> None:
    run = Life(created(policy(COMPILE_OFF, SMALLER, restore=Restore(after_steps=10, order=("compile",)))))
    for _ in range(3):
        run.oom(at_least=GIB)
    run.restores(10)
    run.peak(GIB)
    run.user_stops()
    run.left()
    log = log_of(run)
    assert msgspec.json.decode(msgspec.json.encode(log), type=RunLog) == log
    assert [attempt.n for attempt in log.attempts] == [1, 2, 3, 4, 5]
    assert log.attempts[-1].from_step == 10


def test_log_of_a_run_that_only_just_began() -> None:
    run = life()
    log = run_log(run.events[:1], supervised=True)
    assert (log.run.attempts, log.run.steps, log.run.why) == (0, 0, "no incident so far")


def test_every_prefix_of_a_history_has_a_log() -> None:
    run = Life(created(policy(WAIT, COMPILE_OFF, SMALLER, restore=Restore(after_steps=10)), target_steps=100))
    for _ in range(4):
        run.steps(run.state.max_step + 3)
        run.saved(run.state.max_step + 1)
        run.oom()
    run.tell(SupervisorStarted(pid=2), Progress(attempt=run.n, step=100))
    run.ended(code=0)
    for end in range(1, len(run.events) + 1):
        run_log(run.events[:end], supervised=False)


# --- the ladder shown beforehand --------------------------------------------------------------------------------------


def test_ladder_unfolds_as_it_would_be_used() -> None:
    run = life(COMPILE_OFF, SMALLER)
    lived = [line for _ in range(8) for line in story(run.oom())]
    assert story(list(unfold(created(run.rules)))) == lived


def test_ladder_unfolds_on_the_host_and_under_a_budget_too() -> None:
    told = unfold(created(policy(SMALLER), trains_on="host", memory_budget_bytes=GIB))
    assert story(list(told))[::5] == ["micro-batch 12 x 4 -> 8 x 6", "micro-batch 2 x 24 -> 1 x 48"]
    assert story(list(told))[-1] == "gave_up"


def test_night_in_which_the_run_was_stopped_is_not_lost_to_failures() -> None:
    run = life()
    run.steps(10)
    run.user_stops()
    run.now = 5.0
    run.left()
    run.now = 3600.0
    run.tell(SupervisorStarted(pid=2, takeover=True))
    run.steps(11)
    assert log_of(run).run.lost_s == 0.0
