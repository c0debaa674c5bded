"""A run without processes: `decide` is driven by told facts, the way the loop drives it."""

from collections.abc import Callable

from gpusup.supervisor.core.decide import decide
from gpusup.supervisor.core.diagnosis import ExitStatus, OomNumbers
from gpusup.supervisor.core.events import (
    AnyEvent,
    AttemptEnded,
    AttemptPlanned,
    AttemptStarted,
    BudgetApplied,
    CheckpointPlan,
    CheckpointSaved,
    OomDetected,
    Origin,
    PeakMeasured,
    Progress,
    RemediationChosen,
    RemediationSkipped,
    RestorationChosen,
    RestorationKept,
    RestorationReverted,
    RestorationSkipped,
    Resumed,
    RunCreated,
    StopAsked,
    StopRequested,
)
from gpusup.supervisor.core.ladder import describe_changes
from gpusup.supervisor.core.policy import Limits, Policy, Remediation, Restore, Settings
from gpusup.supervisor.core.state import Attempt, State, evolve
from msgspec.structs import replace

MIB, GIB = 1 << 20, 1 << 30

COMPILE_OFF = Remediation(name="compile off", set={"compile": False}, undo_if_useless=False)
FLOAT16 = Remediation(name="float16", set={"dtype": "float16"}, when={"dtype": "bfloat16"})
SMALLER = Remediation(name="micro-batch down", step="micro_batch")
WAIT = Remediation(name="wait", wait_for_memory_s=60.0)

START: Settings = {
    "compile": True,
    "dtype": "bfloat16",
    "batch_size": 12,
    "gradient_accumulation_steps": 4,
    "block_size": 1024,
}


def policy(
    *remediations: Remediation, restore: Restore | None = None, max_attempts: int = 24, grace_s: float = 60.0
) -> Policy:
    return Policy(remediations=remediations, restore=restore, limits=Limits(max_attempts=max_attempts, grace_s=grace_s))


def created(rules: Policy, settings: Settings = START, **changes: object) -> RunCreated:
    """A nanoGPT-like run on a GPU whose trainer saves when asked."""
    batch, accumulation = settings.get("batch_size"), settings.get("gradient_accumulation_steps")
    run = RunCreated(
        run_id="r",
        name="r",
        policy_name="p",
        policy=rules,
        command=("python", "train.py"),
        args_from=2,
        interpreter="python",
        cwd="/",
        dialect="nanogpt",
        settings=settings,
        origins={knob: Origin(value=settings.get(knob)) for knob in START},
        global_batch_size=batch * accumulation if isinstance(batch, int) and isinstance(accumulation, int) else None,
        checkpoints=CheckpointPlan(place="/out", can_save_on_request=True),
        trains_on="gpu",
    )
    return replace(run, **changes)


