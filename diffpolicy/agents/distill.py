"""Distillation into one step: a student learns where its teacher's sampling takes each noise.

    L   = E | D(z, 1, o) - x(z, o) |^2,     z ~ N(0, I),   x(z, o) the teacher's chunk from the noise z, by K steps
    act:  D(z, 1, o), one evaluation of the teacher's network

A deterministic sampler makes of each noise one chunk, so nothing is averaged: the student keeps the teacher's modes
(Luhman and Luhman 2021; with critics it is the student of `fql`). It begins with the teacher's weights, and stays a
policy like any other: its own sampler is `one_step`.

Chosen by measuring: after about 24 s of one core each on the quickstart maze, a flow for teacher, batches of 32, the
root mean square distance to the teacher's chunks of 10 steps (unit scale, held-out windows) was 0.052 for this loss,
0.090 for consistency distillation over 20 times and 0.54 for MeanFlow's identity at r = 0, whose target differentiates
an embedding of time that turns by up to 100 radians from noise to data. The teacher in 5 steps is 0.044 off its 100.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Batch
from diffpolicy.errors import SpecError
from diffpolicy.learning.imitation import Imitation, ImitationConfig
from diffpolicy.learning.imitator import Imitator, autocast
from diffpolicy.parts import DenoiserConfig, SamplerConfig
from diffpolicy.policy import Policy
from diffpolicy.precision import full_precision

ONE_STEP = SamplerConfig("one_step", 1)


@dataclass(frozen=True)
class DistillConfig(ImitationConfig):
    """Settings of distillation; `taught_by` makes them for a teacher."""

    sampler: SamplerConfig = field(default_factory=lambda: ONE_STEP)
    teacher: str = ""
    """Run folder of the policy to distil, trained by imitation."""
    teach: SamplerConfig = field(default_factory=SamplerConfig)
    """How the teacher samples: a deterministic sampler."""

    def taught_by(self, teacher: str | Path) -> "DistillConfig":
        """Return these settings with the teacher's network.

        Raises:
            PolicyError: if there is no policy in that folder.
        """
        return replace(self, teacher=str(teacher), denoiser=student_of(Policy.load(teacher).denoiser_config))


def student_of(teacher: DenoiserConfig) -> DenoiserConfig:
    """Return the teacher's network; one that predicts the noise is made to predict the chunk, of which all is noise."""
    return replace(teacher, prediction="sample") if teacher.prediction == "epsilon" else teacher


class Distill(Imitation[DistillConfig]):
    """Trains a student of one step on encoded batches, in its teacher's units; the data's actions play no part.

    Raises:
        PolicyError: if there is no teacher in the folder named, or it was not trained for that sampling.
        SpecError: if no teacher is named, its sizes are others, or it is no function of one noise.
    """

    trained: ClassVar[SamplerConfig] = ONE_STEP

    def __init__(
        self,
        spec: Spec,
        normalizer: Normalizer,
        config: DistillConfig,
        steps: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        if not config.teacher:
            raise SpecError("distillation needs a trained policy; name its run folder with --teacher")
        self.teacher = Policy.load(config.teacher, device).with_sampler(config.teach)
        self.planner = self.teacher.planner
        _check(self.teacher, spec, config)
        super().__init__(spec, self.teacher.normalizer, config, steps, device, seed)

    def make_model(self) -> Imitator:
        """Return a student with the teacher's weights."""
        model = super().make_model()
        model.encoder.load_state_dict(self.teacher.encoder.state_dict())
        model.denoiser.load_state_dict(self.teacher.denoiser.state_dict())
        return model

    def loss(self, model: Imitator, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """`| D(z, 1, o) - x(z, o) |^2`, over whole chunks: the teacher makes no padding."""
        z = torch.randn(batch.action.shape, generator=generator, device=batch.action.device)
        # In full precision, as the teacher acts: at t = 1 rounding is divided by alpha.
        with torch.no_grad(), full_precision(z.device):
            taught = self.planner(self.teacher.encoder(batch.obs), z.unsqueeze(0))
        with autocast(z.device, self.config.bf16):
            chunk = model.denoiser(z, 1.0, model.encoder(batch.obs))
        return (chunk.float() - taught).square().mean()


def _check(teacher: Policy, spec: Spec, config: DistillConfig) -> None:
    for name in ("horizon", "n_obs_steps", "n_action_steps", "action_dim", "obs_shapes"):
        ours, theirs = getattr(spec, name), getattr(teacher.spec, name)
        if ours != theirs:
            raise SpecError(f"the student's {name} is {ours} and its teacher's {theirs}; give it the teacher's")
    if config.denoiser != student_of(teacher.denoiser_config):
        raise SpecError("a student has its teacher's network; leave out --denoiser, or use DistillConfig.taught_by")
    if config.denoiser.max_delay:
        raise SpecError("a student learns no chunk that another began; distil a teacher trained without max_delay")
    if teacher.planner.draws != 1:
        raise SpecError(
            f"the teacher draws {teacher.planner.draws} times to make one chunk, so no noise decides it; teach by a "
            "deterministic sampler such as ddim, and a policy that does not choose among samples"
        )


# Differences from the original (Luhman and Luhman 2021, "Knowledge distillation in iterative generative models"):
#   1. the teacher's chunks are sampled as they are needed, not stored; every batch has fresh noise;
#   2. time, schedule and clipping are the teacher's; a student of a noise prediction predicts the chunk, theirs z minus
#      it;
#   3. the loss is squared, on images theirs is not; the last average of the weights acts, theirs is that of lowest test
#      loss; optimizer and learning rate are those of `bc`.
