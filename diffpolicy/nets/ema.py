"""Exponential moving average of weights: what a diffusion policy acts with.

    decay(n) = min(max_decay, 1 - (1 + n)^-power)        shadow <- decay shadow + (1 - decay) weights

The counter `n` is part of the state: a resumed run that forgets it starts at decay 0 and overwrites the average.
"""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """Average of a module's parameters, `update()` after each optimizer step (Chi et al. 2023: power 0.75)."""

    def __init__(self, module: M, power: float = 0.75, max_decay: float = 0.9999) -> None:
        self.module: M = copy.deepcopy(module).requires_grad_(False).eval()
        self.power = power
        self.max_decay = max_decay
        self.updates = 0

    @property
    def decay(self) -> float:
        """Weight that the next update gives to the average so far."""
        return min(self.max_decay, 1 - (1 + self.updates) ** -self.power)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards `module`'s weights; buffers are copied."""
        shadows: list[torch.Tensor] = [*self.module.parameters()]
        weights: list[torch.Tensor] = [*module.parameters()]
        torch._foreach_lerp_(shadows, weights, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
        for shadow, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            shadow.copy_(buffer)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return weights and counter."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore weights and counter."""
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
