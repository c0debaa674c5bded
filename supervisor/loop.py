"""The supervisor's loop: observe, record, decide, record, carry out.

The only thread besides it samples memory. Exits (pidfd) and signals wake it; output is looked at ten times a second.
"""

import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from . import checkpoints, process
from .attempt_watch import AttemptWatch, Echo
from .core.decide import GPU_GONE, decide, next_deadline, step_of_interest
from .core.events import (
    AnyEvent,
    AttemptEnded,
    AttemptPlanned,
    AttemptStarted,
    CheckpointRejected,
    GpuTrouble,
    MemoryWaited,
    Note,
    OomDetected,
    Resumed,
    StopAsked,
    StopRequested,
    SupervisorStarted,
)
from .core.growth import growth_of
from .core.oom_cause import cause_of
from .core.policy import Settings
from .core.state import FOREIGN_BYTES, State, evolve, held_by_others
from .core.verdict import ExitStatus
from .dialects.base import Dialect
from .journal import Journal
from .launch_env import environment
from .process import Ended, TrainerProcess
from .run_store import RunDirectory
from .sampler import Sampler
from .wake_up import WakeUp

LOOK_EVERY_S = 0.1
MEMORY_EVERY_S = 2.0
"""Asking NVML who holds what is expensive, and stalls the device's driver."""
WARNED_FOR_S = 30.0
"""How long a warning counts: a Ctrl-C hours later is a new request."""
AGAIN_S = 0.5
"""A signal so soon after another is the same request: `timeout` and wrappers send several."""
GIVE_BACK_S = 50.0
"""How long a dead trainer's GPU memory may take to come back before the next start goes ahead."""
GIVE_BACK_SLACK_BYTES = 512 << 20
RENEWED = "GPUSUP_RENEWED"
"""Set for a supervisor that is started anew because the driver was replaced: once is enough."""
IS_RENEWED = os.environ.pop(RENEWED, None) is not None
HOW = {"save": signal.SIGTERM, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}


class Detached(Exception):
    """The person left; the trainer goes on."""


class DriverReplaced(Exception):
    """NVML is of no more use in this process; a new one can go on watching."""


