"""What saving a checkpoint costs training: ours beside `torch.save` in the loop, on a 30 M-parameter GPT-2 on the CPU.

    python bench/checkpoint_stall.py [--saves=12] [--steps=5]

Stall of a save = the call itself + what the following steps took longer than undisturbed ones just before (their
median). The two ways alternate; the figures are medians over the saves, with quartiles.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpusup.trainer import snapshot
from gpusup.trainer.checkpoint import Checkpointer
from gpusup.trainer.model import GPT, Shape
from gpusup.trainer.optimizer import AdamW
from gpusup.trainer.rng import RngState
from table import header, row

ROWS, TOKENS = 4, 256
SHAPE = Shape(n_layer=6, n_head=6, n_embd=384, block_size=TOKENS, vocab_size=50304, bias=False)


class Training:
    """The model, its optimizer and one batch; `step` is a whole optimizer step."""

    def __init__(self) -> None:
        torch.set_num_threads(2)
        self.model = GPT.new(SHAPE, 0.0, torch.device("cpu"), seed=1)
        self.optimizer = AdamW(self.model.decay_groups(0.1), 1e-4, (0.9, 0.95))
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
        self.updates_s: list[float] = []
        self.durable_s: list[float] = []

    def save(self, training: Training, step: int) -> None:
        self.updates_s.append(0.0)
        tensors = snapshot.tensors(training.model, training.optimizer)
        self.checkpointer.save(step, tensors, {"rng": RngState(torch.device("cpu")).to_json()})

    def before_update(self) -> None:
        begin_s = time.perf_counter()
        self.checkpointer.before_update()
        self.updates_s[-1] += time.perf_counter() - begin_s
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


@dataclass
class Stalls:
    """What was measured of one way, in seconds, of each save."""

    calls_s: list[float] = field(default_factory=list)
    stalls_s: list[float] = field(default_factory=list)


def measure(saves: int, steps: int, folder: Path, training: Training) -> tuple[Stalls, Stalls, Ours]:
    """(torch.save's, ours, how ours saves): the two in turn, `saves` times each."""
    ours = Ours(folder / "ours")
    ways: list[tuple[TorchSave | Ours, Stalls]] = [(TorchSave(folder), Stalls()), (ours, Stalls())]
    for _ in range(3):
        training.step(lambda: None)
    for save in range(saves):
        for way, stalls in ways:
            undisturbed_s = [timed_s(lambda: training.step(lambda: None)) for _ in range(steps)]
            call_s = timed_s(lambda: way.save(training, save))  # noqa: B023
            after_s = [timed_s(lambda: training.step(way.before_update)) for _ in range(steps)]  # noqa: B023
            stalls.calls_s.append(call_s)
            stalls.stalls_s.append(call_s + sum(after_s) - steps * statistics.median(undisturbed_s))
    ours.checkpointer.wait()
    return ways[0][1], ways[1][1], ours


def rows(saves: int, steps: int = 5) -> None:
    """One row, and what stands behind it."""
    with tempfile.TemporaryDirectory() as name:
        theirs, own, ours = measure(saves, steps, Path(name), Training())
    their_ms, own_ms = (1000 * statistics.median(way.stalls_s) for way in (theirs, own))
    what = f"checkpoint: stall with the {steps} steps after"
    row(what, f"{own_ms:.0f} ms", f"{their_ms:.0f} ms", [own_ms / their_ms], "<= 0.25")
    print(f"  stall, ms: ours {quartiles(own.stalls_s)}, torch.save {quartiles(theirs.stalls_s)}")
    print(f"  the call alone, ms: ours {quartiles(own.calls_s)}, torch.save {quartiles(theirs.calls_s)}")
    print(
        f"  ours, ms: before updates {quartiles(ours.updates_s)}; durable after {quartiles(ours.durable_s)}", flush=True
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--saves", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    header()
    rows(options.saves, options.steps)


if __name__ == "__main__":
    main()
