"""Implicit diffusion Q-learning (Hansen-Estruch et al. 2023): imitate by diffusion, value by expectiles, choose late.

    L_V = E |tau - 1(u < 0)| u^2,    u = Q_target(s, a) - V(s)
    L_Q = E (r + discount V(s') - Q(s, a))^2
    L_D = the imitation loss
    act:  a_1 .. a_N from the actor;  the best of them by Q_target, or one drawn by softmax(Q_target / temperature)

No loss asks for the value of an action that is not in the data; improvement happens at acting time alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from diffpolicy.data.windows import Batch
from diffpolicy.learning.actor import ActorConfig
from diffpolicy.learning.actor_critic import ActorCritic, ActorCriticConfig, Learned
from diffpolicy.learning.critics import ExpectileValue, Metrics, whole_chunks
from diffpolicy.parts import CriticConfig, DenoiserConfig, SamplerConfig, SelectionConfig, make_value

MLP = DenoiserConfig("mlp", step_embed_dim=64, prediction="v_prediction")


@dataclass(frozen=True)
class IdqlConfig(ActorCriticConfig):
    """Settings of IDQL; the defaults are the paper's for locomotion where it has them."""

    denoiser: DenoiserConfig = field(default_factory=lambda: MLP)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("ddpm", 5))
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    selection: SelectionConfig = field(default_factory=lambda: SelectionConfig(samples=64))
    tau: float = 0.7
    """Expectile of V: 0.7, in mazes 0.9."""


class Idql(ActorCritic[IdqlConfig]):
    """An imitator that a value of the data's actions chooses for."""

    def more(self) -> Mapping[str, Learned]:
        """Return the value of states."""
        value = make_value(self.config.critic, self.spec, self.normalizer).to(self.device)
        self.value = ExpectileValue(value, self.config.tau, self.config.td.learning_rate)
        return {"value": self.value}

    def losses(self, batch: Batch) -> Metrics:
        """Take one step of V, of Q and of the actor."""
        metrics = self.update_critics(batch)
        return metrics | self.update_actor(batch)

    def update_critics(self, batch: Batch) -> Metrics:
        """Take one step of V towards the expectile of Q, then of Q towards `r + discount V(s')`."""
        cond, next_cond = self.critics.cond(batch.obs), self.critics.cond(batch.next_obs)
        with torch.no_grad():
            q = self.critics.target.value(cond, batch.action)
        metrics = self.value.update(cond, q, whole_chunks(batch, self.spec))
        return metrics | self.critics.update(batch, self.value(next_cond))

    def update_actor(self, batch: Batch) -> Metrics:
        """Take one step of imitation."""
        loss = self.actor.model.loss(batch, self.generator)
        return {"grad_norm": self.actor.descend(loss), "loss": loss.detach()}


# Differences from the original (philippe-eecs/IDQL), besides those at the end of learning/actor_critic.py:
#   1. v is predicted on the cosine schedule, not the noise at 5 steps of their VP schedule; sampling is DDPM with 5
#      steps, the posterior's variance and the clean estimate clipped; theirs adds noise of variance beta and clips the
#      noisy action after each step;
#   2. when acting theirs takes the best or, in its implicit policy, draws in proportion to |tau - 1(Q < V)|, which is
#      not here; drawing by a softmax is this library's;
#   3. the actor has 3 blocks of 256 without dropout or expansion, a quarter of their weights, and its time features are
#      fixed; its batch is the critics' (theirs 512, for the critics 256 or 512 by version); 3e6 steps;
#   4. `td.rewards` as `return_range` is the paper's for locomotion.
