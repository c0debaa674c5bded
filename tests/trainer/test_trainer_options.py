"""The knobs: declared as constants, overridden from left to right, refused with a reason."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from gpusup.trainer import options
from gpusup.trainer.errors import TrainerError
from trainer_runs import PACKAGE, ROOT

SOURCE = """
batch_size = 12  # samples
rate = 6e-4  # how fast
compile = True  # faster  # noqa: A001
name = "a"  # what it is called
tokens = 4 * batch_size  # folded
CONSTANT = 3
"""
KNOBS = options.declared(SOURCE)


def parse(*arguments: str) -> dict[str, options.Value]:
    return options.parse(arguments, KNOBS)


def test_knobs_of_train_are_its_variables_when_it_is_run() -> None:
    """What a reader of the source sees is what the script has, and each knob says what it is."""
    knobs = options.declared((PACKAGE / "train.py").read_text())
    variables = runpy.run_module("gpusup.trainer.train")
    assert {name: knob.default for name, knob in knobs.items()} == {name: variables[name] for name in knobs}
    assert all(knob.help for knob in knobs.values())
    assert {"batch_size", "global_batch_size", "compile", "dtype", "resume_from", "threads"} <= set(knobs)


def test_declared_knobs_have_defaults_and_help() -> None:
    assert list(KNOBS) == ["batch_size", "rate", "compile", "name", "tokens"]
    assert KNOBS["tokens"] == options.Knob(48, "folded")
    assert KNOBS["compile"].help == "faster"


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--rate=1", "rate", 1.0),
        ("--rate=1e-3", "rate", 1e-3),
        ("--compile=false", "compile", False),
        ("--compile=True", "compile", True),
        ("--compile=0", "compile", False),
        ("--batch_size=1_000", "batch_size", 1000),
        ("--name=a=b", "name", "a=b"),
        ("--name=", "name", ""),
    ],
)
def test_value_is_taken_from_the_command_line(argument: str, name: str, value: options.Value) -> None:
    result = parse(argument)[name]
    assert result == value
    assert type(result) is type(value)


def test_last_one_wins_when_files_and_arguments_are_mixed(tmp_path: Path) -> None:
    config = tmp_path / "small.py"
    config.write_text('"""Small."""\nbatch_size = 2\nrate = 1  # whole numbers will do\ntokens = batch_size * 10\n')
    values = parse("--batch_size=5", str(config), "--rate=0.5")
    assert (values["batch_size"], values["rate"], values["tokens"]) == (2, 0.5, 20)
    assert parse(str(config), "--batch_size=5")["batch_size"] == 5


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--bacth_size=4", "did you mean batch_size"),
        ("--batch-size=4", "did you mean batch_size"),
        ("--zzz=4", "--help lists them all"),
        ("--batch_size", "write settings as --key=value"),
        ("-batch_size=4", "write settings as --key=value"),
        ("--batch_size=1.5", "batch_size=1.5: a whole number is needed, such as 12"),
        ("--compile=maybe", "true or false is needed"),
        ("--rate=nan", "a number is needed"),
        ("--rate=fast", "a number is needed"),
        ("missing.py", "cannot read this configuration file"),
    ],
)
def test_argument_is_refused_with_a_reason(argument: str, message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        parse(argument)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bacth_size = 4", r"config\.py:2: .*did you mean batch_size"),
        ("batch_size = True", r"config\.py:2: batch_size=True: a whole number is needed"),
        ("name = 3", "a text in quotes is needed"),
        ("rate = 1 / 0", "division by zero"),
        ("name = 'a' * 10**9", "not a "),
        ("batch_size = open('x')", "is not a constant"),
        ("import os", "only assignments"),
        ("batch_size = ", "not a Python file"),
    ],
)
def test_configuration_is_refused_and_never_executed(tmp_path: Path, line: str, message: str) -> None:
    config = tmp_path / "config.py"
    config.write_text(f"# a comment\n{line}\n")
    with pytest.raises(TrainerError, match=message):
        parse(str(config))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--batch_size=0", "batch_size=0 is too small: it must be at least 1"),
        ("--dtype=float8", "dtype=float8 is not one of float32, bfloat16, float16"),
        ("--dropout=1", "dropout=1.0 must be below 1"),
        ("--n_head=5", "n_embd=384 cannot be split into n_head=5"),
        ("--resume_from=x.pt", "needs --init_from=resume"),
        ("--block_size_start=100", "never gives block_size=256"),
        ("--block_size_start=64", "block_size_warmup_iters=0 is too few"),
    ],
)
def test_settings_are_refused_when_they_make_no_sense(setting: str, message: str) -> None:
    configure = runpy.run_module("gpusup.trainer.train")["configure"]
    with pytest.raises(TrainerError, match=message):
        configure([setting])


@pytest.mark.parametrize("command", [["trainer/train.py"], ["-m", "gpusup.trainer.train"]])
def test_help_lists_every_knob_by_path_and_as_module(command: list[str]) -> None:
    shown = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert all(f"--{name}=" in shown.stdout for name in options.declared((PACKAGE / "train.py").read_text()))


def test_example_configurations_are_valid() -> None:
    configure = runpy.run_module("gpusup.trainer.train")["configure"]
    examples = [path for path in (PACKAGE / "config").glob("*.py") if path.name != "__init__.py"]
    assert examples
    for example in examples:
        configure([str(example)])
