r"""Samplers: each is one rule that takes a chunk from time `t` to the next time `s < t`; `sample` is the only loop.

With `D` the denoiser and `eps = (x_t - alpha_t D) / sigma_t`:

    Ddim(eta)   x_s = alpha_s D + sqrt(sigma_s^2 - v^2) eps + v z
                v   = eta sigma_s / sigma_t sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)
                eta = 1 is DDPM's ancestral step with its `fixed_small` variance, to the letter; eta = 0 is Euler's
                method on the probability flow (on the `flow` schedule: x_s = x_t + (s - t) velocity)
    Heun        the trapezoid of the same: the mean of (D, eps) at both ends of the leg
    DpmPP2M     second order in lambda = log(alpha / sigma), from the D of the leg before
    Mip         x_s = alpha_s D, from 0 at t = 1: two regressions, for networks that were trained for them

Times and scales are plain floats worked out once (`Leg`): a branch on a tensor would stop `torch.export` and CUDA
graphs, and cost each step. A sampler's memory is passed through, never kept.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from diffpolicy.diffusion.denoiser import Denoiser
from diffpolicy.diffusion.schedule import Schedule

Denoise = Callable[[torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Leg:
    """One step of a sampler, from `t` to `s < t`, with the scales at both ends; `s > t` puts noise back."""

    t: float
    alpha: float
    sigma: float
    s: float
    alpha_s: float
    sigma_s: float


def even(steps: int) -> tuple[float, ...]:
    """`steps` times at equal distances, from `t = 1` down to the last before 0 (`trailing` spacing in `diffusers`)."""
    if steps < 1:
        raise ValueError(f"sampling takes at least one step, not {steps}")
    return tuple(1 - i / steps for i in range(steps))


def legs(schedule: Schedule, times: Sequence[float], repeats: int = 1) -> list[Leg]:
    """Legs from each of `times` to the next, the last to exactly 0.

    With `repeats` above 1 each is taken that often, with its way back between: the path of RePaint (Lugmayr et al.
    2022, alg. 1, jump length 1).
    """
    if repeats < 1:
        raise ValueError(f"each step is taken at least once, not {repeats} times")
    points = [(t, *schedule(t)) for t in times] + [(0.0, 1.0, 0.0)]
    path = [(Leg(*start, *end), Leg(*end, *start)) for start, end in pairwise(points)]
    return [leg for there, back in path for leg in [there, back] * (repeats - 1) + [there]]


def renoise(x: torch.Tensor, leg: Leg, noise: torch.Tensor) -> torch.Tensor:
    """Put back the noise between `t` and `s > t`: a draw of `x_s` given `x_t` under the forward process."""
    ratio = leg.alpha_s / leg.alpha
    return ratio * x + math.sqrt(max(leg.sigma_s**2 - ratio**2 * leg.sigma**2, 0.0)) * noise


class Sampler(ABC):
    """A rule `t -> s` for one leg."""

    @abstractmethod
    def step(
        self, denoise: Denoise, x_t: torch.Tensor, leg: Leg, noise: torch.Tensor | None, memory: Any
    ) -> tuple[torch.Tensor, Any]:
        """Return `(x_s, memory)`; `noise` is this leg's own draw, or None for a deterministic sampler."""

    def times(self, steps: int) -> tuple[float, ...]:
        """Return the time at which each leg begins."""
        return even(steps)

    def draws(self, steps: int) -> int:
        """Return how many noise tensors one sampling needs, the start included."""
        return 1

    def evaluations(self, steps: int) -> int:
        """Return how often the network is evaluated in `steps` legs (`K`, NFE)."""
        return steps


@dataclass(frozen=True)
class Ddim(Sampler):
    """DDIM (Song et al. 2021, eq. 12), DDPM (Ho et al. 2020, eq. 7) at `eta = 1`, Euler at `eta = 0`."""

    eta: float = 0.0

    def step(
        self, denoise: Denoise, x_t: torch.Tensor, leg: Leg, noise: torch.Tensor | None, memory: Any
    ) -> tuple[torch.Tensor, Any]:
        """One leg; the last (`s = 0`) returns the posterior mean itself."""
        x = denoise(x_t, leg.t)
        eps = (x_t - leg.alpha * x) / leg.sigma
        ratio = leg.alpha / leg.alpha_s
        spread = max(leg.sigma**2 - ratio**2 * leg.sigma_s**2, 0.0)
        v = self.eta * leg.sigma_s / leg.sigma * math.sqrt(spread)
        x_s = leg.alpha_s * x + math.sqrt(max(leg.sigma_s**2 - v**2, 0.0)) * eps
        return (x_s if noise is None or v == 0.0 else x_s + v * noise), memory

    def draws(self, steps: int) -> int:
        """Return one draw for the start and, with `eta > 0`, one for each leg but the last."""
        return steps if self.eta > 0 else 1


