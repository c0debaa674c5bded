"""`gpusup diagnose`: any log, from any trainer, whatever bytes are in it."""

import json

import click.testing
import jsonschema
import pytest
from gpusup.supervisor.cli import main
from hypothesis import given, settings
from hypothesis import strategies as st
from program import ROOT, Gpusup

GIB = 1 << 30
OOM = """iter 672: loss 3.1, time 20ms
Traceback (most recent call last):
  File "train.py", line 90, in <module>
    scaler.scale(loss).backward()
  File "/env/torch/_tensor.py", line 5, in backward
    torch.autograd.backward(self)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.54 GiB. GPU 0 has a total capacity of \
11.60 GiB of which 512.00 MiB is free. Including non-PyTorch memory, this process has 11.00 GiB memory \
in use. Of the allocated memory 10.25 GiB is allocated by PyTorch, and 96.00 MiB is reserved by PyTorch but unallocated.
"""


def told(gpusup: Gpusup, text: str, *options: str) -> dict[str, object]:
    (gpusup.folder / "night.log").write_text(text)
    done = gpusup("diagnose", "night.log", "--json", *options)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    jsonschema.validate(content, json.loads((ROOT / "supervisor/schemas/diagnosis-v1.json").read_text()))
    assert isinstance(content, dict)
    return content


def test_oom_is_told_with_its_numbers_and_what_to_try(gpusup: Gpusup) -> None:
    found = told(gpusup, OOM)
    assert (found["kind"], found["cause"], found["is_oom"], found["fatal"]) == ("device_oom", "own_growth", True, True)
    assert (found["phase"], found["confidence"], found["sources"]) == ("backward", "medium", ["output"])
    numbers = found["numbers"]
    assert isinstance(numbers, dict)
    assert (numbers["tried_to_allocate_bytes"], numbers["free_bytes"]) == (round(1.54 * GIB), GIB // 2)
    assert found["remedy"] == "shrink"
    text = gpusup("diagnose", "night.log").stdout
    assert text.startswith("out of GPU memory in backward (own growth)\n")
    assert "  tried to allocate          1.54 GiB\n" in text
    assert "micro-batch" in text


def test_exit_status_makes_it_more_certain_and_decides_where_text_cannot(gpusup: Gpusup) -> None:
    assert told(gpusup, OOM, "--exit-code", "1")["confidence"] == "high"
    assert told(gpusup, OOM, "--exit-code", "0")["kind"] == "success"
    steps = "iter 1: loss 3.0\niter 2: loss 2.9\n"
    assert told(gpusup, steps)["kind"] == "no_failure"
    for killed in (["--signal", "9"], ["--signal", "sigkill"], ["--exit-code", "137"]):
        assert told(gpusup, steps, *killed)["is_oom"] == "suspected"
    assert told(gpusup, steps, "--signal", "TERM")["kind"] == "stopped"


def test_several_logs_are_one_run(gpusup: Gpusup) -> None:
    (gpusup.folder / "rank0.log").write_text("[rank0]: Connection closed by peer\n")
    (gpusup.folder / "rank1.log").write_text(OOM)
    done = gpusup("diagnose", "rank1.log", "rank0.log", "--json")
    assert json.loads(done.stdout)["kind"] == "device_oom"


def test_log_from_standard_input_is_read() -> None:
    runner = click.testing.CliRunner()
    from gpusup.supervisor.commands.diagnose import command

    done = runner.invoke(command, ["-", "--json"], input=OOM)
    assert json.loads(done.output)["kind"] == "device_oom"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.log"], "missing.log"),
        (["."], "Is a directory"),
        ([], "Missing argument 'LOG...'"),
        (["log", "--signal", "SIGWHAT"], "--signal SIGWHAT: no such signal"),
        (["log", "--signal", "9", "--exit-code", "1"], "not both"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(gpusup: Gpusup, words: list[str], said: str) -> None:
    (gpusup.folder / "log").write_text("")
    done = gpusup("diagnose", *words)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_escape_sequences_of_a_log_reach_no_terminal(gpusup: Gpusup) -> None:
    (gpusup.folder / "log").write_text("\x1b]0;owned\x07ValueError: \x1b[31mred\x9b2J\x1b[0m\n")
    assert "\x1b" not in gpusup("diagnose", "log").stdout
    assert "\x9b" not in gpusup("diagnose", "log").stdout


FRAGMENTS = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([line.encode() + b"\n" for line in OOM.splitlines()]),
    st.sampled_from(
        [
            b"\x00",
            b"\r",
            b"\xff\xfe",
            b"[rank3]: ",
            b"Traceback (most recent call last):\n",
            b'{"a": "',
            b"\x1b[",
            b"Killed\n",
        ]
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(FRAGMENTS, max_size=12), st.sampled_from([[], ["--json"]]))
def test_no_bytes_make_it_fail(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], options: list[str]
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "log"
    path.write_bytes(b"".join(parts))
    assert main(["diagnose", str(path), *options]) == 0
