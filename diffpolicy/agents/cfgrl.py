"""CFGRL (Frans et al. 2025): imitate all of the data and its better part, and go from the first past the second.

    L_V, L_Q  as in IQL (Kostrikov et al. 2022),   A = Q_target(s, a) - V(s),   o = 1(A > 0)
    L   = E o |F(x_t, t, s, o = 1) - target|^2 + beta E |F(x_t, t, s) - target|^2
    act:  D(x_t, s) + w (D(x_t, s, o = 1) - D(x_t, s))

The guided policy is `pi(a | s) p(o = 1 | s, a)^w`, which improves on that of every smaller w: the weight, chosen when
acting, is how far to go from the data.
"""

from dataclasses import dataclass, field, replace

import torch

from diffpolicy.data.windows import Batch
from diffpolicy.guides import BetterGuidance
from diffpolicy.learning.actor import ActorConfig
from diffpolicy.learning.critics import Metrics, whole_chunks
from diffpolicy.learning.implicit import ImplicitConfig, ImplicitCritic
from diffpolicy.nets.encoder import TOLD
from diffpolicy.parts import CriticConfig, DenoiserConfig, SamplerConfig, SelectionConfig

FLOW = DenoiserConfig("mlp", hidden_dim=512, step_embed_dim=64, schedule="flow", prediction="flow", told_embed_dim=32)


@dataclass(frozen=True)
class CfgrlConfig(ImplicitConfig):
    """Settings of CFGRL; the defaults are the paper's for offline reinforcement learning where it has them."""

    denoiser: DenoiserConfig = field(default_factory=lambda: FLOW)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("euler", 32))
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=lambda: CriticConfig((512,) * 3, layer_norm=True, activation="mish"))
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    guidance: BetterGuidance = field(default_factory=lambda: BetterGuidance(weight=1.5))
    """w; their code looks at 1 to 100."""
    tau: float = 0.9
    """Expectile of V."""
    beta: float = 0.1
    """Weight of the unconditional loss."""


class Cfgrl(ImplicitCritic[CfgrlConfig]):
    """An imitator that is told which of the data's actions are better than expected."""

    @property
    def guidance(self) -> BetterGuidance:
        """Return w and o = 1."""
        return self.config.guidance

    def losses(self, batch: Batch) -> Metrics:
        """Take one step of V, of Q and of the actor."""
        metrics, advantage = self.update_critics(batch)
        better = (advantage > 0) & (whole_chunks(batch, self.spec) > 0)
        conditional, unconditional = self.conditional(batch, better), self.actor.model.loss(batch, self.generator)
        norm = self.actor.descend(conditional + self.config.beta * unconditional)
        share = better.float().mean()
        return metrics | {"loss": unconditional.detach(), "grad_norm": norm, "better": share}

    def conditional(self, batch: Batch, better: torch.Tensor) -> torch.Tensor:
        """`E o |F(x_t, t, s, o = 1) - target|^2`, with o in `better (B,)`."""
        told = replace(batch, obs={**batch.obs, TOLD: torch.ones_like(batch.reward)})
        model, n = self.actor.model, batch.valid.sum()
        chosen = batch.valid & better.unsqueeze(-1)
        loss = model.loss(replace(told, valid=chosen), self.generator)
        return loss * chosen.sum() / n


# Differences from the original (kvfrans/cfgrl, iql_diffusion; their variant for OGBench's single tasks is not here),
# besides those at the end of learning/actor_critic.py:
#   1. a chunk that the recording cuts short has no advantage and trains the unconditional policy alone;
#   2. the actor is not 3 plain layers of 512 with Mish and LayerNorm after the first two; their times are 0, 1/32 .. 1,
#      and the two losses share times and noise there; batch 1024;
#   3. every guided estimate of the clean chunk is clipped to the box, not the last alone;
#   4. nothing told is an embedding of zeros, o = 1 a small network of the number 1, not two rows of a table;
#   5. of several samples the best by Q can be taken besides (`selection`); with one sample guidance acts alone.
