"""Lives of a run, told fact by fact: what is decided, in which order, and what never is."""

import pytest
from gpusup.supervisor.core.decide import KILL_GRACE_S, TERMINATE_GRACE_S, decide, next_deadline, step_of_interest
from gpusup.supervisor.core.diagnosis import ExitStatus
from gpusup.supervisor.core.events import (
    AttemptEnded,
    AttemptPlanned,
    AttemptStarted,
    CheckpointPlan,
    CheckpointRejected,
    Finished,
    KnobUnavailable,
    MemoryWaited,
    Progress,
    RemediationChosen,
    RestorationReverted,
    RunCreated,
    StopAsked,
    StopRequested,
    SupervisorStarted,
    TrainerReported,
)
from gpusup.supervisor.core.policy import Policy, Remediation, Restore
from gpusup.supervisor.core.state import State, evolve, fold
from lives import COMPILE_OFF, FLOAT16, GIB, MIB, SMALLER, START, WAIT, Life, created, kinds, policy, story

UP = Restore(after_steps=100)
LADDER = (COMPILE_OFF, FLOAT16, SMALLER)
CANNOT_SAVE = CheckpointPlan(place="/out", every_steps=50)


def life(*remediations: Remediation, restore: Restore | None = None, **changes: object) -> Life:
    return Life(created(policy(*remediations, restore=restore), **changes))  # type: ignore[arg-type]


def finished(life: Life) -> Finished:
    assert life.state.finished is not None
    return life.state.finished


# --- down -------------------------------------------------------------------------------------------------------------


def test_ladder_is_used_in_the_policys_order_down_to_the_smallest_micro_batch() -> None:
    run = life(*LADDER)
    told = []
    while run.state.finished is None:
        told += [line for line in story(run.oom()) if not line.startswith("skipped")]
    assert told == [
        "compile on -> off",
        "dtype bfloat16 -> float16",
        "micro-batch 12 x 4 -> 8 x 6",
        "micro-batch 8 x 6 -> 6 x 8",
        "micro-batch 6 x 8 -> 4 x 12",
        "micro-batch 4 x 12 -> 3 x 16",
        "micro-batch 3 x 16 -> 2 x 24",
        "micro-batch 2 x 24 -> 1 x 48",
        "gave_up",
    ]
    assert finished(run).exit_code == 121
    assert "micro-batch 1 x 48, float16, compile off still does not fit" in finished(run).why


def test_smallest_allowed_micro_batch_is_respected() -> None:
    run = life(Remediation(name="smaller", step="micro_batch", min=6))
    run.oom()
    run.oom()
    assert run.batch == "6x8"
    run.oom()
    assert finished(run).result == "gave_up"


def test_useless_dtype_rung_is_undone_before_the_next_start_and_never_retried() -> None:
    run = life(FLOAT16, SMALLER)
    assert story(run.oom(GIB)) == ["dtype bfloat16 -> float16"]
    decisions = run.oom(GIB)
    assert story(decisions) == [
        "undo: dtype float16 -> bfloat16",
        "skipped float16: it was tried in this run and the very same request failed again",
        "micro-batch 12 x 4 -> 8 x 6",
    ]
    assert run.attempt.settings["dtype"] == "bfloat16"
    assert story(run.oom(GIB)) == ["micro-batch 8 x 6 -> 6 x 8"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"request": GIB}, {"request": GIB - GIB // 100}),
        ({"request": GIB, "phase": "forward"}, {"request": GIB, "phase": "backward"}),
        ({"request": GIB, "block_size": 64}, {"request": GIB, "block_size": 128}),
    ],
)
def test_rung_is_not_useless_when_another_request_failed(first: dict, second: dict) -> None:  # type: ignore[type-arg]
    run = life(FLOAT16, SMALLER)
    run.oom(**first)
    assert not any(line.startswith("undo") for line in story(run.oom(**second)))
    assert run.attempt.settings["dtype"] == "float16"


def test_rung_is_not_useless_when_others_took_the_memory_meanwhile() -> None:
    run = life(WAIT, FLOAT16, SMALLER)
    run.oom(GIB)
    assert story(run.oom(GIB, foreign=8 * GIB)) == ["wait"]
    run.tell(MemoryWaited(enough=True, waited_s=1.0))
    assert run.attempt.settings["dtype"] == "float16"


