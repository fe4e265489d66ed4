"""Value guidance in the style of Diffuser (Janner et al. 2022): imitate, value noised chunks, and sample uphill.

    G    = sum_k gamma^k r_k to the end of the episode, standardised over the data
    L    = E | F(x_t, t, s) - target |^2                  the imitation loss
    L_J  = E (J(x_t, t, s) - G)^2,                        x_t = alpha x + sigma eps at random times
    act:  D(x_t, s) + w sigma^2 / alpha grad J(x_t, t, s);   of N such samples the one of highest J(x, 0, s)

`J` learns `E[G | x_t, s]`, so its slope says at every time of sampling where better chunks are.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from diffpolicy.data import rewards
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.windows import Batch, Windows
from diffpolicy.diffusion.denoiser import NetworkDenoiser, broadcast, diffuse
from diffpolicy.errors import SpecError
from diffpolicy.guides import ValueGuidance
from diffpolicy.learning.critics import spread_out
from diffpolicy.learning.imitation import Imitation, ImitationConfig
from diffpolicy.learning.imitator import Imitator, stratified_times
from diffpolicy.nets.critic import NoisedValue
from diffpolicy.parts import (
    CriticConfig,
    DenoiserConfig,
    SamplerConfig,
    Selection,
    SelectionConfig,
    make_noised_value,
)
from diffpolicy.policy import Policy

UNET = DenoiserConfig(down_dims=(32, 64, 128, 256), step_embed_dim=32, prediction="sample")


@dataclass(frozen=True)
class DiffuserConfig(ImitationConfig):
    """Settings of value guidance; the defaults are Diffuser's for locomotion where it has them."""

    denoiser: DenoiserConfig = field(default_factory=lambda: UNET)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("ddpm", 20))
    learning_rate: float = 2e-4
    """Peak rate of AdamW."""
    value: CriticConfig = field(default_factory=lambda: CriticConfig(members=1, layer_norm=True, activation="mish"))
    selection: SelectionConfig = field(default_factory=lambda: SelectionConfig(samples=64))
    guidance: ValueGuidance = field(default_factory=lambda: ValueGuidance(weight=3.0))
    """w, in units of 1 / standard deviation of the returns, and the diffusion time at which guidance ends."""
    gamma: float = 0.997
    """Discount a step of the return."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise SpecError(f"got gamma {self.gamma}; wanted it in [0, 1]")


class ValuedImitator(Imitator):
    """What is trained: encoder, denoiser, and J, which shares no weight with them."""

    def __init__(self, encoder: nn.Module, denoiser: NetworkDenoiser, value: NoisedValue) -> None:
        super().__init__(encoder, denoiser)
        self.value = value

    def value_loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """L_J of an encoded batch, summed over the members."""
        x = batch.action
        t = stratified_times(len(x), generator, x.device)
        eps = torch.randn(x.shape, generator=generator, device=x.device)
        x_t = diffuse(x, eps, *self.value.scales(broadcast(t, x)))
        return (self.value(x_t, t, self.encoder(batch.obs).detach()) - batch.reward).square().mean(1).sum()


class Diffuser(Imitation[DiffuserConfig]):
    """An imitator whose samples a value of noised chunks bends and chooses.

    Raises:
        SpecError: if its network is to continue chunks that another began.
    """

    def make_model(self) -> ValuedImitator:
        """Return imitator and value, fresh."""
        if self.config.denoiser.max_delay:
            raise SpecError(
                "value guidance asks for one diffusion time of the whole chunk, and a network that continues "
                "chunks has one for each action; leave out --denoiser.max-delay"
            )
        imitator, config = super().make_model(), self.config
        value = make_noised_value(config.value, config.denoiser, self.spec, self.normalizer)
        return ValuedImitator(imitator.encoder, imitator.denoiser, value)

    def windows(
        self, episodes: Episodes, device: str | torch.device = "cpu", only: np.ndarray | None = None
    ) -> Windows:
        """Return windows whose reward is G, standardised over all episodes, those not chosen included."""
        returns = rewards.returns_to_go(episodes, self.config.gamma)
        return self.judged_windows(episodes, _standardised(returns, returns), device, only)

    def loss(self, model: Imitator, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """L + L_J: no weight is in both."""
        assert isinstance(model, ValuedImitator)
        return model.loss(batch, generator, self.config.bf16) + model.value_loss(batch, generator)

    @torch.no_grad()
    def statistics(self, batch: Batch, seed: int = 0) -> dict[str, float | torch.Tensor]:
        """Describe J of the averaged weights on an encoded batch, with noise from `seed`.

        `value_loss` is L_J (below 1, J knows more than the mean of the returns), `q_data` and `q_policy` are J of the
        data's chunks and of the policy's own, in standard deviations of the returns, `advantage` is the difference.
        """
        averaged, policy = self.ema.module, self.policy()
        assert isinstance(averaged, ValuedImitator)
        loss = averaged.value_loss(batch, torch.Generator(self.device).manual_seed(seed))
        noise = policy.draw(len(batch.action), torch.Generator(self.device).manual_seed(seed))
        cond = policy.encoder(batch.obs)
        data, own = (averaged.value.value(cond, x) for x in (batch.action, policy.planner(cond, noise)))
        return {
            "value_loss": float(loss),
            "q_data": float(data.mean()),
            "q_policy": float(own.mean()),
            "advantage": data - own,
        }

    @torch.no_grad()
    def hindsight(self, played: Episodes, data: Episodes, every: int) -> dict[str, float]:
        """Compare J of each `every`-th step's chunk with its G, in standard deviations of the data's returns.

        `monte_carlo` is the mean G, `overestimation` how much higher J is, as `learning/critics.py` has them; but a
        time limit ends a return here, as it does in training. Nothing where no step has a recorded next observation.
        """
        averaged, windows = self.ema.module, Windows(played, self.spec, require_next=True)
        assert isinstance(averaged, ValuedImitator)
        if not len(windows):
            return {}
        step = windows.rows - windows.start[windows.episode].repeat_interleave(windows.count)
        index = spread_out((step % every == 0).nonzero().squeeze(-1))
        batch = self.normalizer.encode(windows.gather(index).to(self.device))
        value = averaged.value.value(averaged.encoder(batch.obs), batch.action).double().cpu().numpy()
        found, known = (rewards.returns_to_go(each, self.config.gamma) for each in (played, data))
        followed = _standardised(found[windows.rows[index]], known)
        return {"overestimation": float((value - followed).mean()), "monte_carlo": float(followed.mean())}

    def policy(self) -> Policy:
        """Return the policy of the averaged weights as they stand, guided; it shares them with the agent."""
        averaged, config = self.ema.module, self.config
        assert isinstance(averaged, ValuedImitator)
        parts = (self.spec, self.normalizer, averaged.encoder, averaged.denoiser, config.denoiser, config.sampler)
        return Policy(*parts, self.seed, Selection(averaged.value, config.value, config.selection), config.guidance)


def _standardised(returns: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Returns in standard deviations of the data's, from their mean."""
    return (returns - data.mean()) / max(float(data.std()), 1e-8)


