"""Denoisers made of denoisers: each takes one and is one, so they stack in any order."""

import torch

from diffpolicy.diffusion.denoiser import Denoiser


class Clipped(Denoiser):
    """Posterior mean clipped to the action box `[-limit, limit]` of the unit scale.

    The noise prediction divides by `alpha`, about 5e-4 at `t = 1`: unclipped, its first steps overshoot the data.
    """

    def __init__(self, denoiser: Denoiser, limit: float = 1.0) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.limit = limit

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """`clip(D, -limit, limit)`."""
        return self.denoiser(x_t, t, cond).clamp(-self.limit, self.limit)
