"""What is typed after `--`, understood as a trainer's command line."""

import sys
from pathlib import Path

import pytest
from gpusup.supervisor.cli import split_trainer
from gpusup.supervisor.dialects.command import parse_command
from gpusup.supervisor.errors import CommandNotFound, NotExecutable, UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("python3", "torchrun", "tool"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train.py").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "own", "trainer"),
    [
        ("run demo -- train.py --x=1", "run demo", "train.py --x=1"),
        ("run -- torchrun a -- b", "run", "torchrun a -- b"),
        ("run demo train.py --name=x", "run demo", "train.py --name=x"),
        ("run train.py", "run", "train.py"),
        ("run --python my.py train.py", "run --python my.py", "train.py"),
        ("log -1", "log -1", ""),
        ("policy show x.py", "policy show x.py", ""),
        ("", "", ""),
    ],
)
def test_first_double_dash_divides_gpusups_words_from_the_trainers(typed: str, own: str, trainer: str) -> None:
    assert split_trainer(typed.split()) == (own.split(), trainer.split())


def test_script_is_run_by_the_python_given(folder: Path) -> None:
    found = parse_command(("train.py", "--x=1"), str(folder), sys.executable)
    assert found.argv == (sys.executable, "train.py", "--x=1")
    assert (found.script, found.arguments, found.processes) == ("train.py", ("--x=1",), 1)
    assert found.script_path == folder / "train.py"


def test_active_environment_goes_before_every_other_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "env" / "bin").mkdir(parents=True)
    (folder / "env" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("VIRTUAL_ENV", str(folder / "env"))
    assert parse_command(("train.py",), str(folder)).argv[0] == str(folder / "env" / "bin" / "python")


@pytest.mark.parametrize(
    ("words", "script", "arguments"),
    [
        (("python3", "train.py", "a", "-m"), "train.py", ("a", "-m")),
        (("python3", "-u", "-O", "train.py", "x.py"), "train.py", ("x.py",)),
        (("python3", "-u", "-m", "gpusup.trainer.train", "--a=1"), "gpusup.trainer.train", ("--a=1",)),
        (("python3", "-W", "ignore", "-X", "dev", "train.py", "z"), "train.py", ("z",)),
        (("python3", "-c", "print()", "train.py"), None, None),
        (("torchrun", "--standalone", "train.py", "--b=2"), "train.py", ("--b=2",)),
        (("tool", "go"), None, ("go",)),
        (("tool", "-c", "cd a && python train.py"), None, None),
    ],
)
def test_script_and_its_arguments_are_found(
    folder: Path, words: tuple[str, ...], script: str | None, arguments: tuple[str, ...] | None
) -> None:
    found = parse_command(words, str(folder))
    assert found.script == script
    assert found.argv == (str(folder / words[0]), *words[1:]), "nothing typed is lost or reordered"
    if arguments is not None:
        assert found.arguments == arguments


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        (("--nproc_per_node=2",), 2),
        (("--nproc-per-node=4", "--nnodes=1"), 4),
        (("--nproc_per_node", "8"), 8),
        (("--nproc_per_node=gpu",), 1),
        ((), 1),
    ],
)
def test_ranks_are_read_from_the_launchers_options(folder: Path, options: tuple[str, ...], processes: int) -> None:
    found = parse_command(("torchrun", *options, "train.py", "--nproc_per_node=99"), str(folder))
    assert found.processes == processes


def test_nothing_to_run_says_what_to_type() -> None:
    with pytest.raises(UsageError, match="put the trainer's command after `--`"):
        parse_command((), "/")


@pytest.mark.parametrize("words", [("no-such-tool",), ("python3", "gone.py"), ("gone.py",), ("torchrun", "gone.py")])
def test_what_does_not_exist_is_127(folder: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(CommandNotFound) as caught:
        parse_command(words, str(folder), sys.executable)
    assert caught.value.exit_code == 127


def test_file_that_is_not_executable_is_126(folder: Path) -> None:
    (folder / "tool").chmod(0o644)
    with pytest.raises(NotExecutable) as caught:
        parse_command((str(folder / "tool"),), str(folder))
    assert caught.value.exit_code == 126
