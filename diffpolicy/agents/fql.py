"""Flow Q-learning (Park et al. 2025): a flow imitates, and a student of one step learns to be like it, but better.

    L_F = the imitation loss of the teacher
    L   = alpha E |mu(s, z) - teacher(s, z)|^2 - lambda E Q(s, mu(s, z)),    lambda = 1, or 1 / sg(E |Q|)
    L_Q = E sum_k (r + discount Q_target(s', mu(s', z')) - Q_k(s, a))^2
    act:  mu(s, z), one evaluation of one network

With chunks of more than one executed action it is QC-FQL (Li et al. 2025: alpha 100, the value not normalised). The
student is the denoiser of a sampler with one step: at `t = 1` all that it sees is noise, and the clean chunk that it
predicts is the action.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from diffpolicy.data.windows import Batch
from diffpolicy.errors import SpecError
from diffpolicy.learning.actor import Actor, ActorConfig
from diffpolicy.learning.actor_critic import ActorCritic, ActorCriticConfig, Learned
from diffpolicy.learning.critics import FrozenWeights, Metrics
from diffpolicy.parts import CriticConfig, DenoiserConfig, SamplerConfig, SelectionConfig

FLOW = DenoiserConfig("mlp", hidden_dim=512, step_embed_dim=64, schedule="flow", prediction="flow")
ONE_STEP = SamplerConfig("one_step", 1)


@dataclass(frozen=True)
class FqlConfig(ActorCriticConfig):
    """Settings of FQL; the defaults are the paper's, with its authors' later advice for new environments."""

    denoiser: DenoiserConfig = field(default_factory=lambda: FLOW)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("euler", 10))
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(
        default_factory=lambda: CriticConfig((512,) * 4, layer_norm=True, activation="gelu", aggregate="mean")
    )
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    alpha: float = 1.0
    """Weight of being like the teacher: with normalize_q 0.03 to 10, without it 3 to 30000."""
    normalize_q: bool = True
    """Divide the value by its mean magnitude."""


class Fql(ActorCritic[FqlConfig]):
    """A student of one step between its teacher, a flow, and the critics. `actor` is the student.

    Raises:
        SpecError: if the teacher's chunk depends on more than one draw of noise, or is to continue another chunk.
    """

    def make_actor(self, denoiser: DenoiserConfig, sampler: SamplerConfig) -> Actor:
        """Return the student: it predicts the clean chunk from noise alone."""
        if denoiser.max_delay:
            raise SpecError("fql's student learns no chunk that another began; leave out --denoiser.max-delay")
        return super().make_actor(replace(denoiser, prediction="sample"), ONE_STEP)

    def more(self) -> Mapping[str, Learned]:
        """Return the teacher."""
        self.teacher = super().make_actor(self.config.denoiser, self.config.sampler)
        if (draws := self.teacher.planner.draws) != 1:
            raise SpecError(
                f"the teacher draws {draws} times to make one chunk, so no noise decides it and its student would "
                "learn the mean; give fql a deterministic --sampler.sampler such as euler or ddim, with eta 0"
            )
        return {"teacher": self.teacher}

    @property
    def imitator(self) -> Actor:
        """Return the teacher."""
        return self.teacher

    def losses(self, batch: Batch) -> Metrics:
        """Take one step of the critics, of the teacher and of the student."""
        metrics = self.critics.update(batch, self.next_value(batch))
        imitation = self.teacher.model.loss(batch, self.generator)
        metrics |= {"loss": imitation.detach(), "grad_norm": self.teacher.descend(imitation)}
        noise = self.teacher.noise(len(batch.action), self.generator)
        with torch.no_grad():
            taught = self.teacher.sample(batch.obs, noise)
        chunk = self.actor.model.denoiser(noise[0], 1.0, self.actor.model.encoder(batch.obs))
        distillation = (chunk - taught).square().mean()
        with FrozenWeights(self.critics.critic):
            q_loss = self.q_loss(batch, self.clipped(chunk))
            self.actor.descend(self.config.alpha * distillation + q_loss)
        return metrics | {"distillation": distillation.detach(), "q_loss": q_loss.detach()}

    def clipped(self, chunk: torch.Tensor) -> torch.Tensor:
        """Clip the student's chunk to the box, as its sampler does."""
        clip = self.config.denoiser.clip
        return chunk if clip is None else chunk.clamp(-clip, clip)

    @torch.no_grad()
    def next_value(self, batch: Batch) -> torch.Tensor:
        """Value `(B,)` by the target critics of the student's next chunks."""
        chunk = self.actor.sample(batch.next_obs, self.actor.noise(len(batch.action), self.generator))
        return self.critics.target.value(self.critics.cond(batch.next_obs), chunk)

    def q_loss(self, batch: Batch, chunk: torch.Tensor) -> torch.Tensor:
        """`- lambda E Q(s, chunk)`, with Q the mean of the members."""
        q = self.critics.critic(self.critics.cond(batch.obs), chunk).mean(0)
        return -q.mean() / (q.detach().abs().mean().clamp(min=1e-8) if self.config.normalize_q else 1.0)


# Differences from the original (seohongpark/fql), besides those at the end of learning/actor_critic.py:
#   1. the networks are not 4 plain layers of 512 with GELU; the student's also sees a diffusion time, which is always
#      1;
#   2. the current student acts there; the teacher's chunks are clipped at their end alone, not at each step;
#   3. normalisation in the critics stands before the activation, not after it;
#   4. the value is normalised and alpha 1, as the authors later advise for new environments; theirs is not and 10, in
#      QC-FQL 100, in the units of unscaled actions;
#   5. with chunks, QC-FQL leaves out and adds up what `qc` says of the ends of episodes (agents/qc.py).
