"""The state of every random generator: taken at the end of each optimizer step, written with a checkpoint as JSON."""

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """Start every generator from the same number."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


class RngState:
    """What PyTorch, Python and NumPy would draw next."""

    def __init__(self, device: torch.device) -> None:
        """Take the state as it is now; a few microseconds, nothing is encoded yet."""
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.python = random.getstate()
        self.numpy = np.random.get_state(legacy=True)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `restore` takes."""
        version, words, gauss = self.python
        name, keys, position, has_gauss, cached = self.numpy
        return {
            "torch": _encode(self.torch),
            "cuda": None if self.cuda is None else _encode(self.cuda),
            "python": [version, list(words), gauss],
            "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        }


def restore(state: Mapping[str, Any], device: torch.device) -> None:
    """Put every generator back; CUDA's only where both runs are on a GPU."""
    torch.set_rng_state(_decode(state["torch"]))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(_decode(state["cuda"]), device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
