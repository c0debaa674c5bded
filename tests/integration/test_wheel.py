"""The wheel, installed into an environment of its own, without torch; the trainer runs in the user's."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from program import FAKES, ROOT


def run(*command: str | Path, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"} | {"GPUSUP_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_wheel_in_a_plain_environment_supervises_a_trainer_of_another(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, so that what an earlier build left does not get into the wheel
    for part in ("supervisor", "trainer", "policies"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, source, folder=tmp_path)
    (wheel,) = tmp_path.glob("gpusup-*.whl")
    venv.create(tmp_path / "app", with_pip=True)
    python = tmp_path / "app" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, folder=tmp_path)
    gpusup = tmp_path / "app" / "bin" / "gpusup"
    assert run(gpusup, "--version", folder=tmp_path).startswith("gpusup ")
    assert "torch" not in run(python, "-m", "pip", "list", folder=tmp_path)
    assert "rtx4070: ok" in run(gpusup, "policy", "check", "rtx4070", folder=tmp_path)
    script = str(FAKES / "cooperating.py")
    output = run(gpusup, "run", "--python", sys.executable, "rtx4070", "--", script, "--max_iters=3", folder=tmp_path)
    assert "finished with the settings it started with" in output
