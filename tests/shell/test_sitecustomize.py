"""The memory budget in a trainer's own process: with the real torch, a real limit and real failed allocations."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpusup.supervisor.launch_env import BOOT

MIB = 1 << 20
BUDGET = 200 * MIB

needs_torch = pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import importlib.util as u, sys; sys.exit(not u.find_spec('torch'))"]
    ).returncode
    != 0,
    reason="torch is not installed",
)


class Python:
    """Runs scripts the way the supervisor does, under a budget."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report = folder / "budget.jsonl"

    def run(
        self, script: str, *options: str, budget: str = f"host:{BUDGET}", path: tuple[Path, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (BOOT, *path))),
            "GPUSUP_MEMORY_BUDGET": budget,
            "GPUSUP_BUDGET_REPORT": str(self.report),
            "OMP_NUM_THREADS": "2",
        }
        command = [sys.executable, *options, "-c", script]
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False
        )

    def reports(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.report.read_text().splitlines()] if self.report.exists() else []


@pytest.fixture
def python(tmp_path: Path) -> Python:
    return Python(tmp_path)


ALLOCATE = """
import os, resource, torch
print(os.getpid(), resource.getrlimit(resource.RLIMIT_DATA)[0])
fits = torch.zeros({fits}, dtype=torch.uint8)
print("fitted", flush=True)
torch.zeros({too_much}, dtype=torch.uint8)
"""


@needs_torch
@pytest.mark.parametrize(
    "before",
    ["", "import importlib.util; importlib.util.find_spec('torch')\n", "from torch import nn\n"],
    ids=["imported", "looked for first", "by a part of it"],
)
def test_training_beyond_the_budget_fails_in_pytorchs_own_words(python: Python, before: str) -> None:
    done = python.run(before + ALLOCATE.format(fits=BUDGET // 2, too_much=BUDGET))
    assert done.returncode == 1
    first, *rest = done.stdout.splitlines()
    assert rest == ["fitted"], done.stderr
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate 209715200 bytes" in done.stderr
    pid, limit = (int(word) for word in first.split())
    [report] = python.reports()
    assert (report["pid"], report["where"], report["limit_bytes"]) == (pid, "host", limit)
    assert report["baseline_bytes"] == limit - BUDGET


@needs_torch
def test_isolated_python_ignores_the_budget_and_so_reports_none(python: Python) -> None:
    done = python.run(ALLOCATE.format(fits=1, too_much=BUDGET + MIB), "-I")
    assert done.returncode == 0, done.stderr
    assert python.reports() == []


@needs_torch
def test_budget_of_a_device_that_is_never_used_is_not_reported(python: Python) -> None:
    script = "import torch; assert not torch.cuda.is_initialized(); torch.ones(3).sum()"
    done = python.run(script, budget=f"device:{BUDGET}")
    assert (done.returncode, done.stderr) == (0, "")
    assert python.reports() == [], "the supervisor must be able to see that it is not in force"


def test_program_without_torch_is_left_alone(python: Python) -> None:
    script = "import sys, resource; print('torch' in sys.modules, resource.getrlimit(resource.RLIMIT_DATA)[0])"
    done = python.run(script)
    assert done.stderr == ""
    assert done.stdout.split() == ["False", "-1"]
    assert python.reports() == []


def test_without_a_budget_nothing_is_hooked(python: Python) -> None:
    done = python.run(
        "import sys; print([type(f).__name__ for f in sys.meta_path if not isinstance(f, type)])", budget=""
    )
    assert "AfterImport" not in done.stdout
    assert done.stderr == ""


def test_sitecustomize_that_was_there_before_still_runs(python: Python, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text("import sys\nsys.theirs = (__name__, __file__)\n")
    done = python.run("import sys, sitecustomize; print(sys.theirs, sitecustomize.__file__)", path=(theirs,))
    assert done.stderr == ""
    assert done.stdout.count(str(theirs / "sitecustomize.py")) == 2
    assert "'sitecustomize'" in done.stdout


def test_sitecustomize_of_theirs_that_fails_fails_as_it_always_did(python: Python, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text("raise RuntimeError('theirs')\n")
    done = python.run("print('on')", path=(theirs,))
    assert done.stdout == "on\n", "python reports it and goes on"
    assert "RuntimeError: theirs" in done.stderr


def test_missing_torch_is_told_as_always(python: Python, tmp_path: Path) -> None:
    done = python.run("import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; import torch")
    assert "ModuleNotFoundError: No module named 'torch'" in done.stderr


def test_budget_leaves_the_current_device_as_it_was() -> None:
    """PyTorch makes the device whose fraction is set the current one; `cuda` would then mean the last."""
    current, queued = [0], []
    cuda = SimpleNamespace(
        _lazy_call=queued.append,
        device_count=lambda: 3,
        get_device_properties=lambda device: SimpleNamespace(total_memory=4 * BUDGET),
        set_per_process_memory_fraction=lambda fraction, device: current.__setitem__(0, device),
        current_device=lambda: current[0],
        set_device=lambda device: current.__setitem__(0, device),
    )
    spec = importlib.util.spec_from_file_location("boot", BOOT / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    boot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(boot)
    boot.limit_device(SimpleNamespace(cuda=cuda), BUDGET)
    [apply] = queued
    apply()
    assert current == [0]