class Life:
    """One run. Every fact is followed by all the decisions it causes; starts happen at once."""

    def __init__(self, run: RunCreated) -> None:
        self.rules = run.policy
        self.state = State()
        self.events: list[AnyEvent] = []
        self.now = 0.0
        self.carry_out: Callable[[AnyEvent], None] = lambda decision: None
        self.tell(run)

    def record(self, event: AnyEvent) -> AnyEvent:
        at = f"2030-01-01T{int(self.now) // 3600:02d}:{int(self.now) // 60 % 60:02d}:{self.now % 60:06.3f}Z"
        stamped: AnyEvent = replace(event, seq=len(self.events) + 1, at=at, mono=self.now)
        self.state = evolve(self.state, stamped)
        self.events.append(stamped)
        return stamped

    def tell(self, *facts: AnyEvent) -> list[AnyEvent]:
        """Record `facts`, then whatever is decided; returns the decisions."""
        for fact in facts:
            self.record(fact)
        decisions: list[AnyEvent] = []
        while (decision := decide(self.state, self.rules, self.now)) is not None:
            assert len(decisions) < 40, "decides without end"
            if isinstance(decision, AttemptPlanned):
                decision = replace(decision, argv=self.argv(decision))
            decisions.append(self.record(decision))
            if isinstance(decision, AttemptPlanned):
                lost = self.state.max_step - (decision.resume_step or 0)
                if lost or decision.resume_step is not None:
                    self.record(Resumed(attempt=decision.attempt, step=decision.resume_step or 0, lost_steps=lost))
                self.record(AttemptStarted(attempt=decision.attempt, pid=100 + decision.attempt, start_ticks=1))
                run = self.state.run
                assert run is not None
                if run.memory_budget_bytes:
                    self.record(
                        BudgetApplied(attempt=decision.attempt, where="device", baseline_bytes=0, limit_bytes=2 * GIB)
                    )
        return decisions

    def argv(self, plan: AttemptPlanned) -> tuple[str, ...]:
        """As the nanoGPT dialect spells it."""
        run = self.state.run
        assert run is not None
        changed = [f"--{k}={v}" for k, v in plan.settings.items() if run.settings.get(k) != v]
        return (*run.command, *changed, *(["--init_from=resume"] if plan.resume_path else []))

    # --- facts ---

    def steps(self, to: int) -> list[AnyEvent]:
        return self.tell(Progress(attempt=self.n, step=to))

    def saved(self, step: int) -> list[AnyEvent]:
        return self.tell(CheckpointSaved(attempt=self.n, step=step, path=f"/out/ckpt-{step}.pt"))

    def peak(self, count: int, block_size: int | None = None) -> None:
        self.tell(PeakMeasured(attempt=self.n, phase="train", bytes=count, block_size=block_size, where="device"))

    def ended(
        self, code: int | None = None, signal: int | None = None, diagnosis: str = "crash", message: str = ""
    ) -> list[AnyEvent]:
        status = ExitStatus(code=code, signal=signal)
        diagnosis = "success" if code == 0 else diagnosis
        step = self.attempt.step
        return self.tell(AttemptEnded(attempt=self.n, exit=status, step=step, diagnosis=diagnosis, message=message))

    def left(self) -> list[AnyEvent]:
        """It ends by the SIGTERM it was sent."""
        return self.ended(signal=15, diagnosis="signal")

    def oom(
        self,
        request: int | None = None,
        *,
        diagnosis: str = "device_oom",
        phase: str | None = "backward",
        foreign: int | None = 0,
        free: int | None = None,
        at_least: int | None = None,
        block_size: int | None = None,
        cause: str = "",
    ) -> list[AnyEvent]:
        """It runs out of memory, on another request each time unless `request` is given."""
        request = request if request is not None else GIB + 16 * MIB * len(self.events)
        self.record(
            OomDetected(
                attempt=self.n,
                diagnosis=diagnosis,
                step=self.attempt.step,
                message="out of memory",
                phase=phase,
                block_size=block_size,
                cause=cause,
                numbers=OomNumbers(tried_to_allocate_bytes=request, free_bytes=free),
                at_least_bytes=at_least,
                foreign_bytes=foreign,
            )
        )
        return self.ended(code=1, diagnosis=diagnosis, message="out of memory")

    def user_stops(self, now: bool = False) -> list[AnyEvent]:
        return self.tell(StopAsked(by="SIGTERM", now=now))

    def restores(self, to: int) -> None:
        """Runs to step `to`, is asked to leave, saves and leaves."""
        decisions = self.steps(to)
        assert kinds(decisions) == ["RestorationChosen", "StopRequested"], story(decisions)
        self.saved(to)
        assert kinds(self.left()) == ["AttemptPlanned"]

    # --- views ---

    @property
    def attempt(self) -> Attempt:
        attempt = self.state.attempt
        assert attempt is not None
        return attempt

    @property
    def n(self) -> int:
        return self.attempt.n

    @property
    def batch(self) -> str:
        return f"{self.attempt.settings['batch_size']}x{self.attempt.settings['gradient_accumulation_steps']}"


def kinds(events: list[AnyEvent]) -> list[str]:
    return [type(event).__name__ for event in events]


def story(events: list[AnyEvent]) -> list[str]:
    """Decisions in a few words; starts are left out."""
    told = []
    for event in events:
        match event:
            case RemediationChosen():
                told.append(describe_changes(event.changes) if event.wait_for_memory_s is None else "wait")
            case RestorationChosen():
                told.append(("undo: " if event.reason == "useless" else "up: ") + describe_changes(event.changes))
            case RestorationReverted():
                told.append("back: " + describe_changes(event.changes))
            case RestorationKept():
                told.append(f"kept: {event.lever}")
            case RemediationSkipped():
                told.append(f"skipped {event.name}: {event.because}")
            case RestorationSkipped():
                told.append(f"not up {event.lever}: {event.because}")
            case StopRequested():
                told.append(event.how)
            case AttemptPlanned():
                pass
            case _ if hasattr(event, "result"):
                told.append(event.result)
    return told
