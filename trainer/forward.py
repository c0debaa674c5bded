"""One forward pass: on a device, in a precision, compiled or not."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from .errors import TrainerError
from .model import GPT
from .report import Reporter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIRST_LOSS_SCALE = 4096.0  # low, so that a warm run switched to float16 rarely skips its first updates


class Forward:
    """The model as it is called; compiled, it has one graph for each shape it has seen."""

    def __init__(
        self,
        model: GPT,
        device: torch.device,
        dtype: str,
        compiled: bool,
        report: Reporter,
        activation_memory_budget: float = 1.0,
    ) -> None:
        """Compiled, with `activation_memory_budget` < 1, only that fraction of the activations is kept for backward."""
        if compiled:
            import torch._functorch.config as functorch  # a second's work, so only where it is needed

            functorch.activation_memory_budget = activation_memory_budget
        self.model = model
        self.device = device
        self.dtype = DTYPES[dtype]
        self.compiled = compiled
        self.report = report
        self.begin_stage()

    def begin_stage(self) -> None:
        """Forget the graphs of the stage before: their shapes do not come back, and PyTorch keeps only a few."""
        if self.compiled:
            torch.compiler.reset()
            self.model.compile(dynamic=False)
        self.seen: set[tuple[int | bool, ...]] = set()

    def must_compile(self, rows: int, block_size: int) -> bool:
        """Whether a batch of this shape has to be compiled first."""
        return self.compiled and (rows, block_size, self.model.training) not in self.seen

    @contextmanager
    def first_call(self, rows: int, block_size: int) -> Iterator[None]:
        """Around all that a batch goes through: where it is compiled, that is what a failure is reported as."""
        compiling = self.must_compile(rows, block_size)
        self.report.compiling = compiling
        yield
        self.report.compiling = False
        self.seen.add((rows, block_size, self.model.training))

    def __call__(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of the token losses of (inputs, targets), both (rows, block_size)."""
        inputs, targets = (tokens.to(self.device) for tokens in batch)
        with self._precision():
            return cast(Tensor, self.model(inputs, targets))

    def _precision(self) -> AbstractContextManager[object]:
        """Matrix products in `dtype`; float32 means nothing is cast."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def open_device(name: str) -> torch.device:
    """The device called `name`. Raises TrainerError when this machine has none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainerError(f"device={name} is not a device; use cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise TrainerError(f"device={name} is not supported; use cpu, cuda or cuda:0")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise TrainerError(f"device={name}: PyTorch sees no CUDA device here; use --device=cpu")
        torch.cuda.set_device(device)
    return device


def spare_dynamo() -> None:
    """Keep the optimizer from importing the compiler where nothing is compiled: a second, and 70 MB.

    These methods are excluded from compilation by a wrapper that imports it at the first call, and remembers what it
    then calls instead under the name set here. In a PyTorch that does it otherwise this does nothing.
    """
    optimizer = torch.optim.Optimizer
    for function in (optimizer.add_param_group, optimizer.zero_grad, optimizer.state_dict, optimizer.load_state_dict):
        if plain := getattr(function, "__wrapped__", None):
            plain.__dict__.setdefault("__dynamo_disable", plain)


def loss_scaler(device: torch.device, dtype: str) -> torch.amp.GradScaler:
    """Scales the loss for float16, whose range needs it; does nothing for the others."""
    return torch.amp.GradScaler(device.type, init_scale=FIRST_LOSS_SCALE, enabled=dtype == "float16")


def missing_for_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None. On the CPU it generates C++ that includes Python.h."""
    if device.type != "cpu":
        return None
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler} is not on PATH)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"no Python headers ({header} is missing)"
    return None