class Supervisor:
    """Supervises one run from wherever its journal stands until it is finished."""

    def __init__(self, directory: RunDirectory, journal: Journal, dialect: Dialect, tell: "Tell") -> None:
        self.directory, self.journal, self.dialect, self.tell = directory, journal, dialect, tell
        self.state = State()
        for event in journal.events:
            self.state = evolve(self.state, event)
        run = self.state.run
        assert run is not None
        self.run_spec = run
        self.policy = run.policy
        self.sampler = Sampler(directory.samples, run.gpu_uuid if run.trains_on == "gpu" else None)
        self.watch: AttemptWatch | None = None
        self._signals: list[int] = []
        self._warned_at = float("-inf")
        self._asked_at = -AGAIN_S
        self._waiting_since: float | None = None
        self._memory_asked_at = 0.0
        self._held_at_start = False

    def run(self) -> int:
        """Until the run is finished; returns its exit code.

        Raises:
            Detached: the person asked to leave (SIGQUIT); the trainer goes on.
        """
        with WakeUp(self._signals) as self._wake:
            self.sampler.start()
            try:
                self.record(SupervisorStarted(pid=os.getpid(), takeover=bool(self.state.attempts)))
                self._adopt()
                while self.state.finished is None:
                    self._handle_signals()
                    decision = decide(self.state, self.policy, time.monotonic())
                    if decision is not None:
                        self._carry_out(decision)
                    else:
                        self._observe()
            finally:
                self.sampler.stop()
        return self.state.finished.exit_code

    def record(self, event: AnyEvent) -> None:
        """Journal first, then the state, then the person."""
        stamped = self.journal.append(event)
        self.state = evolve(self.state, stamped)
        self.tell.event(stamped)

    # --- carrying out ---

    def _carry_out(self, decision: AnyEvent) -> None:
        match decision:
            case AttemptPlanned():
                self._start(decision)
            case StopRequested():
                self.record(decision)
                if self.watch is not None:
                    self.watch.process.signal(HOW[decision.how])
            case _:
                self.record(decision)

    def _start(self, plan: AttemptPlanned) -> None:
        if plan.resume_path is not None:
            checked = checkpoints.check(Path(plan.resume_path))
            if checked.problem:
                self.record(CheckpointRejected(path=plan.resume_path, step=plan.resume_step or 0, why=checked.problem))
                return
        self._await_given_back()
        if self._signals:
            return  # asked to stop meanwhile; decide again
        run = self.run_spec
        argv = self.dialect.argv(run.command, run.args_from, self._changed(plan.settings), plan.resume_path)
        plan = replace(plan, argv=argv)
        self.record(plan)
        self._resumed(plan)
        self._launch(plan.attempt, argv)

    def _changed(self, settings: Settings) -> Settings:
        """Knobs that differ from what the person's own command says; the rest stays as it was typed."""
        initial = self.run_spec.settings
        return {knob: value for knob, value in settings.items() if initial.get(knob) != value}

    def _resumed(self, plan: AttemptPlanned) -> None:
        """Put the checkpoint where the trainer looks for it, and say where it goes on. Twice is as good as once."""
        lost_steps = self.state.max_step - (plan.resume_step or 0)
        if plan.resume_path is None:
            if plan.attempt > 1 and not self.run_spec.checkpoints.place:
                text = "how this trainer resumes is not known: it starts over, unless it resumes by itself"
                self.record(Note(text=text))
            elif lost_steps > 0:
                note = "there is no checkpoint yet, so it starts from zero"
                self.record(Resumed(attempt=plan.attempt, step=0, lost_steps=lost_steps, note=note))
            return
        note = ""
        if self.dialect.rewrites_in_place:
            place = self.dialect.checkpoint_file(Path(self.run_spec.checkpoints.place))
            if place is not None:
                note = checkpoints.place_for_resume(Path(plan.resume_path), place, f"before-attempt-{plan.attempt}")
        if self.run_spec.checkpoints.replays_data:
            replay = "this trainer does not save its position in the data: it trains on its first batches again"
            note = f"{note}; {replay}" if note else replay
        self.record(
            Resumed(
                attempt=plan.attempt,
                step=plan.resume_step or 0,
                lost_steps=max(0, lost_steps),
                path=plan.resume_path,
                note=note,
            )
        )

    def _launch(self, n: int, argv: tuple[str, ...]) -> None:
        folder = self.directory.attempt(n)
        started = process.launch(folder, argv, self.run_spec.cwd, environment(self.run_spec, self.directory, n))
        self._follow(n, started)

    def _follow(self, n: int, started: TrainerProcess | Ended) -> None:
        folder = self.directory.attempt(n)
        if isinstance(started, Ended):
            pid, ticks = 0, 0
            trainer = TrainerProcess(folder, 0, 0, 0, 0)
        else:
            pid, ticks, trainer = started.pid, started.start_ticks, started
        attempt = self.state.attempt
        assert attempt is not None
        if attempt.pid is None:
            self.record(AttemptStarted(attempt=n, pid=pid, start_ticks=ticks))
        self.watch = AttemptWatch(
            self.run_spec,
            folder,
            trainer,
            self.dialect,
            self.tell.echo,
            self._keeper(),
            known=attempt,
            saved_step=self.state.checkpoint.step if self.state.checkpoint else -1,
        )
        self.watch.device_peak = self.sampler.device_peak
        self.watch.device_is_full = self.sampler.device_is_full
        self.sampler.begin(n, pid)

    def _keeper(self) -> checkpoints.Keeper | None:
        place = self.dialect.checkpoint_file(Path(self.run_spec.checkpoints.place))
        if place is None:
            return None
        return checkpoints.Keeper(place, self.directory.checkpoints, self.directory.created_at)

    # --- taking over ---

    def _adopt(self) -> None:
        """Continue the attempt that was under way: it may run, have ended meanwhile, or never have started."""
        attempt = self.state.attempt
        if attempt is None or attempt.ended:
            return
        found = process.adopt(self.directory.attempt(attempt.n))
        if found is None:
            plan = next(event for event in reversed(self.journal.events) if isinstance(event, AttemptPlanned))
            if not any(isinstance(event, Resumed) and event.attempt == attempt.n for event in self.journal.events):
                self._resumed(plan)
            self._launch(attempt.n, attempt.argv)
            return
        self.sampler.held_before = None  # what is held now may be the trainer's own
        self._follow(attempt.n, found)
        if self.watch is not None:
            self.watch.skip_shown()

    # --- observing ---

    def _observe(self) -> None:
        timeout = LOOK_EVERY_S
        deadline = next_deadline(self.state)
        if deadline is not None:
            timeout = min(timeout, max(0.0, deadline - time.monotonic()))
        waiting = [self._wake.fd]
        if self.watch is not None and (fd := self.watch.process.wait_fd) is not None:
            waiting.append(fd)
        select.select(waiting, [], [], timeout)
        self._wake.drain()
        if self.state.waiting_for_memory_s is not None:
            self._look_for_memory()
        if self.watch is not None:
            self._look_at_attempt(self.watch)

    def _look_at_attempt(self, watch: AttemptWatch) -> None:
        ended = watch.process.poll()
        if ended is None:
            self._look_at_gpu(watch)
            self._record_all(watch.observe(step_of_interest(self.state, self.policy)))
            return
        self.watch = None
        self.sampler.end()
        if ended.exit != ExitStatus(code=0):
            self.sampler.look()
            self._look_at_gpu(watch)
        self._record_all(watch.conclude(ended))

    def _look_at_gpu(self, watch: AttemptWatch) -> None:
        trouble = self.sampler.trouble or "none"
        if trouble != (self.state.gpu_trouble or "none"):
            self.record(GpuTrouble(attempt=watch.n, trouble=trouble))
        attempt = self.state.attempt
        stopping = self.state.stop_asked is not None or (attempt is not None and attempt.stop is not None)
        if trouble == "driver_replaced" and not IS_RENEWED and not stopping and not self._signals:
            raise DriverReplaced

    def _record_all(self, events: Iterator[AnyEvent]) -> None:
        for event in events:
            if isinstance(event, OomDetected) and event.diagnosis == "device_oom":
                event = replace(event, foreign_bytes=self.sampler.held_by_others())
                if held_by_others(event):
                    self.record(Note(text=f"the GPU's memory is held by {self.sampler.holders()}"))
            if isinstance(event, OomDetected):
                event = self._of_history(event)
            if (
                isinstance(event, AttemptEnded)
                and self.state.gpu_trouble in GPU_GONE
                and event.exit != ExitStatus(code=0)
            ):
                event = replace(event, diagnosis="gpu_lost", sources=("NVML", *event.sources))
            self.record(event)

    def _of_history(self, event: OomDetected) -> OomDetected:
        """With the cause that the run's history shows."""
        growth = growth_of(self.sampler.in_use(), event.at_least_bytes)
        return replace(event, cause=str(cause_of(event, self.state, growth, self._held_at_start)))

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGQUIT:
                raise Detached
            self._asked_to_stop("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def _asked_to_stop(self, by: str) -> None:
        now = time.monotonic()
        if now - self._asked_at < AGAIN_S:
            return
        self._asked_at = now
        attempt = self.state.attempt
        running = attempt is not None and not attempt.ended
        if now - self._warned_at < WARNED_FOR_S or self.state.stop_asked is not None:
            self.record(StopAsked(by=by, now=True))
        elif attempt is not None and running and not attempt.can_save:
            self._warned_at = now
            saved = self.state.checkpoint.step if self.state.checkpoint else 0
            lost = f"loses the {attempt.step - saved} steps since step {saved}"
            leave = f"Ctrl-\\ : leave it running (`gpusup resume {self.directory.id}` takes over)"
            text = f"{by}: this trainer cannot save when asked; stopping now {lost}. Again: kill it. {leave}"
            self.record(Note(text=text))
        else:
            self.record(StopAsked(by=by))

    # --- GPU memory before a start ---

    def _await_given_back(self) -> None:
        """A dead process can hold device memory for a while; starting meanwhile would look like an OOM."""
        before = self.sampler.held_before
        self._held_at_start = False
        if before is None:
            return
        deadline = time.monotonic() + GIVE_BACK_S
        while time.monotonic() < deadline and not self._signals:
            held = self.sampler.device_used()
            if held is None or held <= before + GIVE_BACK_SLACK_BYTES:
                return
            select.select([self._wake.fd], [], [], 0.5)
        if not self._signals:
            self._held_at_start = True
            self.record(Note(text=f"the GPU's memory was not given back within {GIVE_BACK_S:.0f} s; starting anyway"))

    def _look_for_memory(self) -> None:
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        waited = time.monotonic() - self._waiting_since
        if time.monotonic() - self._memory_asked_at < MEMORY_EVERY_S:
            return
        self._memory_asked_at = time.monotonic()
        held, free = self.sampler.held_by_others(), self.sampler.device_free()
        enough = (held is not None and held < FOREIGN_BYTES) or (free is not None and free >= self._wanted_bytes())
        if enough or waited >= (self.state.waiting_for_memory_s or 0):
            self._waiting_since = None
            self.record(MemoryWaited(enough=enough, waited_s=round(waited, 1), free_bytes=free))

    def _wanted_bytes(self) -> float:
        """What the last attempt held and asked for besides; unknown is more than any device has."""
        oom = self.state.attempt.oom if self.state.attempt else None
        return oom.at_least_bytes if oom is not None and oom.at_least_bytes is not None else float("inf")


class Tell:
    """Shows events and output to the person. The default shows nothing."""

    def __init__(self) -> None:
        self.echo = Echo(stdout=lambda data: None, stderr=lambda data: None)

    def event(self, event: AnyEvent) -> None: ...
