"""The safetensors file format: the length of a JSON header, the header, then the tensors' bytes one after another.

Nothing in it is executed when it is read. https://huggingface.co/docs/safetensors says the rest.
"""

import json
import mmap
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import TrainerError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8  # of the header's length, little-endian
PAGE_BYTES = 4096  # the header is padded to it with spaces


def bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory, as a flat uint8 tensor that shares it."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> tuple[Tensor, list[Tensor]]:
    """The head of the file (uint8) and the tensors in the order in which their bytes follow it.

    Widest items first, so that every tensor begins at a multiple of its item size and can be used where it is mapped;
    of those, first what fills whole pages, so that it can be written from memory as it is.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, tensors[name].nbytes % PAGE_BYTES > 0))
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % PAGE_BYTES)
    head = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return torch.frombuffer(bytearray(head), dtype=torch.uint8), [tensors[name] for name in names]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a whole file at once. Raises OSError."""
    head, ordered = layout(tensors, metadata)
    with path.open("wb") as file:
        for tensor in (head, *ordered):
            file.write(bytes_of(tensor.cpu().contiguous()).numpy().data)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped from it: READ-ONLY, so copy what is to be kept.

    Raises TrainerError when it is not such a file, OSError when it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(LENGTH_BYTES)
        if len(head) < LENGTH_BYTES:
            raise TrainerError(f"{path}: not a safetensors file (it is too short)")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data_begin = LENGTH_BYTES + int.from_bytes(head, "little")
    try:
        if data_begin > len(mapped):
            raise ValueError("its header is longer than the file")
        entries = json.loads(mapped[LENGTH_BYTES:data_begin])
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(mapped, data_begin, entry) for name, entry in entries.items()}
        if data_begin + sum(tensor.nbytes for tensor in tensors.values()) != len(mapped):
            raise ValueError("its tensors do not fill it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainerError(f"{path}: not a whole safetensors file ({error})") from None
    return tensors


def _tensor(mapped: mmap.mmap, data_begin: int, entry: Mapping[str, Any]) -> Tensor:
    """One tensor of a mapped file. Raises ValueError, KeyError or TypeError when its entry makes no sense."""
    dtype, shape = DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
    begin, end = entry["data_offsets"]
    count = prod(shape)
    if not 0 <= begin <= end <= len(mapped) - data_begin or end - begin != count * dtype.itemsize:
        raise ValueError(f"the bytes {begin} to {end} cannot be {entry['dtype']} {shape}")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():  # PyTorch has no read-only tensors, and says so
        warnings.simplefilter("ignore")
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=data_begin + begin).view(shape)
