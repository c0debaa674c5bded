"""Real runs of train.py, as subprocesses, and what they left behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "trainer"
LIMITED = Path(__file__).with_name("limited.py")
DEADLINE_S = 240
# Large tensors are mapped and unmapped one by one: what a step needs does not depend on how the heap is fragmented.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}

# A model so small that a run is mostly the import of PyTorch; everything that matters to exactness is in it.
TINY = {
    "device": "cpu",
    "dtype": "float32",
    "compile": "false",
    "threads": 1,
    "vocab_size": 256,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 6,
    "gradient_accumulation_steps": 2,
    "max_iters": 20,
    "eval_interval": 0,
    "learning_rate": 1e-3,
    "lr_decay_iters": 20,
    "warmup_iters": 5,
}


@dataclass
class Run:
    """An attempt that has ended."""

    status: int
    stdout: str
    stderr: str
    events: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    @property
    def losses(self) -> dict[int, float]:
        """Loss by the number of completed steps, in full precision."""
        return {event["step"]: event["loss"] for event in self.of("step")}


class Launch:
    """Starts attempts of one run: same data, same out_dir, each with its own events."""

    def __init__(self, folder: Path, tokens: Path, package: Path = PACKAGE, **settings: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.package = folder, package
        self.out = folder / "out"
        self.settings = {**TINY, "data_dir": tokens, "out_dir": self.out, **settings}
        self.attempts = 0

    def start(
        self, budget_mb: int | None = None, env: dict[str, str] | None = None, processes: int = 1, **settings: object
    ) -> "subprocess.Popen[str]":
        self.attempts += 1
        self.events = self.folder / f"events-{self.attempts}.jsonl"
        limiter = [] if budget_mb is None else [str(LIMITED), str(budget_mb)]
        if processes > 1:
            limiter = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        options = [f"--{name}={value}" for name, value in {**self.settings, **settings}.items()]
        self.errors = self.folder / f"stderr-{self.attempts}.txt"
        with self.errors.open("w") as errors:
            return subprocess.Popen(
                [sys.executable, *limiter, str(self.package / "train.py"), *options],
                env={**os.environ, **ENVIRONMENT, "GPUSUP_EVENTS": str(self.events), **(env or {})},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=self.folder,
            )

    def finish(self, child: "subprocess.Popen[str]", read_before: str = "") -> Run:
        rest, _ = child.communicate(timeout=DEADLINE_S)
        lines = self.events.read_text().splitlines()
        return Run(child.returncode, read_before + rest, self.errors.read_text(), [json.loads(line) for line in lines])

    def run(
        self, budget_mb: int | None = None, env: dict[str, str] | None = None, processes: int = 1, **settings: object
    ) -> Run:
        return self.finish(self.start(budget_mb, env, processes, **settings))

    def signal_at(self, step: int, number: signal.Signals, processes: int = 1, **settings: object) -> Run:
        """Start, send a signal as soon as `step` is printed, wait for the end."""
        child = self.start(processes=processes, **settings)
        assert child.stdout is not None
        read = ""
        for line in child.stdout:
            read += line
            if line.startswith(f"step {step}/"):
                child.send_signal(number)
                break
        return self.finish(child, read)


def mutant(folder: Path, module: str, right: str, wrong: str) -> Path:
    """A copy of the trainer with one piece of one module replaced."""
    package = folder / "trainer"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (package / module).read_text()
    assert source.count(right) == 1, f"{right!r} is not once in {module}"
    (package / module).write_text(source.replace(right, wrong))
    return package


def assert_continues(undisturbed: Run, attempts: list[Run], tolerance: float) -> None:
    """Every loss that any attempt printed is the undisturbed run's, and together they printed all of them."""
    seen: set[int] = set()
    for attempt in attempts:
        for step, loss in attempt.losses.items():
            assert abs(loss - undisturbed.losses[step]) <= tolerance, f"step {step}: {loss} {undisturbed.losses[step]}"
            seen.add(step)
    assert seen == set(undisturbed.losses)


def kill_until_done(launch: Launch, chance: random.Random, kills: int, longest_s: float) -> tuple[list[Run], int]:
    """SIGKILL each attempt at a random moment up to `longest_s` after it began to train, `kills` times; then let it be.

    Every attempt, and how many kills came while a checkpoint was being written.
    """
    attempts: list[Run] = []
    while_saving = 0
    for _ in range(kills):
        child = launch.start(init_from="resume" if any(launch.out.glob("ckpt-*[0-9]")) else "scratch")
        assert child.stdout is not None
        begun = next((line for line in child.stdout if "M parameters" in line), "")
        time.sleep(chance.uniform(0.0, longest_s) if begun else 0.0)  # the random moment is what is tested
        child.kill()
        attempts.append(launch.finish(child, begun))
        while_saving += any(launch.out.glob("*.partial"))
        if attempts[-1].status == 0:
            break
    else:
        attempts.append(launch.run(init_from="resume"))
    return attempts, while_saving