def test_rung_whose_undoing_the_policy_forbids_stays() -> None:
    run = life(COMPILE_OFF, SMALLER)
    run.oom(GIB)
    assert story(run.oom(GIB)) == ["micro-batch 12 x 4 -> 8 x 6"]
    assert run.attempt.settings["compile"] is False


def test_rung_is_not_useless_when_training_went_well_in_between() -> None:
    run = life(FLOAT16, SMALLER, restore=UP)
    run.oom(GIB)
    run.user_stops()
    run.left()
    run.tell(SupervisorStarted(pid=2))
    assert story(run.oom(GIB)) == ["micro-batch 12 x 4 -> 8 x 6"]


def test_compile_that_is_unavailable_is_no_rung_and_is_not_given_back() -> None:
    run = life(COMPILE_OFF, SMALLER, restore=UP)
    run.tell(KnobUnavailable(attempt=1, knob="compile", reason="no C++ compiler"))
    assert story(run.oom()) == [
        "skipped compile off: compile is unavailable here, so it is off already",
        "micro-batch 12 x 4 -> 8 x 6",
    ]
    assert run.steps(99) == []
    assert story(run.steps(100)) == [
        "not up micro_batch: micro-batch 12 x 4, bfloat16, compile on ran out of memory in this run already"
    ]


def test_compile_found_unavailable_after_it_was_turned_off_is_not_given_back() -> None:
    run = life(COMPILE_OFF, restore=Restore(after_steps=10, order=("compile",)))
    run.oom()
    run.tell(KnobUnavailable(attempt=2, knob="compile", reason="no C++ compiler"))
    assert run.steps(1000) == []


def test_unknown_knobs_stay_absent_from_the_settings_until_a_remediation_sets_them() -> None:
    start = {knob: START[knob] for knob in ("compile", "batch_size", "gradient_accumulation_steps")}
    run = life(FLOAT16, SMALLER, settings=start, restore=Restore(after_steps=10, order=("dtype",)))
    assert run.attempt.settings == start
    assert story(run.oom()) == ["dtype unknown -> float16"]
    assert run.attempt.settings == {**start, "dtype": "float16"}
    run.oom()
    assert run.batch == "8x6"
    run.restores(10)
    assert "dtype" not in run.attempt.settings


def test_micro_batch_stays_when_the_global_batch_is_unknown() -> None:
    start = {"batch_size": 12, "dtype": "float16"}
    run = life(SMALLER, settings=start, restore=Restore(after_steps=10))
    assert run.steps(500) == []
    decisions = run.oom()
    assert story(decisions) == [
        "skipped micro-batch down: the micro-batch or its accumulation is unknown, so the global batch could not be "
        "held",
        "gave_up",
    ]


def test_knob_the_dialect_does_not_have_is_not_set() -> None:
    run = life(FLOAT16, SMALLER, origins={"batch_size": created(policy()).origins["batch_size"]})
    assert story(run.oom())[0] == "skipped float16: the nanogpt dialect has no dtype to set"


def test_knob_without_effect_here_is_not_set() -> None:
    run = life(FLOAT16, SMALLER, no_effect={"dtype": "ignored on a CPU"})
    assert story(run.oom()) == ["skipped float16: ignored on a CPU", "micro-batch 12 x 4 -> 8 x 6"]


def test_accumulation_stays_divisible_among_the_ranks() -> None:
    start = {**START, "batch_size": 12, "gradient_accumulation_steps": 40}  # 480
    run = life(SMALLER, settings=start, accumulation_multiple=8)
    seen = []
    while run.state.finished is None:
        seen.append(run.batch)
        run.oom()
    assert seen == ["12x40", "10x48", "6x80", "5x96", "4x120", "3x160", "2x240", "1x480"]


def test_trainers_own_word_on_the_global_batch_is_held() -> None:
    run = life(SMALLER)
    run.tell(TrainerReported(attempt=1, step=0, global_batch_size=50))
    run.oom()
    assert run.batch == "10x5"


# --- what the policy does not cover -----------------------------------------------------------------------------------


