"""A network in two stages: what diffusion time and condition say, and what is done with it to a chunk.

    modulation(t, cond) -> m        body(x_t, m) -> chunk        forward(x_t, t, cond) = body(x_t, modulation(t, cond))

While one chunk is sampled, the times are known beforehand and the condition stands still: the first stage can run once
for all steps, which reads its weights once, and only the body runs at each.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from diffpolicy.errors import SpecError


class Network(nn.Module, ABC):
    """`(B, Tp, Da), (B,), (B, C) -> (B, Tp, Da)`."""

    @abstractmethod
    def modulation(self, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """What diffusion time `(B,)` and condition `(B, C)` say to the body, `(B, M)`."""

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
