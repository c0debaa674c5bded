"""The command line: splits off the trainer's command, then hands over to the subcommand's own module."""

import importlib
import sys

import click

from . import __version__
from .errors import GpusupError, PolicyError

COMMANDS = {
    "run": "run a trainer under supervision",
    "resume": "take over or continue a run",
    "log": "the runs, or the story of one",
    "doctor": "what would spoil the night, before it",
    "diagnose": "what ended a run, from its log",
    "policy": "check and show policies",
}


class LazyCommands(click.Group):
    """Imports a subcommand only when it is chosen: start-up time is a feature."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".commands.{cmd_name}", __package__)
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="gpusup", message="%(prog)s %(version)s")
def gpusup() -> None:
    """Supervise a training run: on out of memory, change the settings by a policy, resume from the last checkpoint, and
    give the speed back later.

    \b
    Example:
        gpusup run rtx4070 -- train.py config/train_gpt2.py
        gpusup log -1
    """


def split_trainer(argv: list[str]) -> tuple[list[str], list[str]]:
    """gpusup's own words and the trainer's: only the first `--` is ours.

    Without one, `run train.py ...` and `run POLICY train.py ...` are understood as what they mean.
    """
    if "--" in argv:
        at = argv.index("--")
        return argv[:at], argv[at + 1 :]
    if argv[:1] == ["run"]:
        for at, word in enumerate(argv[1:], 1):
            if word.endswith(".py") and not word.startswith("-") and argv[at - 1] != "--python":
                return argv[:at], argv[at:]
    return argv, []


def main(argv: list[str] | None = None) -> int:
    """The only place where an error becomes a message and an exit code."""
    own, trainer = split_trainer(sys.argv[1:] if argv is None else argv)
    try:
        result = gpusup.main(own, prog_name="gpusup", standalone_mode=False, obj=tuple(trainer))
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except GpusupError as error:
        print(error if isinstance(error, PolicyError) else f"gpusup: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"gpusup: {error}", file=sys.stderr)
        return GpusupError.exit_code


if __name__ == "__main__":
    sys.exit(main())
