"""What a trainer finds in its environment."""

import os
from pathlib import Path

import pytest
from gpusup.supervisor.core.events import RunCreated
from gpusup.supervisor.core.policy import Policy
from gpusup.supervisor.launch_env import BOOT, environment
from gpusup.supervisor.run_store import RunDirectory
from msgspec.structs import replace

RUN = RunCreated(
    run_id="abc",
    name="x",
    policy_name="p",
    policy=Policy(),
    command=("x",),
    args_from=1,
    interpreter="",
    cwd="/",
    dialect="generic",
    settings={},
)


def test_promises_of_the_cooperation_protocol_are_kept(tmp_path: Path) -> None:
    found = environment(RUN, RunDirectory(tmp_path / "abc"), 3)
    assert found["GPUSUP_RUN_ID"] == "abc"
    assert found["GPUSUP_ATTEMPT"] == "3"
    assert found["GPUSUP_EVENTS"] == str(tmp_path / "abc" / "attempts" / "003" / "events.jsonl")
    assert found["PYTHONUNBUFFERED"] == "1"


def test_persons_own_environment_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/my/cache")
    found = environment(RUN, RunDirectory(tmp_path / "abc"), 1)
    assert (found["WANDB_MODE"], found["PYTHONPATH"]) == ("offline", f"{BOOT}{os.pathsep}/mine")
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/my/cache"
    assert "GPUSUP_MEMORY_BUDGET" not in found


def test_budget_comes_first_on_the_python_path_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    run = replace(RUN, memory_budget_bytes=1000, budget_where="host")
    found = environment(run, RunDirectory(tmp_path / "abc"), 1)
    assert found["PYTHONPATH"] == f"{BOOT}{os.pathsep}/mine"
    assert found["GPUSUP_MEMORY_BUDGET"] == "host:1000"
    monkeypatch.delenv("PYTHONPATH")
    assert environment(run, RunDirectory(tmp_path / "abc"), 1)["PYTHONPATH"] == str(BOOT), (
        "no empty entry: that is the cwd"
    )


def test_choice_of_gpu_stays_the_persons_and_is_counted_as_nvml_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # of the shell that resumes the run
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    run = replace(RUN, gpu_uuid="GPU-1", trains_on="gpu", cuda_visible_devices="1")
    found = environment(run, RunDirectory(tmp_path), 1)
    assert (found["CUDA_VISIBLE_DEVICES"], found["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    assert environment(run, RunDirectory(tmp_path), 1)["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    assert "CUDA_VISIBLE_DEVICES" not in environment(RUN, RunDirectory(tmp_path), 1)
