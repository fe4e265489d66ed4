"""The part that acts of an agent that also has critics: a denoiser in training, and the average of its weights."""

from dataclasses import dataclass
from typing import Any

import torch

from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Obs
from diffpolicy.diffusion.sampler import Sample
from diffpolicy.learning.descent import compile_training, descend, restore, warmup_cosine
from diffpolicy.learning.imitator import Imitator
from diffpolicy.nets.ema import Ema
from diffpolicy.parts import DenoiserConfig, SamplerConfig, make_denoiser, make_encoder, make_planner


@dataclass(frozen=True)
class ActorConfig:
    """How the network that acts is trained."""

    learning_rate: float = 3e-4
    """Peak rate of AdamW, falling to zero along half a cosine."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    """Largest decay of the averaged weights, which are the ones that act."""


class Actor:
    """A denoiser in training: its model, the average of its weights, its optimizer.

    Args:
        denoiser: the network.
        sampler: how chunks are sampled from it.
        config: of the optimizer.
        spec: sizes.
        normalizer: fitted.
        steps: length of the run, for the learning rate.
        device: where to train.
    """

    def __init__(
        self,
        denoiser: DenoiserConfig,
        sampler: SamplerConfig,
        config: ActorConfig,
        spec: Spec,
        normalizer: Normalizer,
        steps: int,
        device: torch.device,
    ) -> None:
        self.denoiser_config, self.sampler_config, self.config = denoiser, sampler, config
        self.spec, self.steps, self.updates = spec, steps, 0
        encoder = make_encoder(denoiser, spec, normalizer)
        self.model = Imitator(encoder, make_denoiser(denoiser, spec, normalizer)).to(device)
        self.ema = Ema(self.model, max_decay=config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.planner, self.averaged_planner = self._planner(self.model), self._planner(self.ema.module)

    def _planner(self, model: Imitator) -> Sample:
        return make_planner(model.denoiser, self.denoiser_config.clip, self.sampler_config)

    def noise(self, batch: int, generator: torch.Generator, times: int = 1) -> torch.Tensor:
        """Every draw of `times` samplings, `(times draws, B, Tp, Da)`."""
        shape = (times * self.planner.draws, batch, self.spec.horizon, self.spec.action_dim)
        return torch.randn(shape, generator=generator, device=generator.device)

    def sample(self, obs: Obs, noise: torch.Tensor) -> torch.Tensor:
        """Sample chunks `(B, Tp, Da)` after encoded observations; gradients reach the weights through every step."""
        return self.planner(self.model.encoder(obs), noise)

    @torch.no_grad()
    def sample_averaged(self, obs: Obs, noise: torch.Tensor) -> torch.Tensor:
        """Sample chunks with the averaged weights."""
        return self.averaged_planner(self.ema.module.encoder(obs), noise)

    def compile(self) -> None:
        """Have network and sampling compiled at the first step; see `compile_training`."""
        network, averaged = self.model.denoiser.network, self.ema.module.denoiser.network
        device = next(network.parameters()).device
        compile_training(network, device, self.planner)
        compile_training(averaged, device, self.averaged_planner)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return warmup_cosine(self.updates, self.steps, self.config.learning_rate, self.config.warmup_steps)

    def descend(self, loss: torch.Tensor) -> torch.Tensor:
        """Take one optimizer step on `loss` and move the average; return the gradient's norm before clipping."""
        rate = self.learning_rate
        self.updates += 1
        return descend(loss, self.model, self.optimizer, self.ema, rate, self.config.grad_clip)

    def state_dict(self) -> dict[str, Any]:
        """Return all that continuing needs."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        restore(self.optimizer, state["optimizer"])
        self.updates = state["updates"]