@pytest.mark.parametrize("diagnosis", ["crash", "host_oom_suspected", "shm_oom", "nan", "unknown", "disk_full"])
def test_failure_that_is_no_proven_oom_changes_no_setting_and_ends_the_run(diagnosis: str) -> None:
    run = life(*LADDER, restore=UP)
    decisions = run.ended(code=7, diagnosis=diagnosis, message="boom")
    assert kinds(decisions) == ["Finished"]
    assert finished(run).result == "failed"
    assert finished(run).exit_code == 7
    assert "boom" in finished(run).why
    assert run.state.settings == START


def test_sigkill_without_proof_is_not_covered_and_says_so() -> None:
    run = life(*LADDER)
    run.ended(signal=9, diagnosis="host_oom_suspected")
    assert finished(run).exit_code == 137
    assert "nothing proves it" in finished(run).why


def test_host_oom_of_a_gpu_run_is_not_covered() -> None:
    run = life(*LADDER)
    run.oom(diagnosis="host_oom", foreign=None)
    assert finished(run).result == "failed"
    assert "a smaller micro-batch does not" in finished(run).why
    assert run.state.settings == START


def test_host_oom_of_a_host_run_is_covered() -> None:
    run = life(*LADDER, trains_on="host")
    assert story(run.oom(diagnosis="host_oom", foreign=None)) == ["compile on -> off"]


def test_lost_exit_status_is_not_taken_for_success() -> None:
    run = life(*LADDER)
    run.steps(5)
    assert kinds(run.ended(diagnosis="unknown")) == ["AttemptPlanned"]
    assert run.attempt.settings == START
    run.ended(diagnosis="unknown")
    assert (finished(run).result, finished(run).exit_code) == ("stopped", 122)


def test_end_that_nobody_saw_reverts_no_probation() -> None:
    run = life(COMPILE_OFF, SMALLER, restore=UP)
    run.oom()
    run.oom()
    run.restores(100)
    tried = run.attempt.settings
    run.steps(101)
    assert kinds(run.ended(diagnosis="unknown")) == ["AttemptPlanned"]
    assert run.attempt.settings == tried
    assert run.state.failed_tries == {}


def test_oom_without_remediations_gives_up() -> None:
    run = life()
    run.oom()
    assert finished(run).result == "gave_up"
    assert "no remediations" in finished(run).why


def test_limit_on_attempts_ends_the_run() -> None:
    run = Life(created(policy(*LADDER, max_attempts=3)))
    for _ in range(3):
        run.oom()
    assert len(run.state.attempts) == 3
    assert finished(run).result == "gave_up"
    assert "3 attempts" in finished(run).why


# --- memory that others hold ------------------------------------------------------------------------------------------


def test_wait_comes_first_when_others_hold_much_memory() -> None:
    run = life(WAIT, *LADDER)
    assert story(run.oom(GIB, foreign=8 * GIB)) == ["wait"]
    assert decide(run.state, run.rules, 1e9) is None
    decisions = run.tell(MemoryWaited(enough=True, waited_s=3.0))
    assert kinds(decisions) == ["AttemptPlanned"]
    assert run.attempt.settings == START
    assert run.state.failed == ()


def test_wait_in_vain_is_followed_by_the_next_rung_and_never_repeated() -> None:
    run = life(WAIT, SMALLER)
    run.oom(GIB, foreign=8 * GIB)
    assert story(run.tell(MemoryWaited(enough=False, waited_s=60.0))) == [
        "skipped wait: it was waited for in this run, and others kept the memory",
        "micro-batch 12 x 4 -> 8 x 6",
    ]
    assert story(run.oom(GIB, foreign=8 * GIB)) == ["micro-batch 8 x 6 -> 6 x 8"]


def test_memory_given_back_once_can_be_waited_for_again() -> None:
    run = life(WAIT, SMALLER)
    run.oom(GIB, foreign=8 * GIB)
    run.tell(MemoryWaited(enough=True, waited_s=5.0))
    assert story(run.oom(GIB, foreign=8 * GIB)) == ["wait"]


@pytest.mark.parametrize("foreign", [None, 0, 100 * MIB])
def test_no_wait_when_what_others_hold_is_unknown_or_small(foreign: int | None) -> None:
    run = life(WAIT, *LADDER)
    told = story(run.oom(GIB, foreign=foreign))
    assert "wait" not in told
    assert "compile on -> off" in told


