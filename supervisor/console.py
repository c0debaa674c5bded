"""The person at the terminal: the trainer's output on its own streams, gpusup's lines on stderr."""

import os
import sys
import traceback
from datetime import datetime

from .attempt_watch import Echo
from .core.decide import EXIT_STOPPED
from .core.events import AnyEvent, Finished
from .core.state import State
from .dialects.base import Dialect
from .errors import GpusupError
from .journal import Journal
from .loop import RENEWED, Detached, DriverReplaced, Supervisor, Tell
from .narrate import LABEL_WIDTH, narrate
from .printable import printable
from .run_store import RunDirectory

STDOUT, STDERR = 1, 2


def write_quietly(stream: int, data: bytes) -> None:
    """To the terminal or pipe `stream`; a closed one must not end the supervision."""
    try:
        while data:
            data = data[os.write(stream, data) :]
    except OSError:
        pass


def say(text: str) -> None:
    """gpusup's own words go to stderr, so that stdout stays the trainer's."""
    write_quietly(STDERR, text.encode("utf-8", "replace"))


class Console(Tell):
    """Shows events as they are recorded."""

    def __init__(self, quiet: bool) -> None:
        super().__init__()
        self._bold = ("\x1b[1m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        if not quiet:
            self.echo = Echo(
                stdout=lambda data: write_quietly(STDOUT, data), stderr=lambda data: write_quietly(STDERR, data)
            )

    def event(self, event: AnyEvent) -> None:
        told = narrate(event)
        if told is None:
            return
        label, sentence = told
        clock = datetime.fromisoformat(event.at).astimezone().strftime("%H:%M:%S")
        on, off = self._bold
        say(f"{on}gpusup {clock}  {label:<{LABEL_WIDTH}}  {printable(sentence)}{off}\n")


def supervise(directory: RunDirectory, journal: Journal, dialect: Dialect, quiet: bool) -> int:
    """Supervise until the run is finished or the person leaves; returns the exit code of the command."""
    supervisor = Supervisor(directory, journal, dialect, Console(quiet))
    try:
        code = supervisor.run()
    except Detached:
        attempt = supervisor.state.attempt
        left = "training goes on" if attempt is not None and not attempt.ended else "no trainer is running"
        say(f"\ngpusup: left; {left}. `gpusup resume {directory.id}` takes it over again\n")
        return EXIT_STOPPED
    except DriverReplaced:
        journal.close()
        say("gpusup: the driver was replaced; going on in a new process\n")
        again = ["resume", directory.id, *(["-q"] if quiet else [])]
        python = [
            sys.executable,
            "-P",
            "-m",
            "gpusup.supervisor.cli",
        ]  # -P: nothing of the trainer's folder is imported
        os.execve(sys.executable, [*python, *again], {**os.environ, RENEWED: "1"})
    except GpusupError:
        raise
    except Exception as error:
        say(traceback.format_exc())
        raise GpusupError(
            f"a defect or this machine ended the supervision ({error!r}); the trainer, if any, goes on. "
            f"`gpusup resume {directory.id}` takes it over"
        ) from error
    finally:
        journal.close()
    say(_last_words(directory, supervisor.state))
    return code


def _last_words(directory: RunDirectory, state: State) -> str:
    finished = state.finished
    lines = [f"gpusup: the whole story: gpusup log {directory.id}"]
    if isinstance(finished, Finished) and finished.result == "stopped":
        lines.append(f"gpusup: to continue: gpusup resume {directory.id}")
    return "\n".join(lines) + "\n"
