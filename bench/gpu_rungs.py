"""What each rung of the ladder does to memory and speed on this GPU: peaks and step times of the reference trainer.

    python bench/gpu_rungs.py DATA_DIR [--steps 12] [--repeat 2]

Every combination runs in a process of its own, in turn, `--repeat` times; the peak is the allocator's reserved maximum
while training, the time is the median of the steps after the third.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

TRAINER = Path(__file__).parents[1] / "trainer" / "train.py"
MODEL = {"n_layer": 12, "n_head": 12, "n_embd": 576, "block_size": 1024, "vocab_size": 50304}
COMBINATIONS = [(True, "bfloat16", 16), (False, "bfloat16", 16), (False, "float16", 16), (True, "bfloat16", 8)]
COMBINATIONS += [(False, "bfloat16", 8), (True, "bfloat16", 12), (False, "bfloat16", 12), (True, "float16", 16)]
GLOBAL_BATCH = 48


def measure(data: str, compiled: bool, dtype: str, micro_batch: int, steps: int) -> tuple[float, float, float]:
    """Peak in GiB, median step in ms, seconds to the first step (with compilation)."""
    with tempfile.TemporaryDirectory() as name:
        events = Path(name, "events.jsonl")
        knobs = {**MODEL, "data_dir": data, "out_dir": f"{name}/out", "compile": compiled, "dtype": dtype}
        knobs |= {"batch_size": micro_batch, "global_batch_size": GLOBAL_BATCH, "max_iters": steps, "eval_interval": 0}
        command = [sys.executable, str(TRAINER), *(f"--{key}={value}" for key, value in knobs.items())]
        subprocess.run(command, env={**os.environ, "GPUSUP_EVENTS": str(events)}, check=True, stdout=subprocess.DEVNULL)
        told = [json.loads(line) for line in events.read_text().splitlines()]
    peak = max(event["bytes"] for event in told if event["kind"] == "peak" and event["phase"] == "train")
    times = [event["dt_s"] for event in told if event["kind"] == "step"]
    return peak / 2**30, median(times[3:]) * 1000, times[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=2)
    wanted = parser.parse_args()
    print(f"{MODEL}, global batch {GLOBAL_BATCH}")
    print(
        f"{'compile':<8} {'dtype':<9} {'micro-batch':>11} {'peak GiB':>9} {'ms/step':>8} {'first step s':>12}",
        flush=True,
    )
    for _ in range(wanted.repeat):
        for compiled, dtype, micro_batch in COMBINATIONS:
            peak, step_ms, first_s = measure(wanted.data, compiled, dtype, micro_batch, wanted.steps)
            what = f"{'on' if compiled else 'off':<8} {dtype:<9} {micro_batch:>11}"
            print(f"{what} {peak:>9.2f} {step_ms:>8.1f} {first_s:>12.1f}", flush=True)


if __name__ == "__main__":
    main()
