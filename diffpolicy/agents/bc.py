"""Imitation with a diffusion policy (Chi et al. 2023, "Diffusion Policy"): learn to denoise the data's chunks.

    L = E | F(alpha x + sigma eps, t, cond) - target |^2,   t ~ U(0, 1],   eps ~ N(0, I),   padded actions left out

with `target = eps`, the noise, by default; on the schedule and prediction `flow` it is flow matching.
"""

from dataclasses import dataclass

import torch

from diffpolicy.data.windows import Batch
from diffpolicy.learning.imitation import Imitation, ImitationConfig
from diffpolicy.learning.imitator import Imitator


@dataclass(frozen=True)
class BcConfig(ImitationConfig):
    """Settings of imitation; the defaults are Chi et al.'s for Push-T from states, with gradient clipping."""


class Bc(Imitation[BcConfig]):
    """Trains a denoiser at all times."""

    def loss(self, model: Imitator, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Return the noise-prediction loss (or its kin)."""
        return model.loss(batch, generator, self.config.bf16)


# Differences from the original (Chi et al. 2023, train_diffusion_unet_lowdim):
#   1. times are continuous in (0, 1] and stratified over the batch, not one of 100; at t = (k+1)/100 all is equal;
#   2. padded actions do not count in the loss; the original trains on the repeated last action;
#   3. the gradient's norm is clipped;
#   4. windows begin at every step of an episode; the original's last begins n_action_steps - 1 before the last that
#      its horizon fits in;
#   5. validation holds out the fraction of episodes asked for; the original's held out all but its 90;
#   6. the averaged weights' counter is saved, so a resumed run continues the average.
