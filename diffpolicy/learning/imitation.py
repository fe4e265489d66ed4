"""A whole agent that imitates and has no critics, all but its loss. What acts is the average of the weights."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.rewards import check_preference, preferred
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Batch, Windows
from diffpolicy.errors import SpecError
from diffpolicy.learning.descent import compile_training, descend, restore, warmup_cosine
from diffpolicy.learning.imitator import Imitator
from diffpolicy.nets.ema import Ema
from diffpolicy.parts import DenoiserConfig, SamplerConfig, make_denoiser, make_encoder, why_not
from diffpolicy.policy import Policy


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
    """Compile with torch.compile: the network, or on a CPU what is faster than our own there. Needs a C++ compiler,
    on a GPU a C compiler and Triton."""
    preference: float = 0.0
    """How much more often windows of good episodes are drawn: in proportion to exp(preference R), R in [0, 1] the
    return of the whole episode (return weighting, Hong et al. 2023: 10 with IQL and TD3+BC, 5 with CQL); 0 draws all
    alike."""


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
        SpecError: if the sampler is none that this agent trains for, the preference is impossible, or compiling is.
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
        check_preference(config.preference)
        self.spec, self.config, self.steps, self.seed = spec, config, steps, seed
        self.device = torch.device(device)
        self.normalizer = normalizer.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone: a user's GPUs keep theirs
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
        return Windows(preferred(episodes, self.config.preference), self.spec, device=device, only=only)

    def judged_windows(
        self, episodes: Episodes, judged: np.ndarray, device: str | torch.device, only: np.ndarray | None
    ) -> Windows:
        """Return windows whose reward is a number of their first step, `judged (N,)`, not summed over the chunk."""
        relabelled = replace(preferred(episodes, self.config.preference), reward=judged.astype(np.float32))
        return Windows(relabelled, self.spec, device=device, require_next=True, only=only, n_step=1)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine to zero at `steps`."""
        return warmup_cosine(step, self.steps, self.config.learning_rate, self.config.warmup_steps)

    def update(self, batch: Batch) -> dict[str, torch.Tensor | float]:
        """Take one optimizer step on an encoded batch; `loss`, `grad_norm` and `learning_rate`, still on the device."""
        rate = self.learning_rate(self.step)
        loss = self.loss(self.model, batch, self.generator)
        norm = descend(loss, self.model, self.optimizer, self.ema, rate, self.config.grad_clip)
        self.step += 1
        return {"loss": loss.detach(), "grad_norm": norm, "learning_rate": rate}

    def check(self) -> None:
        """Do nothing: whoever trains looks at the loss and its gradient."""

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
        restore(self.optimizer, state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]
