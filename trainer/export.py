"""Write a checkpoint as other programs read it.

python trainer/export.py out/ckpt-00000030 --to nanogpt -o FOLDER    # FOLDER/ckpt.pt, for nanoGPT's --out_dir=FOLDER
python trainer/export.py out/ckpt-00000030 --to hf -o FOLDER         # FOLDER for GPT2LMHeadModel.from_pretrained
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by path: what must be importable is this package, not the modules inside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "trainer"

from . import checkpoint, interchange
from .errors import TrainerError


def export(source: Path, to: str, folder: Path) -> Path:
    """Export the checkpoint `source` into `folder`; what was made. Raises TrainerError."""
    made = folder / ("ckpt.pt" if to == "nanogpt" else "model.safetensors")
    if made.exists():
        raise TrainerError(f"{made} is there already; give another folder")
    saved = checkpoint.load(source)
    folder.mkdir(parents=True, exist_ok=True)
    if to == "nanogpt":
        interchange.save_nanogpt(made, saved.step, saved.meta, saved.part("model"), saved.part("optimizer"))
    else:
        interchange.save_hugging_face(folder, saved.meta, saved.part("model"))
    return made


def main(arguments: list[str]) -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(prog="export.py", description="Write a checkpoint as other programs read it.")
    parser.add_argument("checkpoint", type=Path, help="a ckpt-* directory")
    parser.add_argument("--to", choices=("nanogpt", "hf"), required=True, help="nanoGPT, or Hugging Face's GPT-2")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="where to write; is made")
    options = parser.parse_args(arguments)
    try:
        print(f"wrote {export(options.checkpoint, options.to, options.out)}")
    except (TrainerError, OSError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
