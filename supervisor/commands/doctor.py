"""`gpusup doctor`: the machine and the run, before the night."""

from pathlib import Path

import click
import msgspec

from ..dialects.command import parse_command
from ..dialects.detect import detect
from ..doctor import Finding, Subject, examine
from ..printable import printable

MARKS = {"ok": "ok      ", "note": "note    ", "warning": "WARNING ", "failure": "FAILURE "}
EXIT_FAILURE = 1


@click.command("doctor")
@click.option("--python", help="The trainer's Python; default: the active environment's.")
@click.option("--json", "as_json", is_flag=True, help="A list of findings: level, topic, what, do.")
@click.pass_obj
def command(words: tuple[str, ...], python: str | None, as_json: bool) -> int:
    """Look for what would spoil the night: driver, GPU, PyTorch, disk, checkpoints, limits, sleep. Exits with 1 when
    something would fail, with 0 when there are only warnings.

    \b
    Examples:
        gpusup doctor
        gpusup doctor -- train.py config/train_gpt2.py
    """
    subject = Subject()
    if words:
        trainer = parse_command(words, str(Path.cwd()), python)
        subject = Subject(command=trainer, reading=detect(trainer).read(trainer))
    found = examine(subject)
    print(msgspec.json.encode(found).decode() if as_json else story(found))
    return EXIT_FAILURE if any(finding.level == "failure" for finding in found) else 0


def story(found: list[Finding]) -> str:
    """The findings as a person reads them."""
    lines = []
    for finding in found:
        lines.append(f"{MARKS[finding.level]} {finding.topic:<12} {printable(finding.what)}")
        if finding.do:
            lines.append(f"{'':<21} -> {printable(finding.do)}")
    failures = sum(finding.level == "failure" for finding in found)
    warnings = sum(finding.level == "warning" for finding in found)
    return "\n".join([*lines, "", f"failures: {failures}, warnings: {warnings}"])
