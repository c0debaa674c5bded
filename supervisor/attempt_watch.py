"""Watching one attempt: its output, its own reports, its memory and its checkpoints, turned into events.

Everything here is observation; nothing is decided, and what could not be observed makes no event.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from . import host
from .checkpoints import Checked, Keeper
from .core.events import (
    AnyEvent,
    AttemptEnded,
    BudgetApplied,
    CheckpointSaved,
    HangDetected,
    Note,
    OomDetected,
    PeakMeasured,
    Progress,
    RunCreated,
    SoftOomDetected,
)
from .core.pace import Pace, StepTimes
from .core.state import Attempt
from .core.verdict import Cause, Diagnosis, DiagnosisKind, Evidence, ExitStatus
from .dialects.base import Dialect
from .process import Ended, TrainerProcess
from .reports import Reports, parse_object
from .sampler import describe_sample
from .tail import LineTail, Tail, last_bytes

PROGRESS_EVERY_S = 5.0
EVIDENCE_BYTES = 256 << 10
SAMPLE_BYTES = 4096
PAUSE_TIMES = 4.0
"""How many times as long as a step evaluating, saving or compiling may take until it is a hang."""
SETTLED_STEPS = 2
"""A phase counts as completed after its second step: the first may lack the optimizer's state."""


class Echo(Struct):
    """Where the trainer's output is shown."""

    stdout: Callable[[bytes], None]
    stderr: Callable[[bytes], None]