def test_desktop_on_the_gpu_does_not_excuse_a_combination_that_ran_out() -> None:
    run = life(WAIT, SMALLER, restore=Restore(after_steps=10))
    run.oom(20 * MIB, foreign=100 * MIB)
    assert run.batch == "8x6"
    assert story(run.steps(10)) == [
        "not up micro_batch: micro-batch 12 x 4, bfloat16, compile on ran out of memory in this run already"
    ]


def test_no_wait_when_others_hold_too_little_to_be_the_cause() -> None:
    run = life(WAIT, SMALLER)
    assert story(run.oom(2 * GIB, foreign=300 * MIB, free=MIB))[-1:] == ["micro-batch 12 x 4 -> 8 x 6"]


def test_wait_when_what_others_hold_makes_up_for_what_was_short() -> None:
    run = life(WAIT, SMALLER, restore=Restore(after_steps=10))
    assert story(run.oom(2 * GIB, foreign=300 * MIB, free=2 * GIB - 200 * MIB)) == ["wait"]
    assert run.state.failed == ()


# --- up ---------------------------------------------------------------------------------------------------------------


def lowered(restore: Restore, **changes: object) -> Life:
    """At 3x16, compile off: three OOMs at step 0 were its way there."""
    run = life(COMPILE_OFF, SMALLER, restore=restore, **changes)
    for _ in range(5):
        run.oom()
    assert run.batch == "3x16"
    return run


def test_nothing_is_given_back_before_enough_stable_steps() -> None:
    run = life(COMPILE_OFF, restore=Restore(after_steps=100, order=("compile",), retry_failed=True))
    run.oom()
    assert run.steps(99) == []
    assert story(run.steps(100)) == ["up: compile off -> on", "save"]


def test_levers_are_given_back_in_order_one_at_a_time_each_after_its_probation() -> None:
    run = life(COMPILE_OFF, FLOAT16, SMALLER, restore=Restore(after_steps=10, order=("dtype", "compile")))
    for _ in range(3):
        run.oom()
    run.restores(10)
    assert (run.attempt.settings["dtype"], run.attempt.settings["compile"]) == ("bfloat16", False)
    assert run.steps(19) == []
    decisions = run.steps(20)
    assert story(decisions) == ["kept: dtype", "up: compile off -> on", "save"]
    run.saved(20)
    run.left()
    assert (run.attempt.settings["dtype"], run.attempt.settings["compile"]) == ("bfloat16", True)
    assert story(run.steps(30)) == ["kept: compile"]
    assert run.steps(1000) == []
    run.ended(code=0)
    assert finished(run).result == "done"


def test_oom_after_restored_compile_reverts_only_compile() -> None:
    run = lowered(Restore(after_steps=10, order=("compile", "micro_batch")))
    run.restores(10)
    assert run.attempt.settings["compile"] is True
    decisions = run.oom()
    assert story(decisions) == ["back: compile on -> off"]
    assert run.batch == "3x16"
    assert run.attempt.settings["compile"] is False


def test_crash_on_probation_reverts_the_speedup_and_goes_on() -> None:
    run = lowered(Restore(after_steps=10, order=("compile",)))
    run.restores(10)
    assert story(run.ended(code=1)) == ["back: compile on -> off"]
    assert run.state.finished is None


def test_wait_doubles_after_each_failed_try_until_the_tries_are_used_up() -> None:
    run = lowered(Restore(after_steps=10, order=("compile",), max_tries=3, retry_failed=True))
    step, waits = 0, []
    for wait in (10, 20, 40):
        assert run.steps(step + wait - 1) == []
        run.restores(step + wait)
        step += wait
        reverted = next(d for d in run.oom() if isinstance(d, RestorationReverted))
        waits.append(reverted.next_wait_steps)
    assert waits == [20, 40, 80]
    assert story(run.steps(step + 79)) == ["not up compile: it failed 3 times in this run"]
    assert run.steps(step + 10_000) == []


