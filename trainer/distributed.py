"""Several processes that train one model, as `torchrun` starts them: each takes its share of every global batch.

Gradients of unequal shares are sums, divided by the tokens of the whole global batch, so summing them over all is exact
for any number of processes, and the order of the samples is that of a single one. A process that fails leaves at once:
were its failure caught, the others would wait for it.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import TrainerError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """The processes of this run; by default this one alone, for which nothing is communicated."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints, reports and saves."""
        return self.rank == 0

    def share(self, rows: int) -> tuple[int, int]:
        """(first, count): the contiguous part of `rows` samples that is this process's; sizes differ by one at most."""
        begin, end = (rows * self.rank // self.size, rows * (self.rank + 1) // self.size)
        return begin, end - begin

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size == 1:
            return
        import torch.distributed as dist

        pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in pending:
            if work is not None:
                work.wait()

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        if self.size == 1:
            return flag
        count = torch.tensor(float(flag), device=self.device)
        self.sum([count])
        return count.item() > 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in their order, in each of them."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, 0)

    def leave(self) -> None:
        """When all is done: end the communication, once everybody is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()
            dist.destroy_process_group()


def ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun's environment says; (0, 1, 0) without it."""
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, size, local = (int(os.environ.get(name, default)) for name, default in alone.items())
    return rank, size, local


def own_device(name: str) -> str:
    """The device of this process where several share a machine: `cuda` is the one of its number."""
    _, size, local = ranks()
    return f"cuda:{local}" if size > 1 and name == "cuda" else name


def join(device: torch.device) -> World:
    """This process's place among the others, which it waits for; each has opened its own `device` already."""
    rank, size, _ = ranks()
    if size == 1:
        return World(device=device)
    import torch.distributed as dist

    if not dist.is_available():
        raise TrainerError("this PyTorch was built without torch.distributed; start a single process")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)
