"""Laws of a run, over random nights: a trainer with random needs of memory, saving, crashing, obeying or not."""

import random
from dataclasses import dataclass, field

import msgspec
from gpusup.supervisor.core.batch import exact_micro_batches
from gpusup.supervisor.core.decide import EXIT_LADDER_EXHAUSTED, EXIT_SELF, EXIT_STOPPED, decide, next_deadline
from gpusup.supervisor.core.diagnosis import ExitStatus, OomNumbers
from gpusup.supervisor.core.events import (
    AnyEvent,
    AttemptEnded,
    AttemptPlanned,
    AttemptStarted,
    BudgetApplied,
    CheckpointPlan,
    CheckpointRejected,
    CheckpointSaved,
    Finished,
    KnobUnavailable,
    MemoryWaited,
    OomDetected,
    PeakMeasured,
    Progress,
    Resumed,
    RunCreated,
    StopAsked,
    StopRequested,
    SupervisorStarted,
    TrainerReported,
)
from gpusup.supervisor.core.policy import Remediation, Restore, Settings
from gpusup.supervisor.core.state import State, evolve
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lives import GIB, MIB, WAIT, created, policy
from msgspec.structs import replace

ENCODER = msgspec.json.Encoder()
DECODER: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)
TARGET = 60
PATIENCE = 400
"""Facts after which the person asks the run to stop, so that every night ends."""


