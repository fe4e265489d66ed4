"""Imitation with a diffusion policy (Chi et al. 2023, "Diffusion Policy"): learn to denoise the data's chunks.

    L = E | F(alpha x + sigma eps, t, cond) - target |^2,   t ~ U(0, 1],   eps ~ N(0, I),   padded actions left out

with `target = eps`, the noise, by default.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Batch, Windows
from diffpolicy.imitation import Imitator, warmup_cosine
from diffpolicy.nets.ema import Ema
from diffpolicy.parts import DenoiserConfig, SamplerConfig, make_denoiser, make_encoder
from diffpolicy.policy import Policy


@dataclass(frozen=True)
class BcConfig:
    """Settings of imitation; the defaults are Chi et al.'s for Push-T from states, with gradient clipping."""

    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    learning_rate: float = 1e-4
    """Peak rate of AdamW."""
    betas: tuple[float, float] = (0.95, 0.999)
    """Moments of AdamW."""
    weight_decay: float = 1e-6
    """Decoupled weight decay."""
    warmup_steps: int = 500
    """Steps of linear warm-up, then a cosine to zero."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    ema_power: float = 0.75
    """Decay of the averaged weights is 1 - (1 + n)^-power."""
    bf16: bool = True
    """Autocast to bfloat16 on CUDA; float32 elsewhere."""
    compile: bool = False
    """Compile the network with torch.compile."""


class Bc:
    """Trains a denoiser on encoded batches; `policy()` is the averaged one.

    Args:
        spec: sizes.
        normalizer: fitted.
        config: settings.
        steps: length of the run, for the learning rate.
        device: where to train.
        seed: of weights, times and noise.
    """

    def __init__(
        self,
        spec: Spec,
        normalizer: Normalizer,
        config: BcConfig,
        steps: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        self.spec, self.config, self.steps, self.seed = spec, config, steps, seed
        self.device = torch.device(device)
        self.normalizer = normalizer.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = make_encoder(config.denoiser, spec, normalizer)
            denoiser = make_denoiser(config.denoiser, spec, normalizer)
        self.model = Imitator(encoder, denoiser).to(self.device)
        self.ema = Ema(self.model, config.ema_power)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.step = 0
        if config.compile:
            self.model.denoiser.network.compile()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine to zero at `steps`."""
        return warmup_cosine(step, self.steps, self.config.learning_rate, self.config.warmup_steps)

    def loss(self, model: Imitator, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Return the noise-prediction loss (or its kin) of one encoded batch, averaged over the real actions."""
        return model.loss(batch, generator, self.config.bf16)

    def windows(
        self, episodes: Episodes, device: str | torch.device = "cpu", only: np.ndarray | None = None
    ) -> Windows:
        """Return what this agent learns from: every step of the episodes chosen."""
        return Windows(episodes, self.spec, device=device, only=only)

    def update(self, batch: Batch) -> dict[str, torch.Tensor | float]:
        """Take one optimizer step on an encoded batch; `loss`, `grad_norm` and `learning_rate`, still on the device."""
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.model, batch, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.ema.update(self.model)
        self.step += 1
        return {"loss": loss.detach(), "grad_norm": norm, "learning_rate": rate}

    @torch.no_grad()
    def validation_loss(self, batch: Batch, seed: int = 0) -> float:
        """Return the averaged weights' loss on an encoded batch, with times and noise from `seed`."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return float(self.loss(self.ema.module, batch, generator))

    def statistics(self, batch: Batch, seed: int = 0) -> dict[str, float]:
        """Return nothing: there are no critics to describe."""
        return {}

    def policy(self) -> Policy:
        """Return the policy of the averaged weights as they stand; it shares them with the agent."""
        averaged, config = self.ema.module, self.config
        return Policy(
            self.spec, self.normalizer, averaged.encoder, averaged.denoiser, config.denoiser, config.sampler, self.seed
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that continuing needs."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]


# Differences from the original (Chi et al. 2023, train_diffusion_unet_lowdim):
#   1. times are continuous in (0, 1] and stratified over the batch, not one of 100; at t = (k+1)/100 all is equal;
#   2. padded actions do not count in the loss; the original trains on the repeated last action;
#   3. the gradient's norm is clipped;
#   4. validation holds out the fraction of episodes asked for; the original's held out all but its 90;
#   5. the averaged weights' counter is saved, so a resumed run continues the average.
