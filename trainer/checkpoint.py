"""Checkpoints that survive a crash at any moment: written beside the old ones, made durable, then renamed.

The two newest are kept. A file is trusted only when its checksums hold, so a damaged one is noticed and the one before
it is used. Files are loaded as plain data: a checkpoint cannot run code.
"""

import os
import pickle
import random
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import TrainerError

FORMAT = 1
KEPT = 2
NAME = re.compile(r"ckpt-(\d{8,})\.pt")


class Damaged(TrainerError):
    """The file is not a whole checkpoint."""


def save(directory: Path, step: int, content: Mapping[str, object]) -> tuple[Path, int]:
    """Write `content` durably as the checkpoint of `step`, drop the ones no longer kept; its path and size in bytes.

    Raises OSError when it cannot be written; the checkpoints before it are then untouched.
    """
    path = directory / f"ckpt-{step:08d}.pt"
    temporary = directory / f"{path.name}.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "step": step, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(directory)
    _prune(directory, step)
    return path, path.stat().st_size


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, its tensors mapped from the file: copy what is to be kept.

    Raises Damaged, or TrainerError when it is no checkpoint of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch itself does not look at the checksums
    except FileNotFoundError:
        raise TrainerError(f"{path}: no such checkpoint; give the path of a ckpt-*.pt file in resume_from") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    if broken is not None:
        raise Damaged(f"{path} is damaged (the checksum of {broken} does not match)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise TrainerError(
            f"{path}: holds more than plain data, so it is not loaded; resume from another one"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise TrainerError(f"{path}: not a checkpoint of this trainer (format {FORMAT}); resume from another one")
    return content


def load_newest(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole. A damaged one is renamed to *.damaged, with a line about it."""
    for _, path in reversed(stored(directory)):
        try:
            return path, load(path)
        except Damaged as error:
            path.rename(f"{path}.damaged")
            print(f"{error}; set aside as {path.name}.damaged, trying the one before", file=sys.stderr, flush=True)
    raise TrainerError(f"{directory}: no whole checkpoint to resume from; start with --init_from=scratch")


def stored(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in `directory`, oldest step first; none when there is no such directory."""
    if not directory.is_dir():
        return []
    matches = [(NAME.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def rng_state(device: torch.device) -> dict[str, object]:
    """The state of every random generator, as plain data that `load` accepts."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Put every random generator back; CUDA's only when both runs are on as many GPUs."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))


def _prune(directory: Path, step: int) -> None:
    """Keep the checkpoint of `step` and the newest before it.

    Later ones go too: they are of a course this run has left by resuming from an earlier step.
    """
    files = stored(directory)
    kept = [path for at, path in files if at <= step][-KEPT:]
    left_over = [path for path in directory.glob("ckpt-*.pt.tmp") if path.is_file()]  # of a process killed while saving
    for path in [path for _, path in files if path not in kept] + left_over:
        path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Make a rename durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
