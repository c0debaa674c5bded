"""Start-up times and memory of the command line: minimum of ten runs each, beside their budgets.

    python bench/startup.py

`run` is timed from its start to the moment the trainer's first line executes; the trainer is a script that writes down
the time and leaves.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

RUNS = 10
GPUSUP = [str(Path(sys.executable).parent / "gpusup")]
TRAINER = "import json, sys, time\nopen(sys.argv[1], 'w').write(json.dumps(time.clock_gettime(time.CLOCK_MONOTONIC)))\n"


def command_s(arguments: list[str], environment: dict[str, str]) -> float:
    """Wall seconds of one command."""
    begin_s = time.monotonic()
    subprocess.run([*GPUSUP, *arguments], env=environment, capture_output=True, check=True)
    return time.monotonic() - begin_s


def exec_s(folder: Path, environment: dict[str, str]) -> float:
    """Seconds from starting `gpusup run` to the trainer's first line."""
    script, stamp = folder / "train.py", folder / "stamp"
    script.write_text(TRAINER)
    begin_s = time.monotonic()
    run = [*GPUSUP, "run", "default", "--", sys.executable, str(script), str(stamp)]
    subprocess.run(run, env=environment, capture_output=True, check=True, cwd=folder)
    return float(json.loads(stamp.read_text())) - begin_s


def resident_mb(folder: Path, environment: dict[str, str]) -> float:
    """Largest resident memory of a supervisor whose trainer prints for two seconds."""
    script = folder / "talk.py"
    script.write_text(
        "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: print('x' * 100); time.sleep(0.001)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    pid = os.posix_spawn(
        GPUSUP[0],
        [*GPUSUP, "run", "-q", "default", "--", sys.executable, str(script)],
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)],
    )
    usage = os.wait4(pid, 0)[2]
    assert usage.ru_maxrss or before
    return usage.ru_maxrss / 1024


def row(what: str, budget: str, measure: Callable[[], float], unit: str, scale: float) -> None:
    """One line of the table: minimum and median of `RUNS`."""
    values = [measure() * scale for _ in range(RUNS)]
    print(f"{what:<44} {min(values):>7.1f} {median(values):>7.1f} {unit:<3} budget {budget}", flush=True)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "GPUSUP_HOME": str(folder / "home")}
        exec_s(folder, environment)  # a run to list, and warm caches
        print(f"{'':<44} {'min':>7} {'median':>7}")
        row("gpusup --version", "120 ms", lambda: command_s(["--version"], environment), "ms", 1000)
        row("gpusup log", "200 ms", lambda: command_s(["log"], environment), "ms", 1000)
        row("gpusup log -1", "200 ms", lambda: command_s(["log", "-1"], environment), "ms", 1000)
        row("gpusup run: start to the trainer's first line", "300 ms", lambda: exec_s(folder, environment), "ms", 1000)
        row("gpusup run: resident memory", "30 MB", lambda: resident_mb(folder, environment), "MB", 1)


if __name__ == "__main__":
    main()
