"""MIP, the minimal iterative policy (Pan et al. 2025): two regressions, the second of which sees the first.

    L   = E |pi(o, 0, 0) - a|^2 + E |pi(o, t* a + (1 - t*) z, t*) - a|^2,    t* = 0.9,   z ~ N(0, I)
    act:  a_0 = pi(o, 0, 0),   a = pi(o, t* a_0, t*)

It imitates no distribution: where demonstrations go left or right, it may go between. What it needs to sample is two
evaluations of the network. The paper's time runs from noise at 0 to data at 1, ours the other way, so `t* = 0.9` is
`s = 0.1` of the schedule `flow`, and `pi` is a network that predicts the clean chunk.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from diffpolicy.data.windows import Batch
from diffpolicy.diffusion.denoiser import diffuse
from diffpolicy.diffusion.sampler import Mip as MipSampler
from diffpolicy.errors import SpecError
from diffpolicy.learning.imitation import Imitation, ImitationConfig
from diffpolicy.learning.imitator import Imitator, autocast, mean_of_real
from diffpolicy.parts import DenoiserConfig, SamplerConfig

TWO_STEPS = SamplerConfig("mip", 2)


@dataclass(frozen=True)
class MipConfig(ImitationConfig):
    """Settings of MIP: those of imitation, whose network predicts the clean chunk on the schedule `flow`."""

    denoiser: DenoiserConfig = field(default_factory=lambda: DenoiserConfig(schedule="flow", prediction="sample"))
    sampler: SamplerConfig = field(default_factory=lambda: TWO_STEPS)

    def __post_init__(self) -> None:
        """Refuse what the formula does not know."""
        if (self.denoiser.schedule, self.denoiser.prediction) != ("flow", "sample"):
            raise SpecError(
                f"got the schedule {self.denoiser.schedule!r} and the prediction {self.denoiser.prediction!r}; mip is "
                "defined for flow and sample alone: leave out --flow, --denoiser.schedule and --denoiser.prediction"
            )
        if self.denoiser.max_delay:
            raise SpecError("mip learns no chunk that another began; leave out --denoiser.max-delay, or train with bc")


class Mip(Imitation[MipConfig]):
    """Trains a network at the two points where it acts."""

    trained: ClassVar[SamplerConfig] = TWO_STEPS

    def loss(self, model: Imitator, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """`|pi(o, 0, 0) - a|^2 + |pi(o, t* a + (1 - t*) z, t*) - a|^2`, in one pass of twice the batch."""
        a, s = batch.action, MipSampler().s
        z = torch.randn(a.shape, generator=generator, device=a.device)
        x_t = torch.cat([torch.zeros_like(a), diffuse(a, z, *model.denoiser.schedule(a.new_full((), s)))])
        times = torch.cat([a.new_full((len(a),), t) for t in (1.0, s)])
        with autocast(a.device, self.config.bf16):
            first, second = model.denoiser(x_t, times, model.encoder(batch.obs).repeat(2, 1)).chunk(2)
        return mean_of_real((first - a) ** 2, batch.valid) + mean_of_real((second - a) ** 2, batch.valid)


# Differences from the original (Pan et al. 2025; simchowitzlabpublic/much-ado-about-noising):
#   1. both terms weigh the same and the second regression is fed `t* a_0`; the authors' code divides the terms by
#      `t*^2` and `(1 - t*)^2`, and trains the second on `a + (1 - t*) z`, feeding it `a_0` itself;
#   2. both regressions are clipped to the box of the actions;
#   3. optimizer, learning rate and average are those of `bc`; padded actions do not count in the loss.
