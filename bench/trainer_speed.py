"""The trainer beside nanoGPT: speed, peak memory, time to the first optimizer step, and losses, on the CPU.

    python bench/trainer_speed.py --nanogpt PATH [--quick] [--only TEXT]

Speed, memory and start are of whole processes, ours and nanoGPT's in turn, with the same tokens, threads and
environment: nanoGPT's `train.py` as it is (for bfloat16 with the one line changed that ignores it on a CPU), and ours
with its own defaults. The model has 6 layers, 6 heads, width 384, context 256 and a vocabulary of 50304. A process is
killed after the steps that are wanted; before that ours saves a checkpoint, so that what that needs is in its peak, and
nanoGPT's does not. Ratios are medians over the pairs, with their range.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import nanogpt_losses
import numpy as np
import psutil
from table import header, row

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "gradient_accumulation_steps": 1}
WARM_UP = 2  # steps not counted
STEPS = 8
PAIRS = 3
STEP = re.compile(r"(iter|step) \d+(/\d+)?: loss ")  # a line that ends an optimizer step
DEADLINE_S = 600
DTYPE_IGNORED = "ctx = nullcontext() if device_type == 'cpu' else"
DTYPE_OBEYED = "ctx = nullcontext() if dtype == 'float32' else"
# (dtype, compiled, micro-batch): wanted speed, at least; wanted memory, at most; both as a multiple of nanoGPT's
SPEED = {
    ("float32", False, 12): (1.25, 0.6),
    ("float32", False, 4): (1.0, 1.0),
    ("float32", True, 12): (1.0, 1.0),
    ("float32", True, 4): (1.0, 1.0),
    ("bfloat16", False, 12): (1.0, 1.0),
    ("bfloat16", False, 4): (1.0, 1.0),
    ("bfloat16", True, 12): (1.0, 1.0),
    ("bfloat16", True, 4): (1.0, 1.0),
}
LOSSES_APART = 1e-4


@dataclass
class Seen:
    """What was seen of a process before it was killed."""

    ends_s: list[float]  # when each optimizer step was complete, since the process was started
    peak_bytes: int  # largest resident set of any process of its tree

    @property
    def step_s(self) -> float:
        """Median time of a step."""
        return median(np.diff(self.ends_s)[WARM_UP:])


@dataclass
class Side:
    """One of the two programs, in a folder of its own."""

    folder: Path
    command: list[str]

    def run(self, steps: int, dtype: str, compiled: bool, micro_batch: int) -> Seen:
        """Start it, kill it after `steps` optimizer steps."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        settings = {**MODEL, "device": "cpu", "dtype": dtype, "compile": compiled, "batch_size": micro_batch}
        begin_s = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-u", *self.command, *(f"--{name}={value}" for name, value in settings.items())],
            cwd=self.folder,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(self.cache)},
            stdout=subprocess.PIPE,
            stderr=(self.folder / "stderr.txt").open("w"),
            text=True,
            start_new_session=True,
        )
        watchdog = threading.Timer(DEADLINE_S, os.killpg, (child.pid, signal.SIGKILL))
        watchdog.start()
        ends_s: list[float] = []
        assert child.stdout is not None
        for line in child.stdout:
            if STEP.match(line):
                ends_s.append(time.monotonic() - begin_s)
            if len(ends_s) == steps:
                break
        else:
            raise SystemExit(f"{self.command[0]} ended early:\n{(self.folder / 'stderr.txt').read_text()}")
        peak_bytes = max(
            map(peak_of, [child.pid, *(p.pid for p in psutil.Process(child.pid).children(recursive=True))])
        )
        watchdog.cancel()
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return Seen(ends_s, peak_bytes)

    @property
    def cache(self) -> Path:
        """The compiler's."""
        return self.folder / "compiled"


