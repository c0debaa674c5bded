"""`gpusup log`: the runs, or the story of one."""

import sys
import time
from datetime import datetime

import click
import msgspec

from ..core.effects import Effect
from ..core.events import AnyEvent, AttemptPlanned, BudgetApplied, Finished
from ..core.ladder import describe
from ..core.run_log import AttemptSummary, RunLog, RunSummary, run_log
from ..errors import GpusupError, NoSuchRun
from ..journal import is_locked
from ..narrate import narrate
from ..printable import printable
from ..run_store import RunDirectory, find_run, list_runs
from ..units import count, format_bytes, format_duration

FOLLOW_EVERY_S = 0.2
RESUME_OPTIONS = ("--init_from", "--resume_from")
"""Not shown as changes: the line `resumed` says it."""
COLUMNS = ("RUN", "NAME", "POLICY", "RESULT", "WHEN", "ELAPSED", "ATT", "OOM", "STEPS", "LOST", "SETTINGS AT THE END")


@click.command("log", context_settings={"ignore_unknown_options": True})
@click.argument("run", required=False)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="How to print it.")
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
@click.option("-f", "--follow", is_flag=True, help="Go on printing what happens until the run is finished.")
def command(run: str | None, output: str, as_json: bool, follow: bool) -> int:
    """Without RUN: all runs, newest first. With RUN (an id, its beginning, a name, or -1 for the newest): its story.

    \b
    Examples:
        gpusup log
        gpusup log -1
        gpusup log -1 -o json
    """
    in_json = as_json or output == "json"
    if run is None and not follow:
        _print_list(in_json)
        return 0
    directory = find_run(run or "-1")
    if follow:
        _follow(directory, in_json)
        return 0
    told = _read(directory)
    if told is None:
        raise NoSuchRun(f"run {directory.id} has an empty journal: it never began")
    _write(_json(told) if in_json else story(told))
    return 0


def _read(directory: RunDirectory) -> RunLog | None:
    events = directory.events()
    return run_log(events, is_locked(directory.journal)) if events else None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _json(content: object) -> str:
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n"


# --- the list --------------------------------------------------------------------------------------------------------


def _print_list(in_json: bool) -> None:
    summaries, damaged = [], []
    for directory in list_runs():
        try:
            told = _read(directory)
        except GpusupError as error:
            damaged.append(str(error))
            continue
        if told is not None:
            summaries.append(told.run)
    if in_json:
        _write(_json({"schema_version": 1, "runs": summaries}))
    elif summaries:
        _write(_table([COLUMNS, *(_row(summary) for summary in summaries)]))
    else:
        _write("no runs yet; `gpusup run rtx4070 -- train.py` makes the first\n")
    for problem in damaged:
        print(f"gpusup: {problem}", file=sys.stderr)