@dataclass
class World:
    """A trainer whose need of memory is `weight[compile, dtype] * micro-batch`, and what befalls it."""

    run: RunCreated
    weights: dict[tuple[object, object], int]
    capacity: int
    luck: random.Random
    can_save: bool
    obeys: tuple[str, ...]
    trouble: float
    state: State = field(default_factory=State)
    replayed: State = field(default_factory=State)
    events: list[AnyEvent] = field(default_factory=list)
    failed: list[Settings] = field(default_factory=list)
    now: float = 0.0
    planned: list[AttemptPlanned] = field(default_factory=list)

    # --- the shell's part ---

    def record(self, event: AnyEvent) -> None:
        stamped: AnyEvent = replace(event, seq=len(self.events) + 1, at="2030-01-01T00:00:00.000Z", mono=self.now)
        line = ENCODER.encode(stamped)
        assert b"\n" not in line
        self.state = evolve(self.state, stamped)
        self.replayed = evolve(self.replayed, DECODER.decode(line))
        assert self.replayed == self.state
        self.events.append(stamped)

    def live(self) -> None:
        self.record(self.run)
        self.record(SupervisorStarted(pid=1))
        for facts in range(PATIENCE * 4):
            self.decide_all()
            if self.state.finished is not None:
                if self.state.finished.result != "stopped" or facts >= PATIENCE or self.chance(0.3):
                    return
                self.record(SupervisorStarted(pid=4, takeover=True))  # `gpusup resume`
                continue
            if facts >= PATIENCE and self.state.stop_asked is None:
                self.record(StopAsked(by="patience"))
                continue
            self.happen()
        raise AssertionError("the run does not end")

    def decide_all(self) -> None:
        last = None
        for _ in range(2 * len(self.run.policy.remediations) + 12):
            decision = decide(self.state, self.run.policy, self.now)
            if decision is None:
                return
            assert decision != last, "the same decision twice in a row"
            last = decision
            if not isinstance(decision, AttemptPlanned):
                self.record(decision)
                continue
            if decision.resume_path and self.chance(0.3):
                self.record(
                    CheckpointRejected(path=decision.resume_path, step=decision.resume_step or 0, why="it is torn")
                )
                last = None
                continue
            self.start(decision)
        raise AssertionError("one fact caused decisions without end")

    def start(self, plan: AttemptPlanned) -> None:
        assert all(attempt.ended for attempt in self.state.attempts), "two trainers at once"
        self.check_settings(plan.settings)
        self.planned.append(plan)
        self.record(plan)
        lost = self.state.max_step - (plan.resume_step or 0)
        assert lost >= 0
        if plan.resume_path or lost:
            self.record(Resumed(attempt=plan.attempt, step=plan.resume_step or 0, lost_steps=lost))
        if self.chance(self.trouble / 4):
            self.record(SupervisorStarted(pid=2, takeover=True))
        self.record(AttemptStarted(attempt=plan.attempt, pid=plan.attempt, start_ticks=1))
        if self.run.memory_budget_bytes:
            self.record(BudgetApplied(attempt=plan.attempt, where="device", baseline_bytes=0, limit_bytes=1))
        if self.can_save:
            self.record(TrainerReported(attempt=plan.attempt, step=0, target_steps=TARGET, can_save=True))

    # --- laws of every start ---

    def check_settings(self, planned: Settings) -> None:
        micro, accumulation = planned.get("batch_size"), planned.get("gradient_accumulation_steps")
        if self.run.global_batch_size is not None:
            assert micro * accumulation == self.run.global_batch_size
            assert accumulation % self.run.accumulation_multiple == 0
        else:
            start = self.run.settings
            assert (micro, accumulation) == (start.get("batch_size"), start.get("gradient_accumulation_steps"))
        assert planned.get("block_size") == self.run.settings.get("block_size")
        restore = self.run.policy.restore
        if restore is None or not restore.retry_failed:
            for failed in self.failed:
                assert not must_fail(planned, failed), f"{planned} is started although {failed} ran out of memory"

    # --- the trainer's part ---

    def chance(self, odds: float) -> bool:
        return self.luck.random() < odds

    def happen(self) -> None:
        attempt = self.state.attempt
        self.now += 1.0
        if self.state.waiting_for_memory_s is not None:
            self.record(MemoryWaited(enough=self.chance(0.7), waited_s=1.0))
            return
        assert attempt is not None, "nothing decided and nothing runs"
        assert not attempt.ended, "nothing decided and nothing runs"
        if attempt.stop is not None:
            self.told_to_leave(attempt.stop)
        elif self.chance(self.trouble):
            self.trouble_strikes(attempt.n, attempt.step)
        else:
            self.train(attempt.n, attempt.step, attempt.settings)

    def told_to_leave(self, stop: StopRequested) -> None:
        attempt = self.state.attempt
        assert attempt is not None
        if self.chance(0.1):
            self.out_of_memory(attempt.n, attempt.step, foreign=0)  # as it saves, say
        elif stop.how in self.obeys:
            if stop.how == "save" and self.chance(0.8):
                self.save(attempt.n, attempt.step)
            if stop.how != "kill" and self.chance(0.1):
                self.end(attempt.step, code=0)
            else:
                self.end(attempt.step, signal=9 if stop.how == "kill" else 15)
        elif self.chance(0.1):
            self.record(SupervisorStarted(pid=5, takeover=True))
        elif self.chance(0.1):
            self.record(StopAsked(by="person", now=self.chance(0.5)))
        else:
            deadline = next_deadline(self.state)
            assert deadline is not None
            assert self.now - 1.0 <= deadline
            self.now = deadline

    def trouble_strikes(self, n: int, step: int) -> None:
        match self.luck.randrange(7):
            case 0:
                self.record(StopAsked(by="person", now=self.chance(0.3)))
            case 1:
                self.record(KnobUnavailable(attempt=n, knob="compile", reason="no compiler"))
            case 2:
                self.end(step, code=3)
            case 3:
                self.end(step, signal=9, diagnosis="host_oom_suspected")
            case 4:
                self.record(SupervisorStarted(pid=3, takeover=True))
            case 5:
                self.out_of_memory(n, step, foreign=self.luck.choice([None, 0, 100 * MIB, 300 * MIB, 9 * GIB]))
            case _:
                self.out_of_memory(n, step, foreign=0, diagnosis="host_oom")

    def train(self, n: int, step: int, current: Settings) -> None:
        step += self.luck.randint(1, 3)
        if self.need(current) > self.capacity:
            self.out_of_memory(n, step - 1, foreign=0)
            return
        if step >= TARGET:
            self.record(Progress(attempt=n, step=TARGET))
            if self.state.attempt is not None and self.chance(0.9):
                self.end(TARGET, code=0)
            return
        if self.chance(0.4):
            self.save(n, step)
        else:
            self.record(Progress(attempt=n, step=step, loss=1.5, step_s=0.25))
            self.record(PeakMeasured(attempt=n, phase="train", bytes=self.need(current)))

    def need(self, current: Settings) -> int:
        """In MiB. A knob that is absent is at its unknown, fixed value."""
        micro = current.get("batch_size", 1)
        assert isinstance(micro, int)
        return micro * self.weights[current.get("compile"), current.get("dtype")]

    def save(self, n: int, step: int) -> None:
        self.record(CheckpointSaved(attempt=n, step=step, path=f"/out/{step}.pt", bytes=1))

    def end(self, step: int, code: int | None = None, signal: int | None = None, diagnosis: str = "crash") -> None:
        assert self.state.attempt is not None
        status = ExitStatus(code=code, signal=signal)
        self.record(AttemptEnded(attempt=self.state.attempt.n, exit=status, step=step, diagnosis=diagnosis))

    def out_of_memory(self, n: int, step: int, foreign: int | None, diagnosis: str | None = None) -> None:
        assert self.state.attempt is not None
        if diagnosis is None:
            diagnosis = "device_oom" if self.run.trains_on == "gpu" else "host_oom"
        request = self.luck.choice([20 * MIB, 200 * MIB, GIB])
        missing = self.luck.choice([100 * MIB, 600 * MIB])
        if (foreign or 0) < max(256 * MIB, min(missing, request)):
            self.failed.append(self.state.attempt.settings)
        self.record(
            OomDetected(
                attempt=n,
                diagnosis=diagnosis,
                step=step,
                message="out of memory",
                phase="forward",
                numbers=OomNumbers(tried_to_allocate_bytes=request, free_bytes=max(0, request - missing)),
                foreign_bytes=foreign,
            )
        )
        self.end(step, code=1, diagnosis=diagnosis)


