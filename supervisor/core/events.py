"""Everything that can happen in a run, as it stands in the journal. State is the fold of these (`state.evolve`).

Facts are observed by the shell; decisions come from `decide` and are journalled *before* they are carried out. Old
journals must stay readable: a field is only ever added, with a default.
"""

from typing import Literal

from msgspec import Struct

from .policy import ConsentClass, Policy, Scalar, Settings
from .verdict import ExitStatus, OomNumbers

JOURNAL_VERSION = 1

StopHow = Literal["save", "terminate", "kill"]
RunResult = Literal["done", "failed", "gave_up", "stopped"]


class Change(Struct, frozen=True):
    """A knob's value before and after; None is unknown, and written nowhere."""

    before: Scalar | None
    after: Scalar | None


Changes = dict[str, Change]


class Event(Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base. The journal fills in `seq` (gap-free), `at` (UTC, RFC 3339) and `mono` (seconds, monotonic, this boot)."""

    v: int = JOURNAL_VERSION
    seq: int = 0
    at: str = ""
    mono: float = 0.0


# --- the run ---------------------------------------------------------------------------------------------------------


class Origin(Struct, frozen=True, kw_only=True):
    """Where a knob's value was read, or why it could not be."""

    value: Scalar | None = None
    where: str = ""
    why_unknown: str = ""


class CheckpointPlan(Struct, frozen=True, kw_only=True):
    """Where the trainer saves and how often, as far as it could be read."""

    place: str = ""
    every_steps: int | None = None
    can_save_on_request: bool = False
    replays_data: bool = False


class RunCreated(Event, frozen=True, tag="run_created"):
    run_id: str
    name: str
    policy_name: str
    policy: Policy
    command: tuple[str, ...]
    """As launched, before any remediation; from `args_from` on they are the script's own arguments."""
    args_from: int
    interpreter: str
    cwd: str
    dialect: str
    settings: Settings
    origins: dict[str, Origin] = {}
    no_effect: dict[str, str] = {}
    global_batch_size: int | None = None
    accumulation_multiple: int = 1
    target_steps: int | None = None
    checkpoints: CheckpointPlan = CheckpointPlan()
    memory_budget_bytes: int | None = None
    budget_where: Literal["host", "device"] | None = None
    trains_on: Literal["gpu", "host"] = "host"
    gpu_uuid: str | None = None
    gpu_name: str | None = None
    cuda_visible_devices: str | None = None
    """As it was when the run began, for attempts started from another shell later."""
    observe: bool = False
    boot_id: str = ""


class SupervisorStarted(Event, frozen=True, tag="supervisor_started"):
    pid: int
    takeover: bool = False


class Note(Event, frozen=True, tag="note"):
    """Something a person should read; changes nothing. `topic`: what is told once in an `attempt`."""

    text: str
    attempt: int | None = None
    topic: str = ""


class StopAsked(Event, frozen=True, tag="stop_asked"):
    """A person, a signal or a limit wants the run to end. `now`: without saving."""

    by: str
    now: bool = False


class Finished(Event, frozen=True, tag="finished"):
    result: RunResult
    exit_code: int
    why: str


# --- attempts --------------------------------------------------------------------------------------------------------


class AttemptPlanned(Event, frozen=True, tag="attempt_planned"):
    """The intent to launch, written before the launch; the shell fills in `argv`."""

    attempt: int
    settings: Settings
    because: str
    resume_step: int | None = None
    resume_path: str | None = None
    argv: tuple[str, ...] = ()


class AttemptStarted(Event, frozen=True, tag="attempt_started"):
    attempt: int
    pid: int
    start_ticks: int
    settings: Settings = {}


class Resumed(Event, frozen=True, tag="resumed"):
    """The attempt goes on from a checkpoint. `lost_steps` were done before and are done again."""

    attempt: int
    step: int
    lost_steps: int
    path: str = ""
    note: str = ""


class BudgetApplied(Event, frozen=True, tag="budget_applied"):
    """The trainer's own process confirmed its memory limit, and the kernel or the allocator shows it."""

    attempt: int
    where: Literal["host", "device"]
    baseline_bytes: int
    limit_bytes: int


class TrainerReported(Event, frozen=True, tag="trainer_reported"):
    """What a cooperating trainer says of itself at its start; its word goes before what was read from its files."""

    attempt: int
    step: int
    target_steps: int | None = None
    can_save: bool = False
    global_batch_size: int | None = None
    settings: Settings = {}


class KnobUnavailable(Event, frozen=True, tag="knob_unavailable"):
    attempt: int
    knob: str
    reason: str


class Progress(Event, frozen=True, tag="progress"):
    """`step` optimizer steps are completed. Written when it matters for a decision, and every few seconds."""

    attempt: int
    step: int
    loss: float | None = None
    step_s: float | None = None
    block_size: int | None = None


class PeakMeasured(Event, frozen=True, tag="peak"):
    """Peak memory of a phase that was completed at this sequence length."""

    attempt: int
    phase: str
    bytes: int
    block_size: int | None = None
    where: str = "host"


class CheckpointSaved(Event, frozen=True, tag="checkpoint"):
    """A complete checkpoint of this run. `copy` is gpusup's own, for trainers that rewrite theirs in place."""

    attempt: int
    step: int
    path: str
    bytes: int = 0
    copy: str | None = None
    emergency: bool = False
    """Saved after memory was refused, on the way out."""


class CheckpointRejected(Event, frozen=True, tag="checkpoint_rejected"):
    path: str
    step: int
    why: str


class OomDetected(Event, frozen=True, tag="oom"):
    """An attempt ended because memory was refused. `at_least_bytes`: in use plus requested, a lower bound of what the
    failed settings need."""

    attempt: int
    diagnosis: str
    step: int
    message: str
    phase: str | None = None
    block_size: int | None = None
    cause: str = ""
    sources: tuple[str, ...] = ()
    """What the diagnosis rests on, best first."""
    numbers: OomNumbers = OomNumbers()
    at_least_bytes: int | None = None
    foreign_bytes: int | None = None
    rank: int | None = None
    evidence: tuple[str, ...] = ()


class HangDetected(Event, frozen=True, tag="hang"):
    """No optimizer step was completed for `silent_s`, by a trainer whose steps are counted."""

    attempt: int
    step: int
    silent_s: float


class SoftOomDetected(Event, frozen=True, tag="soft_oom"):
    """Steps take a multiple of what was usual while the GPU's memory is full and the GPU is not hot: the driver moves
    memory to the host instead of refusing it."""

    attempt: int
    step: int
    step_s: float
    usual_s: float


class GpuTrouble(Event, frozen=True, tag="gpu_trouble"):
    """NVML says that the GPU is gone or must be reset, or that the driver was replaced under this process; none: it is
    well again."""

    attempt: int
    trouble: Literal["lost", "reset_required", "driver_replaced", "none"]


class AttemptEnded(Event, frozen=True, tag="attempt_ended"):
    """The trainer's process is gone. `step`: optimizer steps completed when it left."""

    attempt: int
    exit: ExitStatus
    step: int
    diagnosis: str
    cause: str = ""
    sources: tuple[str, ...] = ()
    message: str = ""
    phase: str | None = None
    peak_bytes: int | None = None
    peak_where: str = "host"
    user_s: float | None = None
    system_s: float | None = None


# --- decisions -------------------------------------------------------------------------------------------------------


class RemediationChosen(Event, frozen=True, tag="remediation"):
    """A rung of the ladder. In observing mode `applied` is false and nothing changes."""

    attempt: int
    rung: int
    name: str
    lever: str
    consent: ConsentClass
    changes: Changes
    because: str
    applied: bool = True
    wait_for_memory_s: float | None = None


class RemediationSkipped(Event, frozen=True, tag="remediation_skipped"):
    attempt: int
    rung: int
    name: str
    because: str


class RestorationChosen(Event, frozen=True, tag="restoration"):
    """Speed given back: after stable steps (then on probation), or at once because the change had been useless."""

    attempt: int
    lever: str
    changes: Changes
    because: str
    reason: Literal["stable", "useless"] = "stable"
    rung: int | None = None


class RestorationSkipped(Event, frozen=True, tag="restoration_skipped"):
    attempt: int
    lever: str
    because: str


class RestorationKept(Event, frozen=True, tag="restoration_kept"):
    attempt: int
    lever: str
    step: int


class RestorationReverted(Event, frozen=True, tag="restoration_reverted"):
    attempt: int
    lever: str
    changes: Changes
    because: str
    next_wait_steps: int


class StopRequested(Event, frozen=True, tag="stop_requested"):
    """The trainer is about to be asked (`save`), told (`terminate`) or made (`kill`) to leave by `deadline_mono`."""

    attempt: int
    how: StopHow
    why: str
    deadline_mono: float = 0.0


class MemoryWaited(Event, frozen=True, tag="memory_waited"):
    """The wait for memory others held is over."""

    enough: bool
    waited_s: float
    free_bytes: int | None = None


AnyEvent = (
    RunCreated
    | SupervisorStarted
    | Note
    | StopAsked
    | Finished
    | AttemptPlanned
    | AttemptStarted
    | Resumed
    | BudgetApplied
    | TrainerReported
    | KnobUnavailable
    | Progress
    | PeakMeasured
    | CheckpointSaved
    | CheckpointRejected
    | OomDetected
    | HangDetected
    | SoftOomDetected
    | GpuTrouble
    | AttemptEnded
    | RemediationChosen
    | RemediationSkipped
    | RestorationChosen
    | RestorationSkipped
    | RestorationKept
    | RestorationReverted
    | StopRequested
    | MemoryWaited
)
