"""Where runs live: `$XDG_STATE_HOME/gpusup/runs/<id>/`, private to the user.

journal.jsonl               the truth
samples.jsonl               memory once a second
checkpoints/                verified copies, for trainers that rewrite theirs in place
attempts/001/               stdout.log stderr.log events.jsonl start.json exit.json
"""

import os
from pathlib import Path

from .core.events import AnyEvent
from .errors import JournalError, NoSuchRun
from .journal import read

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def state_home() -> Path:
    """`$GPUSUP_HOME`, else `gpusup` under the XDG state directory."""
    if home := os.environ.get("GPUSUP_HOME"):
        return Path(home).absolute()
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "gpusup"


class RunDirectory:
    """Names of the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name
        self.journal = path / "journal.jsonl"
        self.samples = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.compile_cache = path / "compile-cache"

    @property
    def created_at(self) -> float:
        """Epoch seconds, of a file that is made with the run and never touched again."""
        return (self.path / "created").stat().st_mtime

    def attempt(self, n: int) -> Path:
        """The single-use directory of attempt `n`."""
        return self.path / "attempts" / f"{n:03d}"

    def events(self) -> list[AnyEvent]:
        """The journal, read."""
        return read(self.journal)


def create_run() -> RunDirectory:
    """A new, empty run directory, mode 0700."""
    runs = state_home() / "runs"
    runs.parent.parent.mkdir(parents=True, exist_ok=True)
    for private in (runs.parent, runs):
        private.mkdir(exist_ok=True, mode=0o700)
    while True:
        path = runs / "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in os.urandom(6))
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        (path / "attempts").mkdir(mode=0o700)
        (path / "created").touch(mode=0o600)
        return RunDirectory(path)


def list_runs() -> list[RunDirectory]:
    """Every run with a journal, newest first."""
    runs = state_home() / "runs"
    if not runs.is_dir():
        return []
    found = [RunDirectory(p) for p in runs.iterdir() if (p / "journal.jsonl").is_file() and (p / "created").is_file()]
    return sorted(found, key=lambda run: run.created_at, reverse=True)


def find_run(wanted: str) -> RunDirectory:
    """The run named by an id prefix, its name (the newest one), or `-1` (the newest), `-2` ...

    Raises:
        NoSuchRun: none matches, or an id prefix matches several.
    """
    runs = list_runs()
    if wanted.startswith("-") and wanted[1:].isdigit() and wanted != "-0":
        index = int(wanted[1:]) - 1
        if index < len(runs):
            return runs[index]
        raise NoSuchRun(f"there is no run {wanted}: {len(runs)} runs are recorded")
    by_id = [run for run in runs if run.id.startswith(wanted)]
    if len(by_id) > 1 and wanted not in [run.id for run in by_id]:
        raise NoSuchRun(
            f"{wanted!r} matches {len(by_id)} runs: {', '.join(run.id for run in by_id[:5])}; type more of it"
        )
    if by_id:
        return next((run for run in by_id if run.id == wanted), by_id[0])
    for run in runs:
        try:
            events = run.events()
        except JournalError:
            continue  # a damaged journal hides its own name only
        if events and getattr(events[0], "name", None) == wanted:
            return run
    raise NoSuchRun(f"no run matches {wanted!r}; `gpusup log` lists them")
