"""Decision Diffuser (Ajay et al. 2023): imitate, told which return followed; then ask for a high one.

    R    = (G - G_min) / (G_max - G_min),   G = sum_k gamma^k r_k to the end of the episode, or G = its whole return
    L    = E | F(x_t, t, s, R) - target |^2,   R left out with probability p
    act:  D(x_t, s) + w (D(x_t, s, R*) - D(x_t, s)),   every draw of noise multiplied by the temperature

No value is learned and no reward is bootstrapped: what the data never did in one episode is not put together.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from diffpolicy.data import rewards
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.windows import Batch, Windows
from diffpolicy.errors import SpecError
from diffpolicy.guides import ClassifierFreeGuidance
from diffpolicy.learning.imitation import Imitation, ImitationConfig
from diffpolicy.learning.imitator import Imitator
from diffpolicy.nets.encoder import TOLD
from diffpolicy.parts import DenoiserConfig, SamplerConfig
from diffpolicy.policy import Policy

UNET = DenoiserConfig(down_dims=(128, 512, 1024), step_embed_dim=128, told_embed_dim=128)


@dataclass(frozen=True)
class DecisionDiffuserConfig(ImitationConfig):
    """Settings of Decision Diffuser; the defaults are the paper's for locomotion where it has them."""

    denoiser: DenoiserConfig = field(default_factory=lambda: UNET)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("ddpm", 100, temperature=0.5))
    learning_rate: float = 2e-4
    """Peak rate of AdamW."""
    guidance: ClassifierFreeGuidance = field(default_factory=lambda: ClassifierFreeGuidance(weight=1.2, goal=0.9))
    """w (1.2 to 1.8) and R*, 0 for the lowest return of the data and 1 for its highest."""
    dropout: float = 0.25
    """p: how often the return is left out."""
    gamma: float = 0.99
    """Discount a step of the return."""
    whole_episode: bool = False
    """Tell the return of the whole episode at each of its steps, not what follows the step: where several agents made
    the data, it says which of them acted, and one goal is right in every state. All recorded rewards count alike: there
    is no discount, and `info["mask"]` ends nothing."""

    def __post_init__(self) -> None:
        if not (0 <= self.dropout < 1 and 0 <= self.gamma <= 1):
            raise SpecError(f"got dropout {self.dropout} and gamma {self.gamma}; wanted them in [0, 1), [0, 1]")


class DecisionDiffuser(Imitation[DecisionDiffuserConfig]):
    """An imitator of everybody in the data that is asked to act as the best of them."""

    def windows(
        self, episodes: Episodes, device: str | torch.device = "cpu", only: np.ndarray | None = None
    ) -> Windows:
        """Return windows whose reward is R, normalised over all episodes, those not chosen included, and weights."""
        if self.config.whole_episode:
            told = np.repeat(rewards.in_unit(episodes.returns), np.asarray(episodes.length, dtype=np.int64))
        else:
            told = rewards.in_unit(rewards.returns_to_go(episodes, self.config.gamma))
        return self.judged_windows(episodes, told, device, only)

    def loss(self, model: Imitator, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """L: the imitation loss with R, or without it where it is left out by chance."""
        left_out = torch.rand(batch.reward.shape, generator=generator, device=batch.reward.device) < self.config.dropout
        told = batch.reward.masked_fill(left_out, torch.nan)
        return model.loss(replace(batch, obs={**batch.obs, TOLD: told}), generator, self.config.bf16)

    def policy(self) -> Policy:
        """Return the policy of the averaged weights as they stand, told the goal; it shares them with the agent."""
        averaged, config = self.ema.module, self.config
        parts = (self.spec, self.normalizer, averaged.encoder, averaged.denoiser, config.denoiser, config.sampler)
        return Policy(*parts, self.seed, guidance=config.guidance)


# The original (anuragajay/decision-diffuser) does not have `whole_episode`. The other differences:
#   1. chunks of actions are diffused, conditioned on recent observations; the original diffuses 100 states alone, puts
#      the current one in, finds the action between the first two with an inverse model, plays it and plans again;
#   2. the return is normalised by the smallest and largest of the data, not divided by a number chosen for each set,
#      and no penalty is added where an episode ends truly; its embedding has two layers, not three;
#   3. observations are scaled to limits, not by their distribution;
#   4. diffusion time is continuous; 100 steps of DDPM as in the paper (200 in the code), and any other sampler;
#   5. at weights 0 and 1 one network evaluation is enough, and only one is done;
#   6. AdamW's betas and decay, the average of the weights and warm-up and fall of the rate are this library's
#      imitation's.