def must_fail(planned: Settings, failed: Settings) -> bool:
    """With the same precision and compilation, and at least as large a micro-batch."""
    if any(planned.get(knob) != failed.get(knob) for knob in ("compile", "dtype")):
        return False
    return planned.get("batch_size", 0) >= failed.get("batch_size", 0)  # type: ignore[operator]


RUNGS = (
    WAIT,
    Remediation(name="compile off", set={"compile": False}),
    Remediation(name="compile off for good", set={"compile": False}, undo_if_useless=False),
    Remediation(name="float16", set={"dtype": "float16"}, when={"dtype": "bfloat16"}),
    Remediation(name="both", set={"compile": False, "dtype": "float16"}),
    Remediation(name="smaller", step="micro_batch"),
    Remediation(name="smaller, not below 3", step="micro_batch", min=3),
)


def random_world(seed: int) -> World:
    """Seeded, not drawn, for variety: most nights run out of memory, come down and go back up."""
    luck = random.Random(seed)
    restore = Restore(
        after_steps=luck.randint(1, 8),
        order=tuple(luck.sample(["compile", "dtype", "micro_batch"], luck.choice([1, 3, 3]))),
        backoff=luck.choice([1.0, 1.5, 2.0]),
        max_tries=luck.randint(1, 3),
        retry_failed=luck.random() < 0.2,
    )
    rules = policy(
        *luck.sample(RUNGS, luck.choice([0, 1, 3, 4, 5, 7, 7])),
        restore=restore if luck.random() < 0.85 else None,
        max_attempts=luck.choice([2, 24, 24, 24]),
    )
    ranks = luck.choice([1, 1, 2])
    held = luck.choice([12, 48, 30, 14])
    micro = luck.choice(exact_micro_batches(held, ranks))
    start: Settings = {
        "compile": luck.random() < 0.7,
        "dtype": luck.choice(["bfloat16", "bfloat16", "float16", "float32"]),
        "batch_size": micro,
        "gradient_accumulation_steps": held // micro,
        "block_size": 128,
    }
    if luck.random() < 0.2:
        del start[luck.choice(sorted(start))]
    can_save = luck.random() < 0.6
    run = created(
        rules,
        start,
        accumulation_multiple=ranks,
        trains_on=luck.choice(["gpu", "gpu", "gpu", "host"]),
        observe=luck.random() < 0.1,
        target_steps=luck.choice([None, TARGET]),
        memory_budget_bytes=luck.choice([None, GIB]),
        checkpoints=CheckpointPlan(can_save_on_request=can_save),
    )
    weights = {
        (compiled, dtype): luck.randint(6, 12)
        for compiled in (None, False, True)
        for dtype in (None, "bfloat16", "float16", "float32")
    }
    return World(
        run=run,
        weights=weights,
        capacity=round(9 * micro * luck.choice([0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1])),
        luck=luck,
        can_save=can_save,
        obeys=luck.choice([("save", "terminate", "kill")] * 4 + [("terminate", "kill"), ("kill",), ()]),
        trouble=luck.choice([0.0, 0.0, 0.02, 0.1]),
    )