def test_failed_combination_is_not_retried_unless_the_policy_says_so() -> None:
    restore = Restore(after_steps=10, order=("micro_batch",))
    run = life(SMALLER, restore=restore)
    run.oom()
    assert story(run.steps(10)) == [
        "not up micro_batch: micro-batch 12 x 4, bfloat16, compile on ran out of memory in this run already"
    ]
    again = life(SMALLER, restore=Restore(after_steps=10, order=("micro_batch",), retry_failed=True))
    again.oom()
    assert story(again.steps(10))[0] == "up: micro-batch 8 x 6 -> 12 x 4"


def test_micro_batch_goes_up_in_small_steps_below_what_failed() -> None:
    run = lowered(Restore(after_steps=10, order=("compile", "micro_batch")))
    assert run.state.attempts[-2].settings["batch_size"] == 4
    run.restores(10)  # compile: 3x16 with compile never failed
    assert story(run.steps(20)) == ["kept: compile", "up: micro-batch 3 x 16 -> 4 x 12", "save"]
    run.saved(20)
    run.left()
    assert story(run.steps(30)) == ["kept: micro_batch", "up: micro-batch 4 x 12 -> 6 x 8", "save"]


def test_replayed_steps_are_not_counted_as_stable() -> None:
    run = lowered(Restore(after_steps=10, order=("compile",)))
    run.steps(5)
    run.saved(5)
    run.tell(Progress(attempt=run.n, step=8))
    run.user_stops()
    run.left()
    run.tell(SupervisorStarted(pid=2))
    assert run.attempt.resume_step == 5
    assert run.attempt.new_from == 8
    assert run.steps(17) == []
    assert story(run.steps(18)) == ["up: compile off -> on", "save"]


def test_trainer_that_cannot_save_is_stopped_only_just_after_a_checkpoint() -> None:
    run = lowered(Restore(after_steps=10, order=("compile",)), checkpoints=CANNOT_SAVE)
    run.saved(9)
    assert run.steps(30) == []
    assert story(run.saved(50)) == ["up: compile off -> on", "terminate"]


def test_nothing_is_given_back_when_too_few_steps_remain() -> None:
    run = lowered(Restore(after_steps=10, order=("compile",)), target_steps=19)
    assert story(run.steps(10)) == ["not up compile: fewer than 10 steps remain"]
    again = lowered(Restore(after_steps=10, order=("compile",)), target_steps=20)
    assert story(again.steps(10))[0] == "up: compile off -> on"


def test_steps_that_may_change_a_decision_are_known_beforehand() -> None:
    run = lowered(Restore(after_steps=10, order=("compile",), retry_failed=True))
    assert step_of_interest(run.state, run.rules) == 10
    run.restores(10)
    run.oom()
    run.steps(20)
    assert step_of_interest(run.state, run.rules) == 30


def test_oom_while_leaving_for_a_restoration_goes_down_instead() -> None:
    run = lowered(Restore(after_steps=10, order=("micro_batch",), retry_failed=True))
    assert story(run.steps(10)) == ["up: micro-batch 3 x 16 -> 4 x 12", "save"]
    decisions = run.oom()
    assert story(decisions)[0] == "back: micro-batch 4 x 12 -> 3 x 16"
    assert run.batch == "2x24"
    assert run.state.failed_tries == {}, "it was never tried"


# --- the budget -------------------------------------------------------------------------------------------------------


def budgeted() -> Life:
    run = life(*LADDER, restore=UP, memory_budget_bytes=GIB)
    run.state, run.events = State(), []
    for event in (created(run.rules, memory_budget_bytes=GIB), SupervisorStarted(pid=1)):
        run.record(event)
    plan = decide(run.state, run.rules, 0.0)
    assert isinstance(plan, AttemptPlanned)
    run.record(plan)
    run.record(AttemptStarted(attempt=1, pid=5, start_ticks=1))
    return run


def test_trainer_whose_budget_is_not_in_force_is_killed_at_its_first_step() -> None:
    run = budgeted()
    assert run.tell() == []
    decisions = run.steps(1)
    assert story(decisions) == ["kill"]
    run.ended(signal=9)
    assert finished(run).exit_code == 125
    assert "memory budget did not take effect" in finished(run).why


@pytest.mark.parametrize("success", [True, False])
def test_result_without_a_confirmed_budget_counts_for_nothing(success: bool) -> None:
    run = budgeted()
    _ = run.ended(code=0) if success else run.oom()
    assert finished(run).result == "failed"
    assert finished(run).exit_code == 125


