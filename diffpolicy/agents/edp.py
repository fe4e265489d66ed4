"""Efficient diffusion policy (Kang et al. 2023), its TD3 form: the value of a clean chunk guessed in one step.

    L   = L_D(theta) - alpha E Q_i(s, x_hat) / sg(E |Q_j(s, x_hat)|),    x_hat = D_theta(x_t, t, s)
    x_t = alpha_t x + sigma_t eps of the data's own chunk at a random time
    L_Q = E sum_k (r + discount min_k Q_target,k(s', a') - Q_k(s, a))^2,     a' sampled by the averaged actor
    act:  N samples, one drawn by softmax(min_k Q_target,k / temperature)

No gradient passes through a chain of sampling steps: the cost of a step does not grow with them.
"""

from dataclasses import dataclass, field

import torch

from diffpolicy.data.windows import Batch
from diffpolicy.diffusion.denoiser import broadcast, diffuse
from diffpolicy.learning.actor import ActorConfig
from diffpolicy.learning.actor_critic import ActorCritic, ActorCriticConfig
from diffpolicy.learning.critics import FrozenWeights, Metrics, climbing_loss
from diffpolicy.learning.imitator import stratified_times
from diffpolicy.parts import CriticConfig, DenoiserConfig, SamplerConfig, SelectionConfig

MLP = DenoiserConfig("mlp", step_embed_dim=16, schedule="linear")


@dataclass(frozen=True)
class EdpConfig(ActorCriticConfig):
    """Settings of EDP with TD3; the defaults are the paper's for locomotion where it has them."""

    denoiser: DenoiserConfig = field(default_factory=lambda: MLP)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("dpm++2m", 15))
    actor: ActorConfig = field(default_factory=lambda: ActorConfig(grad_clip=5.0))
    critic: CriticConfig = field(default_factory=lambda: CriticConfig(hidden=(256, 256, 256), activation="mish"))
    selection: SelectionConfig = field(default_factory=lambda: SelectionConfig(samples=50, temperature=1.0))
    alpha: float = 2.0
    """Weight of the value against imitation."""


class Edp(ActorCritic[EdpConfig]):
    """An actor that climbs the value of its guess of the clean chunk."""

    def losses(self, batch: Batch) -> Metrics:
        """Take one step of the critics, then of the actor."""
        metrics = self.critics.update(batch, self.next_value(batch))
        imitation = self.actor.model.loss(batch, self.generator)
        with FrozenWeights(self.critics.critic):
            q_loss = climbing_loss(self.critics.critic(self.critics.cond(batch.obs), self.guess(batch)), self.generator)
            norm = self.actor.descend(imitation + self.config.alpha * q_loss)
        return metrics | {"loss": imitation.detach(), "q_loss": q_loss.detach(), "grad_norm": norm}

    def guess(self, batch: Batch) -> torch.Tensor:
        """`x_hat (B, Tp, Da)`: the clean chunk that the actor sees in the data's, noised to random times."""
        x, model = batch.action, self.actor.model
        t = stratified_times(len(x), self.generator, x.device)
        eps = torch.randn(x.shape, generator=self.generator, device=x.device)
        x_t = diffuse(x, eps, *model.denoiser.schedule(broadcast(t, x)))
        return self.actor.planner.denoiser(x_t, t, model.encoder(batch.obs))

    @torch.no_grad()
    def next_value(self, batch: Batch) -> torch.Tensor:
        """Value `(B,)` by the target critics of the averaged actor's next chunks."""
        chunk = self.actor.sample_averaged(batch.next_obs, self.actor.noise(len(batch.action), self.generator))
        return self.critics.target.value(self.critics.cond(batch.next_obs), chunk)


# Differences from the original (sail-sg/edp), besides those at the end of learning/actor_critic.py:
#   1. the noised chunk of L_D and that of x_hat are two draws and two evaluations; theirs are one;
#   2. chunks for targets and for acting are sampled by DPM-Solver++(2M) in 15 steps; theirs by all 100 steps of DDPM,
#      or by DPM-Solver-3 with 15 evaluations in place of 1000 steps;
#   3. the current actor and the current critics act and choose there; the average is updated every 5th step with 0.995,
#      after step 1000. The actor has 3 residual blocks of 256, not 3 plain layers of 256;
#   4. the actor's gradient is taken after the critics' step, theirs before; theirs are clipped at one norm a dataset,
#      each network alone, and their rates stay; batch 256, 2e6 steps;
#   5. the magnitude that divides a member's value is the other member's, as in Diffusion-QL; theirs is its own;
#   6. of the next chunks one is valued, and no best of many (max-Q backup);
#   7. of its three policy losses the TD3 form is here, not the weighted regressions (IQL, CRR);
#   8. theirs scale the rewards of kitchen, adroit and antmaze by rules of their own.
