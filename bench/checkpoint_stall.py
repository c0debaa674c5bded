"""What saving a checkpoint costs training: ours beside `torch.save` in the loop, on a 30 M-parameter GPT-2 on the CPU.

    python bench/checkpoint_stall.py [--saves=8] [--steps=5] [--only=ours] [--folder=/tmp]

Stall of a save = the call itself + what the following steps took longer than as many undisturbed ones just before. The
two ways alternate; the figures are medians over the saves, with quartiles.
"""

import argparse
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpusup.trainer import snapshot
from gpusup.trainer.checkpoint import Checkpointer
from gpusup.trainer.model import GPT, Shape
from gpusup.trainer.rng import RngState

ROWS, TOKENS = 12, 256
SHAPE = Shape(n_layer=6, n_head=6, n_embd=384, block_size=TOKENS, vocab_size=50304, bias=False)


class Training:
    """The model, its optimizer and one batch; `step` is a whole optimizer step."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        torch.set_num_threads(2)
        self.model = GPT(SHAPE, dropout=0.0)
        self.optimizer = torch.optim.AdamW(self.model.decay_groups(0.1), lr=1e-4, fused=True)
        self.batch = torch.randint(0, SHAPE.vocab_size, (2, ROWS, TOKENS))

    def step(self, before_update: Callable[[], None]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        (self.model(*self.batch) / (ROWS * TOKENS)).backward()
        before_update()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


class TorchSave:
    """The way most training loops do it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ckpt.pt"

    def save(self, training: Training, step: int) -> None:
        content = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict(), "step": step}
        torch.save(content, self.path)

    def before_update(self) -> None:
        pass


class Ours:
    def __init__(self, folder: Path) -> None:
        self.checkpointer = Checkpointer(folder)
        self.update_s = 0.0
        self.durable_s: list[float] = []

    def save(self, training: Training, step: int) -> None:
        tensors = snapshot.tensors(training.model, training.optimizer)
        self.checkpointer.save(step, tensors, {"rng": RngState(torch.device("cpu")).to_json()})

    def before_update(self) -> None:
        begin_s = time.perf_counter()
        self.checkpointer.before_update()
        self.update_s += time.perf_counter() - begin_s
        self.durable_s += [saved.write_s for saved in self.checkpointer.poll()]


def timed_s(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def quartiles(values: list[float]) -> str:
    """Median and quartiles of seconds, in milliseconds."""
    if len(values) < 2:
        return f"{values[0] * 1000:>6.0f}"
    low, middle, high = (1000 * value for value in statistics.quantiles(values, n=4, method="inclusive"))
    return f"{middle:>6.0f} ({low:.0f} to {high:.0f})"


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", choices=("ours", "torch.save"))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()

    training = Training()
    for _ in range(3):
        training.step(lambda: None)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    ours = Ours(folder / "ours")
    ways: dict[str, TorchSave | Ours] = {"torch.save": TorchSave(folder), "ours": ours}
    ways = {name: way for name, way in ways.items() if options.only in (None, name)}
    calls: dict[str, list[float]] = {name: [] for name in ways}
    stalls: dict[str, list[float]] = {name: [] for name in ways}
    updates: list[float] = []
    steps_s: list[float] = []
    before_mb = peak_mb()
    try:
        for save in range(options.saves):
            for name, way in ways.items():
                undisturbed_s = [timed_s(lambda: training.step(lambda: None)) for _ in range(options.steps)]
                ours.update_s = 0.0
                call_s = timed_s(lambda: way.save(training, save))  # noqa: B023
                after_s = [timed_s(lambda: training.step(way.before_update)) for _ in range(options.steps)]  # noqa: B023
                calls[name].append(call_s)
                stalls[name].append(call_s + sum(after_s) - sum(undisturbed_s))
                steps_s += undisturbed_s
                if way is ours:
                    updates.append(ours.update_s)
        ours.checkpointer.wait()
        size_mb = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    finally:
        shutil.rmtree(folder)
    print(
        f"{size_mb / (2 * ('ours' in ways) + ('torch.save' in ways)):.0f} MB a checkpoint, {options.saves} saves each,"
    )
    print(f"undisturbed step {quartiles(steps_s)} ms; milliseconds, median (quartiles)")
    print(f"{'':<12} {'the call':<24} {'stall, call + ' + str(options.steps) + ' steps':<24}")
    for name in ways:
        print(f"{name:<12} {quartiles(calls[name]):<24} {quartiles(stalls[name]):<24}")
    if updates:
        print(f"ours: before_update {quartiles(updates)}; durable after {quartiles(ours.durable_s)}")
        print(f"peak memory {before_mb:.0f} MB before the first save, {peak_mb():.0f} MB after the last")
    if len(ways) == 2:
        ratio = statistics.median(stalls["ours"]) / statistics.median(stalls["torch.save"])
        print(f"ours / torch.save: {ratio:.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