@example(15946)  # others took memory after a rung that had seemed useless
@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**64))
def test_every_night_keeps_the_laws(seed: int) -> None:
    """Replay equals life, exact batches, no doomed start, no decision twice, an end: asserted inside `World`."""
    world = random_world(seed)
    world.live()
    check_the_end(world)


def check_the_end(world: World) -> None:
    run, state, finished = world.run, world.state, world.state.finished
    assert isinstance(finished, Finished)
    assert world.events[-1] is finished or world.events[-1] == finished
    assert decide(state, run.policy, world.now + 1e6) is None
    assert len(state.attempts) <= run.policy.limits.max_attempts
    if run.observe:
        assert all(attempt.settings == run.settings for attempt in state.attempts)
        assert all(attempt.stop is not None for attempt in state.attempts[:-1]), "restarted by nobody but the person"
    attempt = state.attempt
    match finished.result:
        case "done":
            assert finished.exit_code == 0
            assert attempt is not None
            assert attempt.exit == ExitStatus(code=0)
            if attempt.stop is not None and state.target_steps is not None:
                assert attempt.step >= state.target_steps
        case "stopped":
            assert finished.exit_code == EXIT_STOPPED
            unreadable = state.rejected and not state.checkpoints
            unseen = attempt is not None and attempt.exit == ExitStatus()
            assert state.stop_asked is not None or unreadable or unseen
        case "gave_up":
            assert finished.exit_code == EXIT_LADDER_EXHAUSTED
            assert attempt is not None
            assert len(state.attempts) == run.policy.limits.max_attempts or nothing_left(run, state)
        case "failed":
            assert finished.exit_code != 0
            assert attempt is not None
            own = {128 + (attempt.exit.signal or 0), attempt.exit.code} if attempt.exit else set()
            assert finished.exit_code in {EXIT_SELF, *own}
            told_to_leave = attempt.stop is not None and attempt.oom is None
            assert finished.exit_code == EXIT_SELF or not told_to_leave, "leaving when told is no failure"


def nothing_left(run: RunCreated, state: State) -> bool:
    """The last attempt ran out of memory, and no smaller micro-batch is allowed."""
    attempt = state.attempt
    assert attempt is not None
    if attempt.oom is None:
        return False
    lowest = [rung.min for rung in run.policy.remediations if rung.step]
    if not lowest or run.global_batch_size is None:
        return True
    smallest = next(
        m for m in exact_micro_batches(run.global_batch_size, run.accumulation_multiple) if m >= min(lowest)
    )
    return any(
        isinstance(micro := a.settings.get("batch_size"), int) and micro <= smallest and a.oom is not None
        for a in state.attempts
    )
