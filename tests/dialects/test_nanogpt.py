"""nanoGPT's spelling, its traps, and that its files are read and never run."""

import subprocess
import sys
from pathlib import Path

import pytest
from gpusup.supervisor.core.policy import Settings
from gpusup.supervisor.dialects.base import Reading, with_option
from gpusup.supervisor.dialects.command import Command, parse_command
from gpusup.supervisor.dialects.detect import DIALECTS, detect
from gpusup.supervisor.errors import UsageError
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
NANOGPT = DIALECTS["nanogpt"]
REFERENCE = DIALECTS["reference"]

TRAIN = """\
import os
import time

import torch

out_dir = 'out'
eval_interval = 2000
always_save_checkpoint = True # if True, always save a checkpoint after each eval
init_from = 'scratch' # 'scratch' or 'resume' or 'gpt2*'
gradient_accumulation_steps = 5 * 8 # used to simulate larger batch sizes
batch_size = 12 # if gradient_accumulation_steps > 1, this is the micro-batch size
block_size = 1024
max_iters = 600000 # total number of training iterations
device = 'cuda' # examples: 'cpu', 'cuda', 'cuda:0', 'cuda:1' etc., or try 'mps' on macbooks
dtype = 'bfloat16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'float16'
compile = True # use PyTorch 2.0 to compile the model to be faster
# -----------------------------------------------------------------------------
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open('configurator.py').read()) # overrides from command line or config file
config = {k: globals()[k] for k in config_keys}
# -----------------------------------------------------------------------------
batch_size = 999 # what comes after the overrides is not a setting
open('executed', 'w').close()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "config").mkdir()
    return tmp_path


def command(folder: Path, *arguments: str) -> Command:
    return parse_command(("train.py", *arguments), str(folder), sys.executable)


def read(folder: Path, *arguments: str) -> Reading:
    return NANOGPT.read(command(folder, *arguments))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_defaults_are_read_without_running_the_script(folder: Path) -> None:
    reading = read(folder)
    assert reading.settings == {
        "batch_size": 12,
        "gradient_accumulation_steps": 40,
        "compile": True,
        "block_size": 1024,
    }
    assert reading.global_batch_size == 480
    assert reading.target_steps == 600001, "it counts from 0 and leaves after max_iters"
    assert reading.checkpoints.every_steps == 2000
    assert reading.checkpoints.place == str(folder / "out")
    assert reading.checkpoints.replays_data
    assert not reading.checkpoints.can_save_on_request
    assert not (folder / "executed").exists()


def test_dtype_that_asks_the_machine_is_unknown_with_its_place_and_reason(folder: Path) -> None:
    reading = read(folder)
    assert "dtype" not in reading.settings
    origin = reading.origins["dtype"]
    assert origin.value is None
    line = next(n for n, text in enumerate(TRAIN.splitlines(), 1) if text.startswith("dtype"))
    assert origin.where == f"train.py:{line}"
    assert "torch.cuda.is_available()" in origin.why_unknown


def test_config_files_and_overrides_are_applied_from_left_to_right(folder: Path) -> None:
    (folder / "config" / "a.py").write_text("batch_size = 6\ndtype = 'float32'\neval_interval = 5 * 5\n")
    (folder / "config" / "b.py").write_text("batch_size = 4\nout_dir = 'b' + '-out'\n")
    assert read(folder, "config/a.py", "--batch_size=3").settings["batch_size"] == 3
    assert read(folder, "--batch_size=3", "config/a.py").settings["batch_size"] == 6
    both = read(folder, "config/a.py", "config/b.py", "--batch_size=8", "--batch_size=2")
    assert both.settings["batch_size"] == 2
    assert both.settings["dtype"] == "float32"
    assert both.checkpoints.every_steps == 25
    assert both.checkpoints.place == str(folder / "b-out")
    assert both.origins["batch_size"].where == "command line: --batch_size=2"
    assert both.origins["dtype"].where == "config/a.py:2"


def test_config_may_calculate_with_what_is_known_already(folder: Path) -> None:
    (folder / "config" / "a.py").write_text("batch_size = batch_size // 2\ngradient_accumulation_steps *= 2\n")
    reading = read(folder, "config/a.py")
    assert reading.settings["batch_size"] == 6
    assert "gradient_accumulation_steps" not in reading.settings
    assert reading.global_batch_size is None, "half known is unknown"


def test_branches_and_loops_of_a_config_are_unknown(folder: Path) -> None:
    source = "if True:\n    batch_size = 1\nfor block_size in (1, 2):\n    pass\ncompile, dtype = False, 'float32'\n"
    (folder / "config" / "a.py").write_text(source)
    reading = read(folder, "config/a.py")
    assert reading.settings == {"gradient_accumulation_steps": 40}
    assert reading.origins["batch_size"].where == "config/a.py:1"


@pytest.mark.parametrize("statement", ["from base import *", "exec(open('base.py').read())"])
def test_config_that_takes_in_another_file_leaves_nothing_guessed(folder: Path, statement: str) -> None:
    (folder / "config" / "a.py").write_text(f"batch_size = 7\n{statement}\ncompile = False\n")
    reading = read(folder, "config/a.py")
    assert reading.settings == {"compile": False}
    assert reading.global_batch_size is None


def test_config_with_side_effects_is_not_run(folder: Path) -> None:
    (folder / "config" / "a.py").write_text("open('config-ran', 'w')\nimport os; os.mkdir('x')\nbatch_size = 5\n")
    assert read(folder, "config/a.py").settings["batch_size"] == 5
    assert sorted(path.name for path in folder.iterdir()) == ["config", "train.py"]


def test_missing_config_is_refused_with_its_name(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"config/none\.py: No such file.*the trainer reads it as a config file"):
        read(folder, "config/none.py")


def test_override_typed_with_a_space_is_refused_as_the_trainer_would(folder: Path) -> None:
    with pytest.raises(UsageError, match="6: No such file"):
        read(folder, "--batch_size", "6")


def test_broken_config_is_refused_with_its_line(folder: Path) -> None:
    (folder / "config" / "a.py").write_text("batch_size = 1\nbatch_size = = 2\n")
    with pytest.raises(UsageError, match=r"config/a\.py:2: not valid Python"):
        read(folder, "config/a.py")


def test_expression_that_would_blow_up_is_unknown(folder: Path) -> None:
    (folder / "config" / "a.py").write_text("batch_size = 9**9**9\nblock_size = 1 // 0\ndtype = 'x' * 10**10\n")
    reading = read(folder, "config/a.py")
    assert {"batch_size", "block_size", "dtype"}.isdisjoint(reading.settings)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--dtype=float16", "float16"),
        ("--dtype='float16'", "float16"),
        ("--compile=False", False),
        ("--out_dir=a=b", True),
    ],
)
def test_override_has_the_value_the_trainer_gives_it(folder: Path, argument: str, value: object) -> None:
    reading = read(folder, argument)
    knob = argument[2:].partition("=")[0]
    if knob == "out_dir":
        assert reading.checkpoints.place == str(folder / "a=b")
    else:
        assert reading.settings[knob] == value


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_dtype_has_no_effect_off_the_gpu(folder: Path, device: str) -> None:
    assert "dtype" in read(folder, f"--device={device}").no_effect
    assert read(folder, "--device=cuda:1").no_effect == {}


def test_checkpoint_only_when_the_loss_improves_is_warned_of(folder: Path) -> None:
    assert read(folder).warnings == ()
    assert "only when the validation loss improves" in read(folder, "--always_save_checkpoint=False").warnings[0]


def test_accumulation_is_shared_among_the_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "torchrun").write_text("#!/bin/sh\n")
    (folder / "torchrun").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    launched = parse_command(("torchrun", "--nproc_per_node=8", "train.py", "--batch_size=6"), str(folder))
    reading = NANOGPT.read(launched)
    assert reading.accumulation_multiple == 8
    assert reading.settings["batch_size"] == 6


NUMBERS = st.integers(1, 64)


@given(
    st.lists(
        st.one_of(
            st.builds("--batch_size={}".format, NUMBERS),
            st.builds("--gradient_accumulation_steps={}".format, NUMBERS),
            st.sampled_from(["--compile=True", "--compile=False", "--dtype=float32", "--dtype=float16"]),
        ),
        max_size=6,
    ),
    st.fixed_dictionaries({}, optional={"batch_size": NUMBERS, "compile": st.booleans(), "dtype": st.just("bfloat16")}),
)
def test_rewritten_command_says_exactly_the_settings_wanted(typed: list[str], changed: Settings) -> None:
    """Read back as the trainer reads it: last wins, and no knob that was changed is there twice."""
    base = ("python", "train.py")
    argv = NANOGPT.argv((*base, *typed), 2, changed, "/copies/ckpt-5.pt")
    assert argv[:2] == base
    told = [token[2:].partition("=") for token in argv[2:]]
    last = {key: value for key, _, value in told}
    before = {key: value for key, _, value in (token[2:].partition("=") for token in typed)}
    assert last == {**before, **{knob: str(value) for knob, value in changed.items()}, "init_from": "resume"}
    for knob in (*changed, "init_from"):
        assert [key for key, _, _ in told].count(knob) == 1


# --- writing ----------------------------------------------------------------------------------------------------------


def test_option_takes_the_place_of_the_last_one_and_duplicates_go() -> None:
    assert with_option(("a.py", "--x=1", "--y=2", "--x=3", "b.py"), "x", 4) == (
        "a.py",
        "--y=2",
        "b.py",
        "--x=4",
    ), "a config file after the option would take it back"
    assert with_option(("a.py", "--x=1", "--y=2"), "x", 4) == ("a.py", "--x=4", "--y=2")
    assert with_option(("a.py",), "x", False) == ("a.py", "--x=False")
    assert with_option(("--xy=1",), "x", True) == ("--xy=1", "--x=True")
    assert with_option(("--x=a=b",), "x", "c=d") == ("--x=c=d",)


def test_first_start_does_not_resume(folder: Path) -> None:
    typed = command(folder, "config/a.py", "--init_from=scratch")
    assert NANOGPT.argv(typed.argv, typed.args_from, {}, None) == typed.argv
    resumed = NANOGPT.argv(typed.argv, typed.args_from, {}, "/x/ckpt.pt")
    assert resumed[-2:] == ("config/a.py", "--init_from=resume")


def test_checkpoint_cadence_is_the_evaluations_and_these_get_shorter(folder: Path) -> None:
    typed = command(folder, "--eval_interval=2000")
    argv = NANOGPT.with_cadence(typed.argv, typed.args_from, 25)
    assert argv[typed.args_from :] == ("--eval_interval=25", "--eval_iters=20", "--always_save_checkpoint=True")


CONFIGURATOR = """
import sys
from ast import literal_eval
for arg in sys.argv[1:]:
    if '=' not in arg:
        assert not arg.startswith('--')
        exec(open(arg).read())
    else:
        assert arg.startswith('--')
        key, val = arg.split('=')
        key = key[2:]
        if key in globals():
            try:
                attempt = literal_eval(val)
            except (SyntaxError, ValueError):
                attempt = val
            assert type(attempt) == type(globals()[key])
            globals()[key] = attempt
        else:
            raise ValueError(f"Unknown config key: {key}")
