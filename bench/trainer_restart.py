"""How long each kind of restart takes, from launch to the first completed optimizer step, and where the time goes.

    python bench/trainer_restart.py [--repeat 3] [--device cpu]

One run is started, then resumed as a supervisor would: the same again, with compile taken away and given back,
with another micro-batch and back, in another dtype. Compiled code is cached in the run's folder throughout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

TRAINER = Path(__file__).resolve().parents[1] / "trainer" / "train.py"
MODEL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 50304, "global_batch_size": 12}
RESTARTS = [  # (what, the settings that differ from the first attempt's)
    ("start, nothing cached", {}),
    ("resume, same settings", {}),
    ("resume, compile off", {"compile": False}),
    ("resume, compile back on", {}),
    ("resume, micro-batch 12 -> 6", {"batch_size": 6}),
    ("resume, micro-batch back", {}),
    ("resume, float32 -> bfloat16", {"dtype": "bfloat16"}),
]


def first_step_s(folder: Path, device: str, number: int, changed: dict[str, object]) -> tuple[float, float]:
    """Seconds to the first completed step, and those of them before training began (imports, model, checkpoint)."""
    events = folder / f"events-{number}.jsonl"
    knobs: dict[str, object] = {**MODEL, "device": device, "dtype": "float32", "compile": True, "batch_size": 12}
    knobs |= {"eval_interval": 0, "data_dir": folder, "out_dir": folder / "out", "max_iters": number + 1}
    knobs |= {"init_from": "resume" if number else "scratch", **changed}
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    begin_s = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, str(TRAINER), *(f"--{name}={value}" for name, value in knobs.items())],
        env={**environment, "GPUSUP_EVENTS": str(events)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    began_s = stepped_s = 0.0
    for line in child.stdout:
        if "M parameters" in line:
            began_s = time.monotonic() - begin_s
        if line.startswith("step "):
            stepped_s = time.monotonic() - begin_s
            break
    child.communicate()
    assert child.returncode == 0, [json.loads(line) for line in events.read_text().splitlines()][-1]
    return stepped_s, began_s


def main() -> None:
    """Print the table: medians of `--repeat` whole sequences, each with a cache of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {what: [] for what, _ in RESTARTS}
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for split in ("train", "val"):
                np.random.default_rng(1).zipf(1.3, 200_000).clip(max=50_256).astype("<u2").tofile(
                    folder / f"{split}.bin"
                )
            for number, (what, changed) in enumerate(RESTARTS):
                times[what].append(first_step_s(folder, arguments.device, number, changed))
    print(f"{'':<30} {'first step s':>12} {'min-max':>13} {'of it before training':>22}")
    for what, pairs in times.items():
        steps, began = [step for step, _ in pairs], [begin for _, begin in pairs]
        spread = f"{min(steps):.1f}-{max(steps):.1f}"
        print(f"{what:<30} {median(steps):>12.1f} {spread:>13} {median(began):>22.1f}")


if __name__ == "__main__":
    main()