def test_crash_before_the_budget_could_be_confirmed_keeps_its_own_exit_code() -> None:
    run = budgeted()
    run.ended(code=3, message="ImportError")
    assert finished(run).exit_code == 3
    assert "ImportError" in finished(run).why


# --- observing --------------------------------------------------------------------------------------------------------


def test_observing_tells_what_it_would_do_and_changes_nothing() -> None:
    run = life(*LADDER, restore=UP, observe=True)
    decisions = run.oom()
    assert [d.applied for d in decisions if isinstance(d, RemediationChosen)] == [False]
    assert kinds(decisions)[-1] == "Finished"
    assert finished(run).exit_code == 1
    assert run.state.settings == START
    assert len(run.state.attempts) == 1


def test_observed_run_that_was_stopped_goes_on_when_taken_over() -> None:
    run = life(*LADDER, observe=True)
    run.user_stops()
    run.left()
    assert kinds(run.tell(SupervisorStarted(pid=2))) == ["AttemptPlanned"]
    assert run.attempt.settings == START


def test_observing_never_stops_a_trainer() -> None:
    run = life(*LADDER, restore=Restore(after_steps=1), observe=True)
    assert run.steps(1000) == []


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_user_stop_before_the_first_attempt_starts_nothing() -> None:
    rules = policy(*LADDER)
    decision = decide(fold([created(rules), SupervisorStarted(pid=1), StopAsked(by="SIGTERM")]), rules, 0.0)
    assert isinstance(decision, Finished)
    assert decision.exit_code == 122


def test_user_stop_while_training_saves_and_ends_with_122() -> None:
    run = life(*LADDER)
    assert story(run.user_stops()) == ["save"]
    run.saved(7)
    assert story(run.left()) == ["stopped"]
    assert finished(run).exit_code == 122


def test_user_stop_of_a_trainer_that_finishes_meanwhile_is_done() -> None:
    run = life(*LADDER, target_steps=50)
    run.steps(50)
    run.user_stops()
    run.ended(code=0)
    assert finished(run).result == "done"


def test_user_stop_after_an_oom_starts_nothing_more() -> None:
    run = life(WAIT, *LADDER)
    run.oom(foreign=8 * GIB)
    assert story(run.user_stops()) == ["stopped"]


def test_user_stop_of_a_finished_run_changes_nothing() -> None:
    run = life()
    run.ended(code=0)
    assert run.user_stops() == []
    assert finished(run).result == "done"


def test_stopped_run_goes_on_with_the_same_settings_when_taken_over() -> None:
    run = life(*LADDER)
    run.oom()
    run.user_stops()
    run.saved(7)
    run.left()
    decisions = run.tell(SupervisorStarted(pid=2))
    assert kinds(decisions) == ["AttemptPlanned"]
    assert run.attempt.resume_step == 7
    assert run.attempt.because == "the same settings again"


def test_run_stopped_on_probation_goes_on_with_its_probation() -> None:
    run = lowered(Restore(after_steps=10, order=("compile",)))
    run.restores(10)
    run.steps(15)
    run.user_stops()
    run.saved(15)
    run.left()
    run.tell(SupervisorStarted(pid=2))
    assert run.attempt.settings["compile"] is True
    assert run.state.failed_tries == {}
    assert story(run.steps(25)) == ["kept: compile"]


def test_run_stopped_before_its_budget_was_confirmed_goes_on_when_taken_over() -> None:
    run = budgeted()
    run.user_stops()
    run.left()
    assert finished(run).result == "stopped"
    assert kinds(run.tell(SupervisorStarted(pid=2))) == ["AttemptPlanned"]


def test_trainer_that_exits_with_0_when_told_to_leave_is_not_done() -> None:
    run = lowered(Restore(after_steps=10, order=("compile",)), target_steps=100)
    assert story(run.steps(10)) == ["up: compile off -> on", "save"]
    run.saved(10)
    assert kinds(run.ended(code=0)) == ["AttemptPlanned"]
    run.user_stops()
    assert story(run.ended(code=0)) == ["stopped"]


