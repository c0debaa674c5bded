"""Turn text into the tokens that train.py reads.

    python trainer/prepare.py FILE.parquet|FOLDER|FILE.bin ... -o DIR [--val-fraction 0.01]
    python -m gpusup.trainer.prepare FILE.parquet|FOLDER|FILE.bin ... -o DIR [--val-fraction 0.01]

DIR gets token shards (docs/data-format.md) or, with --format=bin, nanoGPT's train.bin and val.bin; and meta.json. A
document goes to training or validation by a checksum of its text: the split does not depend on the order of the files,
and the same text is never in both. Killed at any moment, the same command continues, with the same result to the byte.
Exit status: 0 done, 2 something to put right, 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run by path: what must be importable is this package, not the modules inside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "trainer"

from .errors import TrainerError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare.py", description="Turn text into the tokens of train.py.")
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="SOURCE", help="parquet files, folders of them, nanoGPT .bin files")
    add("-o", "--out", required=True, type=Path, metavar="DIR", help="gets the tokens and meta.json")
    add("--text-column", default="text", metavar="NAME", help="column of the parquet files (default: text)")
    add("--val-fraction", type=float, default=0.01, help="share of the documents (default: 0.01)")
    add("--format", choices=("shards", "bin"), default="shards", help="bin: plain train.bin, val.bin of nanoGPT")
    add("--shard-tokens", type=int, default=100_000_000, help="tokens in a shard (default: 100,000,000)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that encode (default: cores)")
    add("--encoder", choices=("auto", "tiktoken", "gigatoken"), default="auto", help="auto: gigatoken where installed")
    add("--restart", action="store_true", help="forget unfinished work in DIR and begin anew")
    return parser


def main() -> None:
    """Read the command line and prepare."""
    from .preparation import Options, prepare  # here, because every worker imports this file and needs none of it

    given = parser().parse_args()
    options = Options(
        text_column=given.text_column,
        val_fraction=given.val_fraction,
        shard_tokens=given.shard_tokens if given.format == "shards" else None,
        workers=given.workers,
        encoder=given.encoder,
        restart=given.restart,
    )
    try:
        meta = prepare(given.sources, given.out, options)
    except TrainerError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nprepare.py: interrupted; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    for split in ("train", "val"):
        facts = meta[split]
        print(f"{split}: {facts['tokens']:,} tokens of {facts['documents']:,} documents in {', '.join(facts['files'])}")
    if meta["left_out"]:
        print("left out: " + ", ".join(f"{count:,} {why}" for why, count in meta["left_out"].items()))
    print(f"next: trainer/train.py --data_dir={given.out}")


if __name__ == "__main__":
    main()