@dataclass(frozen=True)
class Heun(Sampler):
    """Trapezoid on the probability flow, two evaluations a leg but one on the last (Karras et al. 2022, alg. 1).

    Written in `(alpha, sigma)` rather than `sigma / alpha`, which is unbounded at `t = 1`.
    """

    def step(
        self, denoise: Denoise, x_t: torch.Tensor, leg: Leg, noise: torch.Tensor | None, memory: Any
    ) -> tuple[torch.Tensor, Any]:
        """Predict with Euler, correct with the mean of both ends."""
        x = denoise(x_t, leg.t)
        eps = (x_t - leg.alpha * x) / leg.sigma
        x_s = leg.alpha_s * x + leg.sigma_s * eps
        if leg.sigma_s == 0.0:
            return x_s, memory
        x_end = denoise(x_s, leg.s)
        eps_end = (x_s - leg.alpha_s * x_end) / leg.sigma_s
        slope_alpha, slope_sigma = leg.alpha_s - leg.alpha, leg.sigma_s - leg.sigma
        return x_t + slope_alpha * (x + x_end) / 2 + slope_sigma * (eps + eps_end) / 2, memory

    def evaluations(self, steps: int) -> int:
        """Return two a leg, one on the last."""
        return 2 * steps - 1


@dataclass(frozen=True)
class DpmPP2M(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2), first order on the first leg and the last."""

    def step(
        self, denoise: Denoise, x_t: torch.Tensor, leg: Leg, noise: torch.Tensor | None, memory: Any
    ) -> tuple[torch.Tensor, Any]:
        """One leg; the memory is `(D, h)` of the leg before."""
        x = denoise(x_t, leg.t)
        if leg.sigma_s == 0.0:
            return x, None
        h = math.log(leg.alpha_s / leg.sigma_s) - math.log(leg.alpha / leg.sigma)
        estimate = x
        if memory is not None:
            x_before, h_before = memory
            estimate = x + h / (2 * h_before) * (x - x_before)
        x_s = leg.sigma_s / leg.sigma * x_t - leg.alpha_s * math.expm1(-h) * estimate
        return x_s, (x, h)


@dataclass(frozen=True)
class Mip(Sampler):
    """The minimal iterative policy (Pan et al. 2025): `a = D(alpha_s D(0, 1), s)`, at `s = 0.1` on the schedule `flow`.

    Nothing of it is random: the noise that it is given does not matter. One leg alone is plain regression.
    """

    s: float = 0.1

    def step(
        self, denoise: Denoise, x_t: torch.Tensor, leg: Leg, noise: torch.Tensor | None, memory: Any
    ) -> tuple[torch.Tensor, Any]:
        """One regression, scaled as the next expects it."""
        start = torch.zeros_like(x_t) if leg.t == 1.0 else x_t
        return leg.alpha_s * denoise(start, leg.t), memory

    def times(self, steps: int) -> tuple[float, ...]:
        """Return 1 and `s`; there are no more than two."""
        if steps not in (1, 2):
            raise ValueError(f"the minimal iterative policy takes one or two steps, not {steps}")
        return (1.0, self.s)[:steps]


def sample(
    denoiser: Denoiser, sampler: Sampler, noise: torch.Tensor, cond: torch.Tensor | None, steps: int, repeats: int = 1
) -> torch.Tensor:
    """Turn noise into a chunk.

    Args:
        denoiser: posterior mean, with its schedule.
        sampler: the rule of one leg.
        noise: every draw of this sampling, `(draws, B, Tp, Da)` with at least as many as `draws_of` says.
        cond: what conditions the network, `(B, C)` or None.
        steps: number of legs.
        repeats: how often each leg is taken (`legs`); more than 1 only helps where a part of the chunk is pinned.

    Returns:
        Chunk `(B, Tp, Da)` on the unit scale.
    """
    needed = draws_of(sampler, steps, repeats)
    if len(noise) < needed:
        raise ValueError(f"{sampler} with {steps} steps needs {needed} draws of noise, not {len(noise)}")
    x, memory = noise[0], None
    for i, leg in enumerate(legs(denoiser.schedule, sampler.times(steps), repeats)):
        draw = noise[i + 1] if i + 1 < len(noise) else None
        if leg.s > leg.t:
            assert draw is not None
            x, memory = renoise(x, leg, draw), None
        else:
            x, memory = sampler.step(lambda x_t, t: denoiser(x_t, t, cond), x, leg, draw, memory)
    return x


def draws_of(sampler: Sampler, steps: int, repeats: int) -> int:
    """Noise tensors that one sampling needs: with repeats, the start and one for each leg but the last."""
    return sampler.draws(steps) if repeats == 1 else steps * (2 * repeats - 1)


class Sample(nn.Module):
    """The planner that samples: `(cond, noise) -> chunk` in the unit box.

    Every draw of noise is multiplied by the temperature: below 1 samples spread less (Ajay et al. 2023). Of a Gaussian
    the standard deviation is multiplied by it and the mean stays, with every sampler here.
    """

    def __init__(
        self, denoiser: Denoiser, sampler: Sampler, steps: int, repeats: int = 1, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.sampler = sampler
        self.steps = steps
        self.repeats = repeats
        self.temperature = temperature

    @property
    def draws(self) -> int:
        """Noise tensors that one sampling needs."""
        return draws_of(self.sampler, self.steps, self.repeats)

    @property
    def evaluations(self) -> int:
        """Network evaluations of one sampling (`K`, NFE)."""
        return self.sampler.evaluations(self.steps) * self.repeats

    def forward(self, cond: torch.Tensor | None, noise: torch.Tensor) -> torch.Tensor:
        """Sample chunks `(B, Tp, Da)` from `cond (B, C)` and `noise (draws, B, Tp, Da)`."""
        scaled = noise if self.temperature == 1 else self.temperature * noise
        return sample(self.denoiser, self.sampler, scaled, cond, self.steps, self.repeats)
