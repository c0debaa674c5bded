"""What the person typed after `--`, made into a command: which interpreter, which script, which arguments."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from msgspec import Struct

from ..errors import CommandNotFound, NotExecutable, UsageError

LAUNCHERS = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch")
OWN_TRAINER = "gpusup.trainer.train"


class Command(Struct, frozen=True, kw_only=True):
    """A trainer's command line. `argv[:args_from]` launches `script`; the rest are the script's own arguments."""

    argv: tuple[str, ...]
    cwd: str
    interpreter: str = ""
    script: str | None = None
    args_from: int = 1
    processes: int = 1

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.argv[self.args_from :]

    @property
    def script_path(self) -> Path | None:
        """The script's file, resolved from the working directory."""
        if self.script is None:
            return None
        if self.script == OWN_TRAINER:
            return Path(__file__).parents[2] / "trainer" / "train.py"
        return Path(self.cwd) / self.script


def user_python() -> str:
    """The user's Python: the active environment's, else the one gpusup runs in if it has torch, else `python3`."""
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            python = Path(prefix) / "bin" / "python"
            if python.exists():
                return str(python)
    if find_spec("torch") is not None:
        return sys.executable
    return shutil.which("python3") or shutil.which("python") or sys.executable


def parse_command(words: tuple[str, ...], cwd: str, python: str | None = None) -> Command:
    """`train.py ...`, `python train.py ...`, `python -m module ...`, `torchrun ... train.py ...` or any executable.

    Raises:
        UsageError, CommandNotFound, NotExecutable: there is nothing that could be run.
    """
    if not words:
        raise UsageError("nothing to run: put the trainer's command after `--`, as in `gpusup run rtx4070 -- train.py`")
    if words[0].endswith(".py"):
        interpreter = python or user_python()
        _must_exist(Path(cwd) / words[0], words[0])
        return Command(
            argv=(_which(interpreter), *words), cwd=cwd, interpreter=interpreter, script=words[0], args_from=2
        )
    program = _which(words[0])
    argv = (program, *words[1:])
    if Path(words[0]).name.startswith("python"):
        script, args_from = _python_script(words)
    else:
        script, args_from = _script_word(words, 1)
    if script is not None and " " in script and not (Path(cwd) / script).is_file():
        script, args_from = None, 1  # a shell's whole command, as in `bash -c "... train.py"`
    if script is not None and script.endswith(".py"):
        _must_exist(Path(cwd) / script, script)
    interpreter = program if Path(words[0]).name.startswith("python") else ""
    processes = _processes(words[:args_from])
    return Command(argv=argv, cwd=cwd, interpreter=interpreter, script=script, args_from=args_from, processes=processes)


def _python_script(words: tuple[str, ...]) -> tuple[str | None, int]:
    """The script or module a `python ...` command line runs, and where its arguments begin."""
    index = 1
    while index < len(words):
        word = words[index]
        if word == "-m":
            module = words[index + 1] if index + 1 < len(words) else None
            return _script_word(words, index + 2) if module in LAUNCHERS else (module, index + 2)
        if word in ("-c", "-"):
            return None, index + 1
        if word in ("-W", "-X"):
            index += 2
            continue
        if not word.startswith("-"):
            return word, index + 1
        index += 1
    return None, index


def _script_word(words: tuple[str, ...], begin: int) -> tuple[str | None, int]:
    """The first script among the words, for launchers that take one."""
    found = next((i for i, word in enumerate(words[begin:], begin) if word.endswith(".py")), None)
    return (None, begin) if found is None else (words[found], found + 1)


def _processes(words: tuple[str, ...]) -> int:
    """Ranks on this node, from a launcher's options."""
    for index, word in enumerate(words):
        name, equals, value = word.lstrip("-").partition("=")
        if name.replace("-", "_") == "nproc_per_node":
            value = value if equals else (words[index + 1] if index + 1 < len(words) else "")
            return int(value) if value.isdigit() else 1
    return 1


def _which(program: str) -> str:
    found = shutil.which(program)
    if found is not None:
        return found
    if os.sep in program and Path(program).exists():
        raise NotExecutable(
            f"{program} cannot be executed: it is not an executable file (chmod +x, or `python {program}`)"
        )
    raise CommandNotFound(f"{program}: command not found")


def _must_exist(path: Path, shown: str) -> None:
    if not path.is_file():
        raise CommandNotFound(f"{shown}: no such file (looked in {path.parent})")