# Differences from the original (jannerm/diffuser):
#   1. chunks of actions are diffused, conditioned on recent observations, and their executed part is played; the
#      original diffuses 32 states and actions together, puts the current state in, and plays the first action, whose
#      loss it weighs by 10;
#   2. the slope is that of returns in standard deviations of the data's, and moves the estimate of the clean chunk by w
#      sigma^2 / alpha of it, at any sampler; the original moves x_t itself by w Sigma_t before it takes the mean, twice
#      a step, with w 0.1 in units of reward (0.0001 to 0.1). With 20 steps a move here is 1.25 to 2.2 times Sigma_t;
#   3. it ends at t = 0.1, as theirs of 20 steps two before the end (four on halfcheetah and hopper-medium-expert);
#   4. J is a network of plain layers that sees alpha x_t, not half a U-Net that sees x_t; its slope falls with alpha as
#      the true one does. Candidates (64, as theirs) are ranked by J of the finished chunk, there of the last input;
#   5. no penalty is added where an episode ends truly; a time limit ends a return, as in the original;
#   6. both losses are descended by one AdamW, whose clipped norm is that of both; its betas, decay and rate and the
#      average are this library's imitation's, theirs Adam's at a constant rate, without clipping, 0.995 every 10 steps;
#   7. estimates are clipped to the box of the actions (theirs are not), diffusion time is continuous, and Janner et
#      al.'s cosine schedule and 20 steps of DDPM are one choice of many.
