"""`gpusup run`: launch a trainer and supervise it to its end."""

from pathlib import Path

import click
from msgspec.structs import replace

from ..checkpoints import check, keep
from ..console import say, supervise
from ..core.events import AnyEvent, CheckpointSaved, Note, RunCreated
from ..core.state import fold
from ..dialects.base import Dialect, Reading
from ..dialects.command import parse_command
from ..dialects.detect import DIALECTS, detect
from ..errors import UsageError
from ..journal import Journal, is_locked
from ..policy_file import find_policy, load_policy
from ..preflight import Wanted, prepare
from ..run_store import RunDirectory, create_run, list_runs
from ..screen import screen
from ..units import parse_bytes


@click.command("run")
@click.argument("policy", required=False)
@click.option("--python", help="The trainer's Python; default: the active environment's.")
@click.option("--name", help="A name for the run; default: the script's.")
@click.option(
    "--memory-budget", help="A real memory limit for the trainer, such as 1.2GiB: a small card on any machine."
)
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Have the trainer save every N optimizer steps.")
@click.option("--dialect", "dialect_name", type=click.Choice(list(DIALECTS)), help="Which trainer family it is.")
@click.option("--observe", is_flag=True, help="Change nothing; log what would have been done.")
@click.option("-q", "--quiet", is_flag=True, help="Do not show the trainer's output.")
@click.pass_obj
def command(
    words: tuple[str, ...],
    policy: str | None,
    python: str | None,
    name: str | None,
    memory_budget: str | None,
    checkpoint_every: int | None,
    dialect_name: str | None,
    observe: bool,
    quiet: bool,
) -> int:
    """Run a trainer under supervision: gpusup run [POLICY] -- train.py ARGS...

    POLICY is a file, or the name of one that comes with gpusup (rtx4070, default, demo).

    \b
    Examples:
        gpusup run rtx4070 -- train.py config/train_gpt2.py
        gpusup run --memory-budget 1.2GiB -- python train.py --device=cpu
    """
    trainer = parse_command(words, str(Path.cwd()), python)
    if policy is None:
        policy = "default"
        say("no POLICY was given: using `default` (wait for memory others hold, then the micro-batch down)\n")
    path = find_policy(policy)
    loaded = load_policy(path)
    dialect = DIALECTS[dialect_name] if dialect_name else detect(trainer)
    wanted = Wanted(
        name=name,
        memory_budget_bytes=_bytes(memory_budget),
        checkpoint_every=checkpoint_every,
        observe=observe,
    )
    prepared = prepare(trainer, dialect, loaded, path.stem, wanted)  # before there is a run: it may be refused
    refuse_shared_place(prepared.run)
    directory = create_run()
    journal = Journal(directory.journal)
    run = replace(prepared.run, run_id=directory.id)
    journal.events.append(journal.append(run))
    journal.events += [journal.append(event) for event in given_checkpoint(prepared.reading, dialect, directory)]
    for note in (*prepared.notes, *prepared.reading.warnings):
        journal.events.append(journal.append(Note(text=note)))
    say(screen(run, prepared))
    return supervise(directory, journal, dialect, quiet)


def refuse_shared_place(run: RunCreated) -> None:
    """Two runs that save into one folder would take each other's checkpoints for their own."""
    place = run.checkpoints.place
    for other in list_runs() if place else []:
        if is_locked(other.journal):
            state = fold(other.events())
            if state.run is not None and Path(state.run.checkpoints.place).resolve() == Path(place).resolve():
                raise UsageError(
                    f"run {other.id} is at work in {place}; give this one another out_dir, or stop that one"
                )


def given_checkpoint(reading: Reading, dialect: Dialect, directory: RunDirectory) -> list[AnyEvent]:
    """The checkpoint the command itself resumes from, as the run's first: verified, copied if it will be rewritten."""
    if reading.resumes_from is None:
        return []
    path = Path(reading.resumes_from)
    found = keep(path, directory.checkpoints) if dialect.rewrites_in_place else check(path)
    if found.problem or found.step is None:
        return [Note(text=f"the command resumes from {path}, and {found.problem or 'its step is not recorded in it'}")]
    copy = str(found.path) if dialect.rewrites_in_place else None
    return [CheckpointSaved(attempt=0, step=found.step, path=str(path), bytes=found.bytes, copy=copy)]


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UsageError(f"--memory-budget {text}: {error}") from None
