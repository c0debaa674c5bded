"""`gpusup diagnose`: what ended a run, from its log."""

import shutil
import signal as signals
import sys
import tempfile
from pathlib import Path
from typing import Literal

import click
import msgspec

from ..core.diagnosis import clean_lines, diagnose
from ..core.remedies import RemedyClass, remedy_of
from ..core.verdict import Cause, Diagnosis, DiagnosisKind, Evidence, ExitStatus, OomNumbers
from ..errors import UsageError
from ..log_ending import read_ending
from ..printable import printable
from ..units import format_bytes

SCHEMA_VERSION = 1
NAMES: dict[DiagnosisKind, str] = {
    DiagnosisKind.DEVICE_OOM: "out of GPU memory",
    DiagnosisKind.HOST_OOM: "out of host memory",
    DiagnosisKind.SHM_OOM: "out of shared memory",
    DiagnosisKind.HOST_OOM_SUSPECTED: "killed (SIGKILL), perhaps for memory",
    DiagnosisKind.DISK_FULL: "the disk was full",
    DiagnosisKind.USER_INTERRUPT: "interrupted by a person",
    DiagnosisKind.EXEC_FAILED: "could not be executed",
    DiagnosisKind.DISTRIBUTED: "another process of the job failed or did not answer",
    DiagnosisKind.CUDA_CONTEXT: "a CUDA error other than memory",
    DiagnosisKind.GPU_LOST: "the GPU failed",
    DiagnosisKind.NO_GPU: "no usable GPU",
    DiagnosisKind.NOT_A_NUMBER: "NaN or infinity",
    DiagnosisKind.STOPPED: "told to leave",
    DiagnosisKind.HANG: "it hung",
    DiagnosisKind.MACHINE_DIED: "the machine stopped",
    DiagnosisKind.ERROR: "an error of the program",
    DiagnosisKind.SIGNAL: "crashed in native code",
    DiagnosisKind.SUCCESS: "finished",
    DiagnosisKind.NO_FAILURE: "no failure to be seen",
    DiagnosisKind.UNKNOWN: "unknown",
}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints; supervisor/schemas/diagnosis-v1.json is made from it."""

    schema_version: int
    kind: DiagnosisKind
    cause: Cause
    is_oom: bool | Literal["suspected"]
    fatal: bool
    confidence: Literal["high", "medium", "low"]
    phase: str | None
    rank: int | None
    numbers: OomNumbers
    message: str
    evidence: tuple[str, ...]
    sources: tuple[str, ...]
    remedy: RemedyClass
    advice: tuple[str, ...]


@click.command("diagnose")
@click.argument("logs", nargs=-1, required=True, metavar="LOG...")
@click.option("--exit-code", type=int, metavar="N", help="The exit status it ended with, as the shell gives it.")
@click.option("--signal", metavar="S", help="The signal that ended it: 9, KILL or SIGKILL.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (supervisor/schemas/diagnosis-v1.json).")
def command(logs: tuple[str, ...], exit_code: int | None, signal: str | None, as_json: bool) -> int:
    """What ended a run, told from its log, whoever ran it. Several LOGs are one run's: its output and its errors, or
    one for each rank. - is standard input.

    \b
    Examples:
        gpusup diagnose last_night.log
        gpusup diagnose out.log err.log --exit-code 137 --json
    """
    if exit_code is not None and signal is not None:
        raise UsageError("a run ends with an exit code or by a signal: give --exit-code or --signal, not both")
    status = ExitStatus(code=exit_code, signal=None if signal is None else _signal_number(signal))
    outputs = tuple(clean_lines(_ending(log)) for log in logs)
    found = diagnose(Evidence(exit=status, stderr=outputs[-1], others=outputs[:-1], text_only=status == ExitStatus()))
    print(msgspec.json.encode(report(found)).decode() if as_json else story(found))
    return 0


def report(found: Diagnosis) -> Report:
    """A diagnosis as other programs read it."""
    remedy = remedy_of(found)
    return Report(
        schema_version=SCHEMA_VERSION,
        kind=found.kind,
        cause=found.cause,
        is_oom="suspected" if _is_kill(found) else found.is_oom != "no",
        fatal=found.fatal,
        confidence=found.confidence,
        phase=found.phase,
        rank=found.rank,
        numbers=found.numbers,
        message=found.message,
        evidence=found.evidence,
        sources=found.sources,
        remedy=remedy.remedy,
        advice=remedy.advice,
    )


def story(found: Diagnosis) -> str:
    """A diagnosis as a person reads it."""
    where = [f"in {found.phase}"] if found.phase else []
    where += [f"on rank {found.rank}"] if found.rank is not None else []
    likely = "probably " if found.is_oom == "suspected" and not _is_kill(found) else ""
    cause = f" ({found.cause.replace('_', ' ')})" if found.cause else ""
    lines = [f"{likely}{' '.join([NAMES[found.kind], *where])}{cause}"]
    if found.fatal and found.message:
        lines.append(f"  {found.message}")
    known = {name: size for name, size in msgspec.structs.asdict(found.numbers).items() if size is not None}
    lines += [f"  {_words(name):<22} {format_bytes(size):>12}" for name, size in known.items()]
    if found.evidence:
        lines += ["", "what shows it:", *(f"  | {line}" for line in found.evidence)]
    advice = remedy_of(found).advice
    if advice:
        lines += ["", "what to try:", *(f"  - {line}" for line in advice)]
    lines += ["", f"confidence {found.confidence}, from {' and '.join(found.sources) or 'nothing'}"]
    return "\n".join(map(printable, lines))


def _is_kill(found: Diagnosis) -> bool:
    """A bare SIGKILL: no text can tell whose. Of other suspicions the wording tells what is likely."""
    return found.kind is DiagnosisKind.HOST_OOM_SUSPECTED


def _words(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _signal_number(text: str) -> int:
    if text.isdigit() and int(text) in signals.valid_signals():
        return int(text)
    name = text.upper().removeprefix("SIG")
    try:
        return int(signals.Signals[f"SIG{name}"])
    except KeyError:
        raise UsageError(f"--signal {text}: no such signal; give a number or a name, such as 9 or KILL") from None


def _ending(log: str) -> bytes:
    if log != "-":
        return read_ending(Path(log))
    with tempfile.NamedTemporaryFile(prefix="gpusup-") as spooled:
        shutil.copyfileobj(sys.stdin.buffer, spooled)
        spooled.flush()
        return read_ending(Path(spooled.name))