def _row(run: RunSummary) -> tuple[str, ...]:
    target = f"/{run.target_steps}" if run.target_steps else ""
    return (
        run.id,
        run.name,
        run.policy,
        run.state.replace("_", " "),
        _local(run.started, "%a %d %b %H:%M"),
        format_duration(run.elapsed_s),
        str(run.attempts),
        str(run.ooms),
        f"{run.steps}{target}",
        str(run.lost_steps),
        describe(run.settings_at_end),
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    rows = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def _local(at: str, form: str) -> str:
    return datetime.fromisoformat(at).astimezone().strftime(form) if at else "-"


# --- one run ---------------------------------------------------------------------------------------------------------


def story(told: RunLog) -> str:
    """The night as a timeline, and what to make of it."""
    run = told.run
    lines = [_headline(run), _figures(run), ""]
    budget_told = False
    for event in told.events:
        if not (budget_told and isinstance(event, BudgetApplied)):  # the same for every attempt
            lines += _event_lines(event, told)
        budget_told = budget_told or isinstance(event, BudgetApplied)
    lines.append("")
    if run.ooms or run.state != "done":
        lines.append(f"why: {printable(run.why)}")
    if run.next_time:
        lines.append(f"next time: {printable(run.next_time)}")
    if run.state == "lost":
        lines.append(f"its supervisor is gone: `gpusup resume {run.id}` takes the run over")
    return "\n".join(lines) + "\n"


def _headline(run: RunSummary) -> str:
    code = "" if run.exit_code is None else f", exit {run.exit_code}"
    when = f"{_local(run.started, '%a %d %b %Y %H:%M:%S')}, {format_duration(run.elapsed_s)}"
    return (
        f"{run.id} {printable(run.name)}   {run.state.replace('_', ' ').upper()}{code}   {when}   policy {run.policy}"
    )


def _figures(run: RunSummary) -> str:
    target = f" of {run.target_steps}" if run.target_steps else ""
    held = (
        f"global batch {run.global_batch_size}, the same in every attempt"
        if run.global_batch_size
        else "global batch unknown"
    )
    lost = f"{count(run.lost_steps, 'step')} done twice, {format_duration(run.lost_s)} lost to failures"
    if run.restoring_s:
        lost += f", {format_duration(run.restoring_s)} spent on giving speed back"
    return f"{run.steps}{target} steps in {count(run.attempts, 'attempt')}, {count(run.ooms, 'OOM')}; {held}; {lost}"


def _event_lines(event: AnyEvent, told: RunLog) -> list[str]:
    line = _line(event).rstrip("\n")
    if not line:
        return []
    if isinstance(event, AttemptPlanned):
        attempt = told.attempts[event.attempt - 1]
        return [line, *(_detail(text) for text in (*_arguments(attempt), *_measured(attempt, told.effects)))]
    return [line]


def _detail(text: str) -> str:
    return " " * 22 + printable(text)


def _arguments(attempt: AttemptSummary) -> list[str]:
    told = [token for token in attempt.argv_changes if not token.startswith(RESUME_OPTIONS)]
    return [f"arguments changed: {' '.join(told)}"] if told else []


def _measured(attempt: AttemptSummary, effects: tuple[Effect, ...]) -> list[str]:
    """The effect of this attempt's change of settings, and its own peak."""
    lines = []
    for effect in effects:
        if effect.after == attempt.n:
            before = f"{'>= ' if effect.before_at_least else ''}{format_bytes(effect.before_bytes)}"
            after = f"{'>= ' if effect.after_at_least else ''}{format_bytes(effect.after_bytes)}"
            length = f" at sequence length {effect.block_size}" if effect.block_size else ""
            lines.append(f"measured: peak of {effect.phase}{length} {before} -> {after}{_verdict(effect)}")
    return lines


def _verdict(effect: Effect) -> str:
    difference = effect.after_bytes - effect.before_bytes
    amount = format_bytes(abs(difference))
    if effect.before_at_least and effect.after_at_least:
        return " (both ran out, so no figure)"
    if effect.before_at_least:
        return f" (freed at least {amount})" if difference < 0 else " (a bound, so no figure)"
    if effect.after_at_least:
        return f" (cost at least {amount})" if difference > 0 else " (a bound, so no figure)"
    if abs(difference) < 0.01 * effect.before_bytes:
        return " (no change)"
    return f" (freed {amount})" if difference < 0 else f" (cost {amount})"


# --- following -------------------------------------------------------------------------------------------------------


def _follow(directory: RunDirectory, in_json: bool) -> None:
    """Print events as they are journalled, until the run is finished or nobody supervises it any more."""
    shown, size = 0, -1
    while True:
        supervised = is_locked(directory.journal)  # before reading, so that its last words are not missed
        grown = directory.journal.stat().st_size
        if grown != size:
            events = directory.events()
            for event in events[shown:]:
                _write(msgspec.json.encode(event).decode() + "\n" if in_json else _line(event))
            shown, size = len(events), grown
        if events and isinstance(events[-1], Finished):
            return
        if not supervised:
            print(f"its supervisor is gone: `gpusup resume {directory.id}` takes the run over", file=sys.stderr)
            return
        time.sleep(FOLLOW_EVERY_S)


def _line(event: AnyEvent) -> str:
    told = narrate(event)
    return "" if told is None else f"  {_local(event.at, '%H:%M:%S')}  {told[0]:<9} {printable(told[1])}\n"
