"""`gpusup resume`: take over a run whose supervisor died, or continue one that was stopped."""

import click

from ..console import say, supervise
from ..core.state import fold
from ..dialects.detect import DIALECTS
from ..errors import UsageError
from ..journal import Journal
from ..run_store import find_run


@click.command("resume", context_settings={"ignore_unknown_options": True})
@click.argument("run", default="-1")
@click.option("-q", "--quiet", is_flag=True, help="Do not show the trainer's output.")
def command(run: str, quiet: bool) -> int:
    """Take over RUN (an id, a name or -1): its training goes on undisturbed, or continues from its last checkpoint.

    \b
    Example:
        gpusup resume -1
    """
    directory = find_run(run)
    journal = Journal(directory.journal)
    state = fold(journal.events)
    if state.run is None:
        raise UsageError(f"run {directory.id} never began: its journal is empty")
    if state.finished is not None and state.finished.result != "stopped":
        raise UsageError(
            f"run {directory.id} is over ({state.finished.result.replace('_', ' ')}: {state.finished.why}); "
            "start a new one with `gpusup run`"
        )
    say(f"gpusup: run {directory.id} ({state.run.name}) at step {state.max_step}\n")
    return supervise(directory, journal, DIALECTS[state.run.dialect], quiet)