"""


def test_script_really_takes_the_rewritten_command(folder: Path) -> None:
    """Its overrides are strict about types: every value written must be of the type it had."""
    body = TRAIN.replace("import torch\n", "").split("open('executed'")[0].replace("batch_size = 999", "#")
    body = "\n".join("dtype = 'bfloat16'" if line.startswith("dtype") else line for line in body.splitlines())
    (folder / "train.py").write_text(
        body + "\nprint(batch_size, gradient_accumulation_steps, dtype, compile, init_from)"
    )
    (folder / "configurator.py").write_text(CONFIGURATOR)
    (folder / "config" / "a.py").write_text("batch_size = 10\n")
    typed = command(folder, "config/a.py", "--compile=True")
    changed: Settings = {"batch_size": 8, "gradient_accumulation_steps": 60, "dtype": "float16", "compile": False}
    argv = NANOGPT.argv(typed.argv, typed.args_from, changed, "/x/ckpt.pt")
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "8 60 float16 False resume\n", done.stderr


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("iter 0: loss 10.9012, time 31234.12ms, mfu -100.00%", 1),
        ("iter 1234: loss 2.8431, time 135.12ms, mfu 23.11%", 1235),
        ("iter 7: loss nan, time 135.12ms, mfu 23.11%", 8),
        ("iter 7: loss 1e-05, time 135.12ms, mfu 23.11%", 8),
    ],
)
def test_iteration_printed_is_one_step_more_completed(line: str, step: int) -> None:
    seen = NANOGPT.parse(line)
    assert seen is not None
    assert seen.step == step


@pytest.mark.parametrize(
    "line",
    [
        "step 2000: train loss 2.1, val loss 2.2",
        "saving checkpoint to out",
        "  iter 5: loss 1.0, time 1.00ms, mfu 1%",
        "the log said iter 5: loss 1.0, time 1.00ms",
        "iter 5: loss abc, time 1.00ms",
        "iter 5",
        "",
    ],
)
def test_other_lines_are_no_progress(line: str) -> None:
    assert NANOGPT.parse(line) is None


# --- whose dialect ----------------------------------------------------------------------------------------------------


def test_nanogpt_is_known_by_its_source(folder: Path) -> None:
    assert detect(command(folder)).name == "nanogpt"


def test_own_trainer_is_known_by_path_and_as_a_module() -> None:
    assert detect(parse_command(("trainer/train.py",), str(ROOT), sys.executable)).name == "reference"
    by_module = parse_command((sys.executable, "-m", "gpusup.trainer.train", "--max_iters=9"), "/")
    assert detect(by_module).name == "reference"
    assert by_module.arguments == ("--max_iters=9",)


def test_other_scripts_are_generic_and_left_alone(folder: Path) -> None:
    (folder / "other.py").write_text("print('configurator')\ninit = 1\n")
    other = parse_command(("other.py", "--batch_size=4"), str(folder), sys.executable)
    dialect = detect(other)
    assert dialect.name == "generic"
    assert dialect.read(other).settings == {}
    assert dialect.argv(other.argv, 2, {"batch_size": 2}, "x") == other.argv
    assert dialect.with_cadence(other.argv, 2, 5) == other.argv
    assert detect(parse_command(("/bin/sh", "-c", "true"), "/")).name == "generic"


def test_reference_trainer_is_read_and_resumed_from_a_file(tmp_path: Path) -> None:
    typed = parse_command(
        ("trainer/train.py", "trainer/config/tiny_cpu.py", "--max_iters=50"), str(ROOT), sys.executable
    )
    reading = REFERENCE.read(typed)
    assert (reading.settings["batch_size"], reading.settings["gradient_accumulation_steps"]) == (12, 4)
    assert (reading.settings["dtype"], reading.settings["compile"]) == ("float32", False)
    assert (reading.global_batch_size, reading.target_steps, reading.device) == (48, 50, "cpu")
    assert reading.checkpoints.can_save_on_request
    argv = REFERENCE.argv(typed.argv, typed.args_from, {"batch_size": 6}, "/c/ckpt-7.pt")
    assert argv[-3:] == ("--batch_size=6", "--init_from=resume", "--resume_from=/c/ckpt-7.pt")
    assert REFERENCE.with_cadence(typed.argv, typed.args_from, 5)[-1] == "--checkpoint_interval=5"


def test_reference_trainer_resumes_from_the_newest_checkpoint_with_a_manifest(tmp_path: Path) -> None:
    typed = parse_command((f"{ROOT}/trainer/train.py", "--init_from=resume"), str(tmp_path), sys.executable)
    assert REFERENCE.read(typed).resumes_from is None
    for step in (20, 30):
        (tmp_path / "out" / f"ckpt-{step:08d}").mkdir(parents=True)
        (tmp_path / "out" / f"ckpt-{step:08d}" / "state.safetensors").touch()
    assert REFERENCE.read(typed).resumes_from is None, "without a manifest it is no checkpoint"
    (tmp_path / "out" / "ckpt-00000020" / "manifest.json").touch()
    assert REFERENCE.read(typed).resumes_from == str(tmp_path / "out" / "ckpt-00000020")
    named = parse_command((*typed.argv, "--resume_from=out/ckpt-7"), str(tmp_path))
    assert REFERENCE.read(named).resumes_from == str(tmp_path / "out" / "ckpt-7")
