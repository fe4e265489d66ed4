"""Q-chunking (Li et al. 2025): imitate chunks with a flow, value whole chunks, take the best of N, and learn from it.

    a*  = the best by Q of N chunks of the actor; when acting, by Q_target of the averaged actor's
    L_Q = E sum_k (sum_{j<h} gamma^j r_j + gamma^h Q_target(s_h, a*_h) - Q_k(s, a))^2      h = n_action_steps
    L_F = the imitation loss
    act:  a*

The n-step return is unbiased although off-policy: all of the chunk that the critic values was executed.
"""

from dataclasses import dataclass, field

import torch

from diffpolicy.data.windows import Batch, Obs
from diffpolicy.diffusion.selection import BestOf
from diffpolicy.learning.actor import ActorConfig
from diffpolicy.learning.actor_critic import ActorCritic, ActorCriticConfig, check_count
from diffpolicy.learning.critics import Metrics
from diffpolicy.parts import CriticConfig, DenoiserConfig, SamplerConfig, SelectionConfig

FLOW = DenoiserConfig("mlp", hidden_dim=512, step_embed_dim=64, schedule="flow", prediction="flow")


@dataclass(frozen=True)
class QcConfig(ActorCriticConfig):
    """Settings of Q-chunking; the defaults are the paper's where it has them."""

    denoiser: DenoiserConfig = field(default_factory=lambda: FLOW)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("euler", 10))
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(
        default_factory=lambda: CriticConfig((512,) * 4, layer_norm=True, activation="gelu", aggregate="mean")
    )
    selection: SelectionConfig = field(default_factory=lambda: SelectionConfig(samples=32))
    backup_samples: int = 32
    """Next chunks a target takes the best of."""

    def __post_init__(self) -> None:
        check_count("backup_samples", self.backup_samples)


class Qc(ActorCritic[QcConfig]):
    """An imitator of chunks whose best of N is both how it acts and what its critics learn from."""

    def losses(self, batch: Batch) -> Metrics:
        """Take one step of the critics and one of imitation."""
        metrics = self.critics.update(batch, self.next_value(batch.next_obs))
        loss = self.actor.model.loss(batch, self.generator)
        return metrics | {"grad_norm": self.actor.descend(loss), "loss": loss.detach()}

    @torch.no_grad()
    def next_value(self, next_obs: Obs) -> torch.Tensor:
        """Value `(B,)` by the target critics of the chunk that the critics like best of `backup_samples`."""
        model, n = self.actor.model, self.config.backup_samples
        cond = model.encoder(next_obs)
        best = BestOf(self.actor.planner, self.critics.critic.value, n)
        chunk = best(cond, self.actor.noise(len(cond), self.generator, times=n))
        return self.critics.target.value(cond, chunk)


# Differences from the original (ColinQiyangLi/qc), besides those at the end of learning/actor_critic.py:
#   1. the actor is not 4 plain layers of 512 with GELU that see the bare time;
#   2. when acting theirs has the current actor and the current critics; targets use the current actor here, too;
#   3. normalisation in the critics stands before the activation, not after it;
#   4. theirs leaves out a chunk in which the episode ends, unless it ends with its last action; where a task is solved
#      and the recording goes on (OGBench), it adds up the rest of the chunk's rewards and only does not bootstrap;
#   5. theirs clips the sampled chunk alone, not each estimate of it.
