"""Whether the reference trainer survives: killed at random moments, and out of memory in every part of a step.

    python bench/trainer_recovery.py [--kills 100]

The kills come at random moments of training that saves after every step, so that many hit a checkpoint being written.
Each out-of-memory error is a real refusal by PyTorch's allocator, provoked in one place of a copy of the trainer.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "trainer"))

from conftest import write_tokens  # noqa: E402
from test_trainer_kills import SETTINGS as KILLED  # noqa: E402
from test_trainer_rescue import FAILS_AT, NO_ROOM, PLACES  # noqa: E402
from test_trainer_rescue import SETTINGS as INJECTED  # noqa: E402
from trainer_runs import Launch, assert_continues, kill_until_done, mutant  # noqa: E402


def kills(folder: Path, tokens: Path, count: int) -> str:
    """Kill until done; what was compared."""
    steps = 15 * count
    settings = {**KILLED, "max_iters": steps, "lr_decay_iters": steps}
    undisturbed = Launch(folder / "undisturbed", tokens, **settings).run()
    attempts, while_saving = kill_until_done(
        Launch(folder / "killed", tokens, **settings), random.Random(11), count, longest_s=0.5
    )
    assert attempts[-1].status == 0, attempts[-1].stderr
    assert_continues(undisturbed, attempts, 0.0)
    return f"{len(attempts) - 1} kills, {while_saving} in a save; {steps} losses bit-identical"


def injected(folder: Path, tokens: Path, place: str) -> str:
    """Run out of memory in one place; the steps that were lost, and the exit status."""
    line, _ = PLACES[place]
    indent = line[: len(line) - len(line.lstrip())]
    package = mutant(folder, "train.py", line, f"{indent}{NO_ROOM}\n{line}")
    settings = {**INJECTED, "checkpoint_interval": FAILS_AT} if place == "save" else INJECTED
    launch = Launch(folder / "run", tokens, package, **settings)
    first = launch.run()
    launch.package = ROOT / "trainer"
    resumed = launch.run(init_from="resume").of("start")[0]["step"]
    return f"{FAILS_AT - resumed} steps lost, exit {first.status}"


def rows(count: int) -> None:
    """A line for each place, and one for the kills."""
    with tempfile.TemporaryDirectory() as name:
        tokens = write_tokens(Path(name, "tokens"), 256)
        for number, place in enumerate(PLACES):
            print(f"{'out of memory in ' + place:<50} | {injected(Path(name, str(number)), tokens, place)}", flush=True)
        print(f"{'SIGKILL at random moments':<50} | {kills(Path(name, 'kills'), tokens, count)}", flush=True)


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    rows(parser.parse_args().kills)


if __name__ == "__main__":
    main()
