"""How long after a trainer's exit the diagnosis stands in the journal, and what watching a healthy run costs.

python bench/diagnosis_latency.py [--runs=20] [--watch-s=60]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

GPUSUP = Path(sys.executable).parent / "gpusup"
OOM = """
import sys, time
for step in range({steps}):
    print("step", step, "loss 3.1", flush=True)
    time.sleep(0.02)
raise MemoryError("CUDA out of memory. Tried to allocate 1.54 GiB. GPU 0 has a total capacity of 11.60 GiB")
"""
BARS = """
import sys, time
begin = time.monotonic()
at = 0
while time.monotonic() - begin < {seconds}:
    at += 1
    sys.stderr.write(f"\\r {{at % 100:3d}}%|####      | {{at}}/99999 [00:12<3:00, 9.9it/s, loss=2.1]")
    sys.stderr.flush()
    if at % 10 == 0:
        print("step", at, "loss 2.1", flush=True)
    time.sleep(0.1)
"""


def run(folder: Path, script: str) -> tuple[list[dict[str, object]], Path, float]:
    """The journal, the attempt's directory, and the supervisor's CPU seconds."""
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "GPUSUP_HOME": str(folder / "home")}
    child = subprocess.Popen(
        [GPUSUP, "run", "-q", "default", "--", sys.executable, "script.py"],
        cwd=folder, env=environment, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, _, usage = os.wait4(child.pid, 0)  # its own and of what it waited for: the starter of the shim, not the trainer
    (directory,) = (folder / "home" / "runs").iterdir()
    events = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    return events, directory / "attempts" / "001", usage.ru_utime + usage.ru_stime


def latency_ms(steps: int) -> float:
    """From the trainer's exit, as its shim recorded it, to the event in the journal."""
    with tempfile.TemporaryDirectory() as name:
        events, attempt, _ = run(Path(name), OOM.format(steps=steps))
        (oom,) = (event for event in events if event["kind"] == "oom")
        ended_s = float(json.loads((attempt / "exit.json").read_text())["at"])
        return 1000 * (datetime.fromisoformat(str(oom["at"])).timestamp() - ended_s)


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--watch-s", type=int, default=60)
    options = parser.parse_args()
    for steps, what in ((0, "at once"), (100, "after two seconds")):
        found = sorted(latency_ms(steps) for _ in range(options.runs))
        spread = f"{found[0]:.0f} to {found[-1]:.0f}"
        print(f"failing {what}: diagnosis {statistics.median(found):.0f} ms after the exit ({spread})")
    cpu_s = []
    for seconds in (1, options.watch_s):
        with tempfile.TemporaryDirectory() as name:
            begin_s = time.monotonic()
            events, _, used_s = run(Path(name), BARS.format(seconds=seconds))
            cpu_s.append((used_s, time.monotonic() - begin_s))
            assert not [event for event in events if event["kind"] in ("oom", "remediation")]
    share = (cpu_s[1][0] - cpu_s[0][0]) / (cpu_s[1][1] - cpu_s[0][1])
    print(f"watching a healthy run with bars at 10 Hz: {share:.2%} of a core without its start and end; 0 incidents")


if __name__ == "__main__":
    main()
