"""Diffusion-QL (Wang et al. 2023): imitation, and the value of what the whole chain of sampling steps makes.

    L   = L_D(theta) + eta L_q(theta),    L_q = - E Q_i(s, a_theta) / sg(E |Q_j(s, a_theta)|),   i != j by a coin
    L_Q = E sum_k (r + discount min_k Q_target,k(s', a') - Q_k(s, a))^2,     a' sampled by the averaged actor
    max-Q backup: the best of M samples a' for each member, before the smallest of the members
    act:  N samples, one drawn by softmax(min_k Q_target,k / temperature)

Dividing by the mean magnitude makes eta mean the same for rewards of any scale.
"""

from dataclasses import dataclass, field

import torch

from diffpolicy.data.windows import Batch, Obs
from diffpolicy.learning.actor import ActorConfig
from diffpolicy.learning.actor_critic import ActorCritic, ActorCriticConfig, check_count
from diffpolicy.learning.critics import FrozenWeights, Metrics, climbing_loss
from diffpolicy.parts import CriticConfig, DenoiserConfig, SamplerConfig, SelectionConfig

MLP = DenoiserConfig("mlp", step_embed_dim=16, prediction="v_prediction")


@dataclass(frozen=True)
class DqlConfig(ActorCriticConfig):
    """Settings of Diffusion-QL; the defaults are the paper's for locomotion where it has them."""

    denoiser: DenoiserConfig = field(default_factory=lambda: MLP)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("ddpm", 5))
    actor: ActorConfig = field(default_factory=lambda: ActorConfig(grad_clip=5.0))
    critic: CriticConfig = field(default_factory=lambda: CriticConfig(hidden=(256, 256, 256), activation="mish"))
    selection: SelectionConfig = field(default_factory=lambda: SelectionConfig(samples=50, temperature=1.0))
    eta: float = 1.0
    """Weight of the value against imitation: 1 in locomotion, 0.5 to 4.5 in mazes, 0.1 to 0.15 with a pen, 0.005 in the
    kitchen."""
    backup_samples: int = 1
    """Next chunks a target takes the best of: 1, in all mazes but the smallest 10 (max-Q backup)."""

    def __post_init__(self) -> None:
        check_count("backup_samples", self.backup_samples)


class Dql(ActorCritic[DqlConfig]):
    """An actor that climbs the value through its own sampling chain."""

    def losses(self, batch: Batch) -> Metrics:
        """Take one step of the critics, then of the actor."""
        metrics = self.critics.update(batch, self.next_value(batch.next_obs))
        imitation = self.actor.model.loss(batch, self.generator)
        chunk = self.actor.sample(batch.obs, self.actor.noise(len(batch.action), self.generator))
        with FrozenWeights(self.critics.critic):
            q_loss = climbing_loss(self.critics.critic(self.critics.cond(batch.obs), chunk), self.generator)
            norm = self.actor.descend(imitation + self.config.eta * q_loss)
        return metrics | {"loss": imitation.detach(), "q_loss": q_loss.detach(), "grad_norm": norm}

    @torch.no_grad()
    def next_value(self, next_obs: Obs) -> torch.Tensor:
        """Value `(B,)` by the target critics of the averaged actor's chunks, the best of `backup_samples`."""
        m = self.config.backup_samples
        repeated = {name: array.repeat(m, *[1] * (array.ndim - 1)) for name, array in next_obs.items()}
        cond = self.critics.cond(repeated)
        chunk = self.actor.sample_averaged(repeated, self.actor.noise(len(cond), self.generator))
        target = self.critics.target
        return target.aggregate(target(cond, chunk).unflatten(1, (m, -1)).amax(1))


# Differences from the original (Zhendong-Wang/Diffusion-Policies-for-Offline-RL), besides those at the end of
# learning/actor_critic.py:
#   1. v is predicted on the cosine schedule, not the noise on theirs (`vp`, `epsilon`); sampling is DDPM with 5
#      steps, as theirs. The actor has 3 residual blocks of 256, not 3 plain layers of 256;
#   2. the current actor acts there; its average is updated every 5th step with 0.995, after step 1000;
#   3. gradients are clipped at one norm for all datasets; theirs at one a dataset (1 to 9), the critics', too;
#   4. their rates stay (with --lr_decay they end at 99.9 %), and some datasets have their own; batch 256, 2e6 steps;
#   5. any number of samples and any temperature when acting;
#   6. with other ensembles than two, the members i and j of L_q are neighbours in a circle.
