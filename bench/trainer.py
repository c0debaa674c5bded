"""Everything that is claimed of the reference trainer, in one table.

    python bench/trainer.py --nanogpt PATH --peer-python PYTHON [--quick]

PATH is a checkout of github.com/karpathy/nanoGPT, PYTHON an interpreter that can import `datasets` and `tiktoken`. It
takes about an hour on two cores that do nothing else. Each part can be run alone: trainer_speed, checkpoint_stall,
prepare, trainer_recovery, trainer_restart.
"""

import argparse
import tempfile
from pathlib import Path

import checkpoint_stall
import prepare
import table
import trainer_recovery
import trainer_speed


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="each once, to see that it works")
    options = parser.parse_args()
    repeats = 1 if options.quick else trainer_speed.PAIRS
    table.header()
    trainer_speed.rows(options.nanogpt, repeats)
    checkpoint_stall.rows(3 if options.quick else 24)
    with tempfile.TemporaryDirectory() as name:
        ways = prepare.measure(options.peer_python, 20 if options.quick else 300, min(repeats, 3), None, Path(name))
    prepare.rows(ways)
    trainer_recovery.rows(5 if options.quick else 100)


if __name__ == "__main__":
    main()
