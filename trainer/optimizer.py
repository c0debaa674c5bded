"""AdamW, ready before the first step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .allocator import empty_at_page


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW with its state allocated at once, so that the first step needs no more memory than others.

    `step` is its own because PyTorch's imports the compiler, whether anything is compiled or not: a second, and 70 MB.
    """

    grad_scale: Tensor | None = None  # what the gradients are to be divided by
    found_inf: Tensor | None = None  # above 0: leave everything as it is

    def __init__(self, groups: list[dict[str, object]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": empty_at_page(parameter).zero_(),
                    "exp_avg_sq": empty_at_page(parameter).zero_(),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; under a GradScaler, unless its gradients have overflowed."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states: list[dict[str, Any]] = [self.state[parameter] for parameter in parameters]
            adamw(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],  # only for amsgrad
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
            )
