"""What agents that learn to denoise the data's chunks share: the model, its loss, the optimizer, the average.

    L = E | F(alpha x + sigma eps, t, cond) - target |^2,   t ~ U(0, 1], stratified,   eps ~ N(0, I),   no padding

What acts is the average of the weights. `Actor` is the part of an agent that also has critics; `Imitation` is a whole
agent that has none, all but its loss.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from diffpolicy.compiler import why_no_compiler
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Batch, Obs, Windows
from diffpolicy.diffusion.denoiser import NetworkDenoiser
from diffpolicy.diffusion.sampler import Sample
from diffpolicy.errors import SpecError
from diffpolicy.nets.ema import Ema
from diffpolicy.nets.norm import fuse_norms
from diffpolicy.nets.prefixed import Prefixed
from diffpolicy.parts import DenoiserConfig, SamplerConfig, make_denoiser, make_encoder, make_planner, why_not
from diffpolicy.policy import Policy

T_MIN = 0.005


class Imitator(nn.Module):
    """What is trained: the encoder of the observations and the denoiser of the actions."""

    def __init__(self, encoder: nn.Module, denoiser: NetworkDenoiser) -> None:
        super().__init__()
        self.encoder = encoder
        self.denoiser = denoiser

    def forward(self, batch: Batch, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Elementwise loss `(B, Tp, Da)` of an encoded batch."""
        return self.denoiser.loss(batch.action, t, eps, self.encoder(batch.obs))

    def loss(self, batch: Batch, generator: torch.Generator, bf16: bool = False) -> torch.Tensor:
        """Return the loss of an encoded batch at random times, averaged over its real actions.

        A network that continues chunks sees the first of them clean, at time 0, and those do not count.
        """
        x, valid, network = batch.action, batch.valid, self.denoiser.network
        t = stratified_times(len(x), generator, x.device)
        eps = torch.randn(x.shape, generator=generator, device=x.device)
        if isinstance(network, Prefixed):
            clean = network.prefixes(len(x), x.shape[1], generator, x.device)
            t, valid = torch.where(clean, 0.0, t.unsqueeze(-1)), valid & ~clean
        with autocast(x.device, bf16):
            error = self(batch, t, eps)
        return mean_of_real(error, valid)


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Return the context that computes in bfloat16 where it is asked for and the device is CUDA."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")


def mean_of_real(error: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of an elementwise error `(B, Tp, Da)` over the real actions, `valid (B, Tp)`; 0 where there is none."""
    return (error.float() * valid.unsqueeze(-1)).sum() / (valid.sum().clamp(min=1) * error.shape[-1])


def stratified_times(n: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Uniform times in `(T_MIN, 1]`, one in each of n equal intervals, shuffled: less variance than free ones."""
    order = torch.randperm(n, generator=generator, device=device)
    u = (order + torch.rand(n, generator=generator, device=device)) / n
    return 1 - (1 - T_MIN) * u


def compile_training(network: nn.Module, device: torch.device) -> None:
    """Have a network compiled at its first training step: the U-Net's norms on a CPU, else all of it.

    Raises:
        SpecError: if there is no C++ compiler for a CPU.
    """
    reason = why_no_compiler() if device.type == "cpu" else ""
    if reason:
        raise SpecError(f"--compile {reason}, or leave it out")
    if device.type != "cpu" or not fuse_norms(network):
        network.compile()


def warmup_cosine(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """Learning rate: linear warm-up (at most a tenth of the run), then half a cosine to zero at `steps`."""
    warmup = min(warmup_steps, max(steps // 10, 1))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


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

    def descend(self, loss: torch.Tensor) -> torch.Tensor:
        """Take one optimizer step on `loss` and move the average; return the gradient's norm before clipping."""
        rate = warmup_cosine(self.updates, self.steps, self.config.learning_rate, self.config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradient(self.model, self.config.grad_clip)
        self.optimizer.step()
        self.ema.update(self.model)
        self.updates += 1
        return norm

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
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


def clip_gradient(module: nn.Module, limit: float) -> torch.Tensor:
    """Shorten the gradient to a norm of `limit`; return its norm before, still on the device."""
    parameters = list(module.parameters())
    norm = nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
    if norm.device.type != "cpu" or not norm <= limit:  # multiplying by 1 would read and write it all
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


@dataclass(frozen=True)
class ImitationConfig:
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
    """Compile with torch.compile: the network, or on a CPU what is faster than our own there. Needs a C++ compiler."""


C = TypeVar("C", bound=ImitationConfig)


class Imitation(ABC, Generic[C]):
    """Trains a denoiser on encoded batches; `policy()` is the averaged one.

    Args:
        spec: sizes.
        normalizer: fitted.
        config: settings.
        steps: length of the run, for the learning rate.
        device: where to train.
        seed: of weights, times and noise.

    Raises:
        SpecError: if the sampler is none that this agent trains for, or compiling is asked for and impossible.
    """

    trained: ClassVar[SamplerConfig] = SamplerConfig()
    """A sampler that the network is trained for."""

    def __init__(
        self,
        spec: Spec,
        normalizer: Normalizer,
        config: C,
        steps: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        if reason := why_not(config.sampler, self.trained, config.denoiser.prediction):
            raise SpecError(reason)
        self.spec, self.config, self.steps, self.seed = spec, config, steps, seed
        self.device = torch.device(device)
        self.normalizer = normalizer.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = self.make_model().to(self.device)
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
            compile_training(self.model.denoiser.network, self.device)
        self.policy()  # an impossible sampler or guidance is refused now, not after the first thousand steps

    def make_model(self) -> Imitator:
        """Return what is trained, before its first step: fresh weights."""
        encoder = make_encoder(self.config.denoiser, self.spec, self.normalizer)
        return Imitator(encoder, make_denoiser(self.config.denoiser, self.spec, self.normalizer))

    @abstractmethod
    def loss(self, model: Imitator, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Return the loss of one encoded batch, averaged over the real actions."""

    def windows(
        self, episodes: Episodes, device: str | torch.device = "cpu", only: np.ndarray | None = None
    ) -> Windows:
        """Return what this agent learns from: every step of the episodes chosen."""
        return Windows(episodes, self.spec, device=device, only=only)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine to zero at `steps`."""
        return warmup_cosine(step, self.steps, self.config.learning_rate, self.config.warmup_steps)

    def update(self, batch: Batch) -> dict[str, torch.Tensor | float]:
        """Take one optimizer step on an encoded batch; `loss`, `grad_norm` and `learning_rate`, still on the device."""
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.model, batch, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradient(self.model, self.config.grad_clip)
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

    def hindsight(self, played: Episodes, data: Episodes, every: int) -> dict[str, float]:
        """Return nothing: there are no values to compare with what followed."""
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