class AttemptWatch:
    """Follows one attempt of `run` in `directory` until it has ended."""

    def __init__(
        self,
        run: RunCreated,
        directory: Path,
        process: TrainerProcess,
        dialect: Dialect,
        echo: Echo,
        keeper: Keeper | None,
        known: Attempt,
        saved_step: int,
    ) -> None:
        """`known` and `saved_step` (of the newest checkpoint) are what the journal has already, after a takeover."""
        n = known.n
        self.run, self.n, self.directory, self.process = run, n, directory, process
        self._dialect, self._echo, self._keeper = dialect, echo, keeper
        self._stdout = LineTail(directory / "stdout.log")
        self._stderr = Tail(directory / "stderr.log")
        self._report_lines = LineTail(directory / "events.jsonl")
        self._reports = Reports(run.cwd, known, saved_step)
        self._budget = LineTail(directory / "budget.jsonl")
        self._from_step = known.from_step
        self._budget_told = known.budget_limit_bytes is not None
        self._progress_at = 0.0
        self._pace = Pace(run.policy.limits.hang_after_s, time.monotonic())
        self._step_times, self._timed_step, self._collapsed = StepTimes(), known.from_step, False
        self._hang: HangDetected | None = known.hang
        self._in_use_bytes: int | None = None
        self._host_peak_bytes: int | None = None
        self._problems: set[str] = set()
        self._oom_kills = host.oom_kills()
        self.device_is_full: Callable[[], bool] = lambda: False
        self.device_peak: Callable[[], int | None] = lambda: None

    def skip_shown(self, parse_bytes: int = 1 << 16) -> None:
        """After a takeover: old output is not shown again, and only its end is read again for progress."""
        for tail in (self._stdout, self._stderr):
            size = tail.path.stat().st_size if tail.path.exists() else 0
            tail.offset = max(0, size - (parse_bytes if tail is self._stdout else 0))

    # --- while it runs ---

    def observe(self, interesting_step: int | None, final: bool = False) -> Iterator[AnyEvent]:
        """What is new. `final`: the process is gone, read everything to the end."""
        self._sample_host()
        yield from self._read_budget(final)
        yield from self._read_reports(final)
        self._read_output(final)
        now = time.monotonic()
        yield from self._checkpoints(final)
        if not final:
            yield from self._hangs(now)
            yield from self._collapses()
        pending = self._reports.progress
        if pending is not None:
            reached = interesting_step is not None and pending.step >= interesting_step
            if final or reached or now - self._progress_at >= PROGRESS_EVERY_S:
                self._reports.progress, self._progress_at = None, now
                yield pending
                yield from self._settled_peak(pending)

    def _collapses(self) -> Iterator[SoftOomDetected]:
        """When steps have become slow while the device's memory is full."""
        progress = self._reports.progress
        if progress is None or progress.step_s is None or progress.step == self._timed_step:
            return
        self._timed_step = progress.step
        usual_s = self._step_times.usual_if_slow(progress.step_s)
        if usual_s is not None and not self._collapsed and self.device_is_full():
            self._collapsed = True
            yield SoftOomDetected(attempt=self.n, step=progress.step, step_s=progress.step_s, usual_s=usual_s)

    def _hangs(self, now: float) -> Iterator[HangDetected]:
        reports = self._reports
        target = reports.target_steps or self.run.target_steps
        if target is not None and reports.step >= target:
            return  # what comes after the last step takes as long as it takes
        silent_s = self._pace.hangs_since(reports.count, now, PAUSE_TIMES if reports.pauses else 1.0)
        if silent_s is None:
            self._hang = None  # it went on
        elif self._hang is None:
            self._hang = HangDetected(attempt=self.n, step=self._reports.step, silent_s=round(silent_s, 1))
            yield self._hang

    def _sample_host(self) -> None:
        """At 10 Hz; the kernel keeps the maximum, so only the last tenth of a second can be missed."""
        resident, peak = host.resident_and_peak_bytes(self.process.pid)
        self._in_use_bytes = resident or self._in_use_bytes
        if peak is not None:
            self._host_peak_bytes = max(peak, self._host_peak_bytes or 0)

    def _peak_bytes(self) -> int | None:
        """The highest of what was sampled and what the trainer told, of where it trains."""
        sampled = self._host_peak_bytes if self.run.trains_on == "host" else self.device_peak()
        return max((peak for peak in (sampled, self._reports.peak_bytes) if peak is not None), default=None)

    def _read_budget(self, final: bool) -> Iterator[AnyEvent]:
        for line in self._new_lines(self._budget, final):
            report = parse_object(line)
            if report.get("pid") != self.process.pid:
                continue  # a compile worker or a helper of the trainer; each has its own limit
            where, limit = report["where"], int(report["limit_bytes"])
            in_force = host.data_limit_bytes(self.process.pid)
            if self._budget_told or (where == "host" and in_force is not None and in_force != limit):
                continue
            self._budget_told = True
            yield BudgetApplied(
                attempt=self.n, where=where, baseline_bytes=int(report["baseline_bytes"]), limit_bytes=limit
            )

    def _read_reports(self, final: bool) -> Iterator[AnyEvent]:
        for line in self._new_lines(self._report_lines, final):
            yield from self._reports.read(line)

    def _read_output(self, final: bool) -> None:
        """Show what is new: a chunk of each stream at most, so that the loop stays quick; all of it when final."""
        while data := self._stderr.read():
            self._echo.stderr(data)
            if not final:
                break
        while data := self._stdout.read():
            self._echo.stdout(data)
            self._parse(self._stdout.lines(data))
            if not final:
                return
        if final:
            self._parse(self._stdout.lines(b"", final=True))

    def _parse(self, lines: list[bytes]) -> None:
        for line in lines:
            seen = self._dialect.parse(line.decode("utf-8", "replace"))
            if seen is not None and not self._reports.begun:
                self._reports.advance(seen.step, seen.loss, seen.step_s, self.run.settings.get("block_size"))

    def _settled_peak(self, progress: Progress) -> Iterator[AnyEvent]:
        """For trainers that do not report peaks: the process's own, once training has settled."""
        if self._reports.tells_peaks or progress.step < self._from_step + SETTLED_STEPS:
            return
        peak = self._peak_bytes()
        if peak is not None:
            where = "host" if self.run.trains_on == "host" else "device"
            yield PeakMeasured(attempt=self.n, phase="train", bytes=peak, block_size=progress.block_size, where=where)

    def _checkpoints(self, final: bool) -> Iterator[AnyEvent]:
        if self._keeper is None:
            return
        kept: list[Checked] = self._keeper.finish() if final else self._keeper.poll()
        for found in kept:
            if not found.problem and found.step is not None:
                yield CheckpointSaved(
                    attempt=self.n,
                    step=found.step,
                    path=str(self._keeper.source),
                    bytes=found.bytes,
                    copy=None if found.path == self._keeper.source else str(found.path),
                )
            elif found.problem not in self._problems:
                self._problems.add(found.problem)
                yield Note(text=f"{self._keeper.source} was saved, and no copy of it was kept: {found.problem}")

    def _new_lines(self, tail: LineTail, final: bool) -> list[bytes]:
        lines = []
        while data := tail.read():
            lines += tail.lines(data)
        return lines + (tail.lines(b"", final=True) if final else [])

    # --- when it has ended ---

    def conclude(self, ended: Ended) -> Iterator[AnyEvent]:
        """The last facts of the attempt: everything unread, then the incident if it was one, then its end."""
        yield from self.observe(None, final=True)
        diagnosis = self._of_reboot() if ended.rebooted else self._diagnose(ended)
        if self._hang is not None and diagnosis.is_oom != "yes" and ended.exit != ExitStatus(code=0):
            diagnosis = replace(diagnosis, kind=DiagnosisKind.HANG, is_oom="no", cause=Cause.NONE, sources=("steps",))
        seen = ended.exit != ExitStatus()  # of an end that nobody saw, text alone proves nothing
        if seen and (diagnosis.is_oom == "yes" or (diagnosis.is_oom == "suspected" and self._corroborated(diagnosis))):
            yield self._out_of_memory(diagnosis)
        failure = self._reports.failure
        yield AttemptEnded(
            attempt=self.n,
            exit=ended.exit,
            step=self._reports.step,
            diagnosis=str(diagnosis.kind),
            cause=str(diagnosis.cause),
            sources=diagnosis.sources,
            message=_how_it_ended(ended, diagnosis),
            phase=diagnosis.phase or (failure.phase if failure else None),
            peak_bytes=self._peak_bytes(),
            peak_where="host" if self.run.trains_on == "host" else "device",
            user_s=ended.user_s,
            system_s=ended.system_s,
        )

    def _of_reboot(self) -> Diagnosis:
        """With the last that was known of the machine."""
        lines = last_bytes(self.directory.parent.parent / "samples.jsonl", SAMPLE_BYTES).splitlines()
        last = describe_sample(parse_object(lines[-1])) if lines else ""
        message = f"the machine was started anew; last seen: {last}" if last else "the machine was started anew"
        return Diagnosis(kind=DiagnosisKind.MACHINE_DIED, message=message, sources=("boot id",))

    def _corroborated(self, diagnosis: Diagnosis) -> bool:
        """What the text only suggests: a library on the GPU was refused memory, or any, under a limit of ours."""
        limited = self._budget_told and self.run.budget_where == "host"
        return diagnosis.kind == "device_oom" or (diagnosis.kind == "host_oom" and limited)

    def _diagnose(self, ended: Ended) -> Diagnosis:
        # Compiling the patterns takes longer than starting a trainer.
        from .core.diagnosis import clean_lines, diagnose
        from .exception_records import read_failure

        kills = host.oom_kills()
        delta = 0 if kills is None or self._oom_kills is None else max(0, kills - self._oom_kills)
        failed = ended.exit not in (ExitStatus(), ExitStatus(code=0))
        written = read_failure(self.directory, self.process.pid) if failed and self._reports.failure is None else None
        return diagnose(
            Evidence(
                exit=ended.exit,
                stderr=clean_lines(last_bytes(self.directory / "stderr.log", EVIDENCE_BYTES)),
                stdout=clean_lines(last_bytes(self.directory / "stdout.log", EVIDENCE_BYTES)),
                failure=self._reports.failure or written,
                trains_on=self.run.trains_on,
                host_oom_kills=delta,
            )
        )

    def _out_of_memory(self, diagnosis: Diagnosis) -> OomDetected:
        numbers, failure = diagnosis.numbers, self._reports.failure
        in_use = numbers.allocated_bytes if diagnosis.kind == "device_oom" else self._in_use_bytes
        requested = numbers.tried_to_allocate_bytes
        known = [in_use + requested] if in_use is not None and requested is not None else []
        peak = self._peak_bytes()
        if diagnosis.kind == "host_oom" and self.run.trains_on == "host" and peak is not None:
            known.append(peak)
        return OomDetected(
            attempt=self.n,
            diagnosis=str(diagnosis.kind),
            cause=str(diagnosis.cause),
            sources=diagnosis.sources,
            step=self._reports.step,
            message=diagnosis.message,
            phase=diagnosis.phase,
            block_size=failure.block_size if failure else None,
            rank=diagnosis.rank,
            numbers=numbers,
            at_least_bytes=max(known, default=None),
            evidence=diagnosis.evidence,
        )


def _how_it_ended(ended: Ended, diagnosis: Diagnosis) -> str:
    if ended.exec_error is not None:
        return f"the trainer could not be executed: {ended.exec_error[1]}"
    return "" if diagnosis.message.startswith("ended by signal") else diagnosis.message