def test_stop_escalates_from_save_to_abandoning_each_at_its_deadline() -> None:
    run = Life(created(policy(*LADDER, grace_s=60.0)))
    run.user_stops()
    told = []
    for grace in (60.0, TERMINATE_GRACE_S, KILL_GRACE_S):
        deadline = next_deadline(run.state)
        assert deadline == run.now + grace
        run.now = deadline - 0.01
        assert run.tell() == []
        run.now = deadline
        told += story(run.tell())
    assert told == ["terminate", "kill", "failed"]
    assert finished(run).exit_code == 125
    assert "does not end" in finished(run).why
    assert len(run.state.attempts) == 1, "nothing is started beside a process that will not die"


def test_second_request_to_stop_kills_at_once() -> None:
    run = life(*LADDER)
    assert story(run.user_stops()) == ["save"]
    assert story(run.user_stops(now=True)) == ["kill"]
    assert run.user_stops(now=True) == []


def test_trainer_that_cannot_save_is_terminated() -> None:
    run = life(checkpoints=CANNOT_SAVE)
    decisions = run.user_stops()
    assert story(decisions) == ["terminate"]
    assert isinstance(decisions[0], StopRequested)
    assert decisions[0].deadline_mono == run.now + TERMINATE_GRACE_S


# --- checkpoints and the fold -----------------------------------------------------------------------------------------


def test_each_rejected_checkpoint_falls_back_to_the_one_before_and_then_to_the_start() -> None:
    run = life(SMALLER)
    run.saved(10)
    run.saved(20)
    run.record(AttemptEnded(attempt=1, exit=ExitStatus(code=1), step=25, diagnosis="device_oom"))
    seen = []
    while run.state.checkpoint is not None:
        seen.append(run.state.checkpoint.step)
        run.record(CheckpointRejected(path=run.state.checkpoint.source, step=seen[-1], why="torn"))
    assert seen == [20, 10]


def test_run_whose_checkpoints_are_all_unreadable_stops_instead_of_starting_over_and_looks_again() -> None:
    run = life(SMALLER)
    run.saved(10)
    assert run.state.checkpoint is not None
    run.record(CheckpointRejected(path=run.state.checkpoint.source, step=10, why="it could not be read"))
    run.oom()
    assert (finished(run).result, finished(run).exit_code) == ("stopped", 122)
    run.tell(SupervisorStarted(pid=2, takeover=True))
    assert run.attempt.resume_step == 10


def test_checkpoints_of_a_replayed_stretch_replace_the_rejected_future() -> None:
    run = life(SMALLER)
    run.saved(10)
    run.saved(20)
    run.oom()
    assert run.attempt.resume_step == 20
    run.saved(15)  # it went back further than told: what lies ahead is not of this line of training
    run.oom()
    assert run.attempt.resume_step == 15


def test_taking_over_in_the_middle_changes_nothing_but_who_supervises() -> None:
    run = life(*LADDER)
    before = run.state
    assert run.tell(SupervisorStarted(pid=9, takeover=True)) == []
    assert run.state.attempts == before.attempts
    assert run.state.settings == before.settings


def test_events_of_attempts_never_planned_fold_without_an_error() -> None:
    state = fold([created(policy()), Progress(attempt=3, step=5), KnobUnavailable(attempt=9, knob="x", reason="")])
    assert state.attempts == ()


def test_nothing_is_decided_before_the_run_exists() -> None:
    assert decide(State(), Policy(), 0.0) is None
    assert decide(evolve(State(), SupervisorStarted(pid=1)), Policy(), 0.0) is None


def test_recreated_run_forgets_everything() -> None:
    run = life(*LADDER)
    run.oom()
    again: RunCreated = created(run.rules)
    assert evolve(run.state, again).attempts == ()


@pytest.mark.parametrize(("limit", "restored"), [(2, False), (3, False), (4, True)])
def test_nothing_is_given_back_when_no_attempt_is_left_to_take_it_back(limit: int, restored: bool) -> None:
    run = Life(created(policy(SMALLER, restore=Restore(after_steps=10, retry_failed=True), max_attempts=limit)))
    run.oom()
    decisions = run.steps(20)
    assert ("RestorationChosen" in kinds(decisions)) == restored, story(decisions)
    assert run.steps(30) == [] or restored, "told once"
