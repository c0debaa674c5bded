"""`gpusup doctor`: what it finds on machines that are not this one, made with real libraries and interpreters."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from program import FAKES, Gpusup

TRAIN = FAKES / "nanogpt_like" / "train.py"


def python_that_answers(folder: Path, **answer: object) -> str:
    """An interpreter that says this of its packages."""
    path = folder / "python"
    told = {"python": "3.11.7", "torch": "2.13.0", "cuda": "13.0", "hip": None, "transformers": None, "devices": 1}
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps({**told, **answer})}\nEND\n")
    path.chmod(0o755)
    return str(path)


def found(gpusup: Gpusup, *words: str) -> tuple[int, list[dict[str, Any]]]:
    done = gpusup("doctor", "--json", *words)
    assert not done.stderr
    return done.returncode, json.loads(done.stdout)


def of_topic(findings: list[dict[str, Any]], topic: str) -> list[tuple[str, str]]:
    return [(finding["level"], finding["what"]) for finding in findings if finding["topic"] == topic]


def test_card_driver_and_who_holds_its_memory_are_named(gpusup: Gpusup, library: Path) -> None:
    gpusup.environment |= {"LD_LIBRARY_PATH": str(library)}
    code, findings = found(gpusup)
    card, holder = of_topic(findings, "gpu")
    assert card == ("ok", "Stub RTX 4070: 12.00 GiB, 11.00 GiB free; driver 560.35.03")
    assert holder[0] == "warning"
    assert holder[1].endswith("holds 1.00 GiB")
    assert code == 0, "warnings are no failure"


def test_lost_card_is_a_failure_that_is_said(gpusup: Gpusup, library: Path) -> None:
    (gpusup.folder / "state").write_text("absent")
    gpusup.environment |= {"LD_LIBRARY_PATH": str(library), "NVML_STUB": str(gpusup.folder / "state")}
    _, findings = found(gpusup)
    (gpu,) = of_topic(findings, "gpu")
    assert gpu[1].startswith("NVML does not answer")


@pytest.mark.parametrize(("version", "warned"), [("4.35.2", 0), ("4.36.0", 1), ("5.1.0", 1), ("5.2.0", 0), (None, 0)])
def test_transformers_that_undo_a_smaller_batch_are_warned_of(gpusup: Gpusup, version: str | None, warned: int) -> None:
    python = python_that_answers(gpusup.folder, transformers=version)
    _, findings = found(gpusup, "--python", python, "--", str(TRAIN))
    assert len(of_topic(findings, "transformers")) == warned


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"torch": None}, "cannot import torch"),
        ({"torch": None, "error": "OSError: libcudnn.so.9"}, "libcudnn.so.9"),
        ({"unsupported": "sm_120"}, "was not built for the card (sm_120)"),
    ],
)
def test_pytorch_that_cannot_work_is_a_failure(gpusup: Gpusup, answer: dict[str, object], said: str) -> None:
    code, findings = found(gpusup, "--python", python_that_answers(gpusup.folder, **answer), "--", str(TRAIN))
    assert code == 1
    assert any(level == "failure" and said in what for level, what in of_topic(findings, "torch"))


def test_python_that_does_not_answer_is_a_failure(gpusup: Gpusup) -> None:
    path = gpusup.folder / "python"
    path.write_text("#!/bin/sh\nexit 3\n")
    path.chmod(0o755)
    code, findings = found(gpusup, "--python", str(path), "--", str(TRAIN))
    assert code == 1
    assert of_topic(findings, "torch")[0][0] == "failure"


def test_pytorch_without_a_gpu_where_there_is_one_is_a_failure(gpusup: Gpusup, library: Path) -> None:
    gpusup.environment |= {"LD_LIBRARY_PATH": str(library)}
    python = python_that_answers(gpusup.folder, cuda=None, devices=0)
    code, findings = found(gpusup, "--python", python, "--", str(TRAIN))
    assert code == 1
    assert ("failure", "there is a GPU, and this PyTorch sees none") in of_topic(findings, "torch")


def test_run_is_looked_at_too(gpusup: Gpusup) -> None:
    _, findings = found(gpusup, "--python", sys.executable, "--", str(TRAIN))
    assert of_topic(findings, "cadence")
    assert of_topic(findings, "checkpoints")
    text = gpusup("doctor", "--", str(TRAIN)).stdout
    assert "a failure can cost" in text
    assert text.splitlines()[-1].startswith("failures: ")
