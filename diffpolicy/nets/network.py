"""A network in two stages: what diffusion time and condition say, and what is done with it to a chunk.

    modulation(t, cond) -> m        body(x_t, m) -> chunk        forward(x_t, t, cond) = body(x_t, modulation(t, cond))

The first stage is a sum, `of_time(t) + of_cond(cond)`. A sampler's times are known before it starts and the condition
stands still while it runs: the share of each time can be kept, that of the condition is worked out once a chunk, and
only the body runs at each step.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from diffpolicy.errors import SpecError


class Network(nn.Module, ABC):
    """`(B, Tp, Da), (B,), (B, C) -> (B, Tp, Da)`."""

    @abstractmethod
    def of_time(self, t: torch.Tensor) -> torch.Tensor:
        """Share of diffusion time `(B,)` in the modulation, biases included, `(B, M)`."""

    @abstractmethod
    def of_cond(self, cond: torch.Tensor) -> torch.Tensor:
        """Share of the condition `(B, C)` in the modulation, `(B, M)`."""

    def modulation(self, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """What diffusion time and condition say to the body, `(B, M)`."""
        return self.of_time(t) if cond is None else self.of_time(t) + self.of_cond(cond)

    @abstractmethod
    def body(self, x_t: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """Turn a noised chunk `(B, Tp, Da)` into the prediction of the same shape."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Predict; what the prediction means is the denoiser's business.

        Raises:
            SpecError: if each action has its own time and this network was not made for that.
        """
        if t.ndim != 1:
            raise SpecError(
                "this policy was not trained to continue a chunk; train with --denoiser.max-delay, or join otherwise"
            )
        return self.body(x_t, self.modulation(t, cond))