def peak_of(pid: int) -> int:
    """The largest resident set a process has had, in bytes; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


def sides(folder: Path, nanogpt: Path) -> tuple[Side, Side]:
    """Ours and nanoGPT's, with the same tokens: 2 M of them, distributed as words are."""
    theirs = folder / "nanogpt"
    shutil.copytree(nanogpt, theirs, ignore=shutil.ignore_patterns("data", "assets", ".git"))
    script = (theirs / "train.py").read_text()
    assert script.count(DTYPE_IGNORED) == 1, "nanoGPT has changed: see DTYPE_IGNORED"
    (theirs / "train.py").write_text(script.replace(DTYPE_IGNORED, DTYPE_OBEYED))
    data = theirs / "data" / "zipf"
    data.mkdir(parents=True)
    weights = 1 / np.arange(1, 50258)
    tokens = np.random.default_rng(1).choice(50257, size=2_000_000, p=weights / weights.sum()).astype("<u2")
    for name in ("train.bin", "val.bin"):
        tokens.tofile(data / name)
    ours = folder / "ours"
    ours.mkdir()
    no_evaluation = ["--eval_iters=0", "--eval_interval=1000000000"]
    return (
        Side(
            ours,
            [
                str(ROOT / "trainer" / "train.py"),
                f"--data_dir={data}",
                "--eval_interval=0",
                f"--checkpoint_interval={STEPS // 2}",
            ],
        ),
        Side(theirs, ["train.py", "--dataset=zipf", "--log_interval=1", *no_evaluation]),
    )


def compare_speed(pair: tuple[Side, Side], repeats: int, only: str) -> None:
    """Tokens per second and peak memory, in every precision, size and way of running."""
    for (dtype, compiled, micro_batch), (speed, memory) in SPEED.items():
        what = f"{dtype} {'compiled' if compiled else 'eager'}, micro-batch {micro_batch}"
        if only not in what:
            continue
        if compiled:  # into the caches, which one run may not fill
            for side in pair:
                side.run(1, dtype, compiled, micro_batch)
        runs = alternate(pair, repeats, STEPS, dtype, compiled, micro_batch)
        tokens = micro_batch * MODEL["block_size"]
        rates = [[tokens / seen.step_s for seen in side] for side in runs]
        faster = [our / their for our, their in zip(*rates, strict=True)]
        texts = [f"{median(side):,.0f}" for side in rates]
        row(f"{what}: tokens/s", *texts, faster, f">= {speed}")
        peaks = [[seen.peak_bytes / 1e6 for seen in side] for side in runs]
        larger = [our / their for our, their in zip(*peaks, strict=True)]
        texts = [f"{median(side):,.0f} MB" for side in peaks]
        row(f"{what}: peak", *texts, larger, f"<= {memory}")


def compare_first_step(pair: tuple[Side, Side], repeats: int, only: str) -> None:
    """From launch to the end of the first optimizer step."""
    kinds = (("eager", False, False), ("compiled, cold cache", True, True), ("compiled, warm cache", True, False))
    for kind, compiled, cold in kinds:
        what = f"launch to first step, {kind}"
        if only not in what:
            continue
        times_s: list[list[float]] = [[], []]
        for _ in range(repeats):
            if cold:
                for side in pair:
                    shutil.rmtree(side.cache, ignore_errors=True)
            for of_side, runs in zip(times_s, alternate(pair, 1, 1, "float32", compiled, 4), strict=True):
                of_side.append(runs[0].ends_s[0])
        ratios = [our / their for our, their in zip(*times_s, strict=True)]
        texts = [f"{median(of_side):.1f} s" for of_side in times_s]
        row(what, *texts, ratios, "<= 1.0")


def alternate(
    pair: tuple[Side, Side], repeats: int, steps: int, dtype: str, compiled: bool, micro_batch: int
) -> tuple[list[Seen], list[Seen]]:
    """Runs of both sides in turn, each time the other one first."""
    runs: tuple[list[Seen], list[Seen]] = ([], [])
    for repeat in range(repeats):
        for index in (0, 1) if repeat % 2 == 0 else (1, 0):
            runs[index].append(pair[index].run(steps, dtype, compiled, micro_batch))
    return runs


def compare_losses(nanogpt: Path, only: str) -> None:
    """How far apart losses get, from the same weights, on the same batches, in float32."""
    what = "losses of 200 steps"
    if only in what:
        apart = nanogpt_losses.largest_difference(nanogpt, steps=200)
        row(what, "", "", [apart], f"<= {LOSSES_APART}")


def rows(nanogpt: Path, repeats: int, only: str = "") -> None:
    """All rows, or those with `only` in their name."""
    with tempfile.TemporaryDirectory() as name:
        pair = sides(Path(name), nanogpt)
        compare_speed(pair, repeats, only)
        compare_first_step(pair, repeats, only)
    compare_losses(nanogpt, only)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--quick", action="store_true", help=f"one pair of each instead of {PAIRS}")
    parser.add_argument("--only", default="", help="only rows with this in their name: eager, first, losses, ...")
    options = parser.parse_args()
    repeats = 1 if options.quick else PAIRS
    header()
    rows(options.nanogpt, repeats, options.only)


if __name__ == "__main__":
    main()
