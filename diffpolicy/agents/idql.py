"""Implicit diffusion Q-learning (Hansen-Estruch et al. 2023): imitate by diffusion, value by expectiles, choose late.

    L_V = E |tau - 1(u < 0)| u^2,    u = Q_target(s, a) - V(s)
    L_Q = E (r + discount V(s') - Q(s, a))^2
    L_D = the imitation loss
    act:  a_1 .. a_N from the actor;  the best of them by Q_target, or one drawn by softmax(Q_target / temperature)

No loss asks for the value of an action that is not in the data; improvement happens at acting time alone.
"""

from dataclasses import dataclass, field

from diffpolicy.data.windows import Batch
from diffpolicy.learning.actor import ActorConfig
from diffpolicy.learning.critics import Metrics
from diffpolicy.learning.implicit import ImplicitConfig, ImplicitCritic
from diffpolicy.parts import CriticConfig, DenoiserConfig, SamplerConfig, SelectionConfig

MLP = DenoiserConfig("mlp", step_embed_dim=64, prediction="v_prediction")


@dataclass(frozen=True)
class IdqlConfig(ImplicitConfig):
    """Settings of IDQL; networks and tau are the paper's for locomotion where it has them, rewards are as recorded."""

    denoiser: DenoiserConfig = field(default_factory=lambda: MLP)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("ddpm", 5))
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    selection: SelectionConfig = field(default_factory=lambda: SelectionConfig(samples=64))
    tau: float = 0.7
    """Expectile of V: 0.7, in mazes 0.9."""


class Idql(ImplicitCritic[IdqlConfig]):
    """An imitator that a value of the data's actions chooses for."""

    def losses(self, batch: Batch) -> Metrics:
        """Take one step of V, of Q and of the actor."""
        metrics, _ = self.update_critics(batch)
        return metrics | self.update_actor(batch)

    def update_actor(self, batch: Batch) -> Metrics:
        """Take one step of imitation."""
        loss = self.actor.model.loss(batch, self.generator)
        return {"grad_norm": self.actor.descend(loss), "loss": loss.detach()}


# Differences from the original (philippe-eecs/IDQL), besides those at the end of learning/actor_critic.py:
#   1. v is predicted on the cosine schedule, not the noise on theirs (`vp`, `epsilon`); sampling is DDPM with 5
#      steps, the posterior's variance and the clean estimate clipped; theirs adds noise of variance beta and clips the
#      noisy action after each step;
#   2. when acting theirs takes the best or, in its implicit policy, draws in proportion to |tau - 1(Q < V)|, which is
#      not here; drawing by a softmax is this library's;
#   3. the actor has 3 blocks of 256 without dropout or expansion, a quarter of their weights, and its time features are
#      fixed; its batch is the critics' (theirs 512, for the critics 256 or 512 by version); 3e6 steps;
#   4. `td.rewards` as `return_range` is the paper's for locomotion.
