"""One optimizer step: clip, check, unscale and apply, in one pass over the weights where the optimizer is fused."""

import torch
from torch import Tensor, nn

from .distributed import World
from .optimizer import AdamW


class Update:
    """Applies accumulated gradients, unless they are not finite: then the weights stay as they are."""

    def __init__(self, optimizer: AdamW, scaler: torch.amp.GradScaler, grad_clip: float, world: World) -> None:
        self.optimizer, self.scaler, self.grad_clip, self.world = optimizer, scaler, grad_clip, world
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        zero = torch.zeros((), device=self.parameters[0].device)
        self.grad_norm = zero.clone()  # of the newest gradients, before clipping
        self.skipped = zero.clone()  # updates not applied
        self.in_a_row = zero.clone()  # how many of them were the newest ones
        self.not_finite = zero.clone()  # 1 where the newest gradients are not

    def prepare(self) -> None:
        """Sum the gradients of all processes and see how large they are; nothing is applied, no GPU is waited for."""
        grads = [_grad(parameter) for parameter in self.parameters]
        self.world.sum(grads)
        loss_scale = self.scaler.scale(torch.ones_like(self.grad_norm))  # 1 unless the matrices are float16
        self.grad_norm = nn.utils.get_total_norm(grads) / loss_scale
        self.not_finite = (~torch.isfinite(self.grad_norm)).float()
        self.skipped += self.not_finite
        self.in_a_row = (self.in_a_row + 1) * self.not_finite

    def apply(self) -> None:
        """Step the optimizer, which divides the gradients itself; where they are not finite it changes nothing.

        These two attributes are how a GradScaler tells fused optimizers, too: it costs no pass over all gradients.
        """
        excess = self.grad_norm / self.grad_clip if self.grad_clip else torch.ones_like(self.grad_norm)
        self.optimizer.grad_scale = excess.clamp(min=1.0)
        self.optimizer.found_inf = self.not_finite
        self.scaler.step(self.optimizer)  # float16: times the scale of the loss
        self.scaler.update()
        self.optimizer.zero_grad(
            set_to_none=True
        )  # an evaluation or a save needs the memory, and the next step not yet

    def applied(self) -> Tensor:
        """How often the weights have been changed, as the optimizer itself counts."""
        step: Tensor = self.optimizer.state[self.parameters[0]]["step"]
        return step.clone()

    def untouched_since(self, applied: Tensor) -> bool:
        """Whether no weight and no moment has changed since `applied` was taken.

        The optimizer counts all weights of a group up before it touches the first of them, so counters that have not
        moved prove it; one that has moved proves nothing, and the answer is no.
        """
        return all(bool(self.optimizer.state[parameter]["step"] == applied) for parameter in self.parameters)


def _grad(parameter: nn.Parameter) -> Tensor:
    """The gradient; zero where this process had no sample of the global batch."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
