r"""Noise schedules: a time `t` in [0, 1] gives the scales of signal and noise, `x_t = alpha x + sigma eps`.

    alpha
      1 |***__                      linear   exp(-(b0 t + (b1 - b0) t^2 / 2) / 2)      sigma^2 = 1 - alpha^2
        |  *  ***__                 cosine   cos(pi/2 (t + c)/(1 + c)) / cos(pi/2 c/(1 + c))     likewise
        |    *     ***_             flow     1 - t                                     sigma = t
      0 +-------------- t = 1

`t = 1` is noise and `t = 0` is data. `alpha` never falls below `floor`, so that the noise prediction, which divides
by it, stays finite. A schedule takes a plain float (inside a sampler) or a tensor (inside a loss), and answers in kind.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

Time = TypeVar("Time", float, torch.Tensor)


def _apply(of_float: Callable[[float], float], of_tensor: Callable[[torch.Tensor], torch.Tensor], x: Time) -> Time:
    if isinstance(x, torch.Tensor):
        return of_tensor(x)
    return of_float(x)


class Schedule(ABC):
    """`schedule(t) -> (alpha, sigma)`, of the kind and shape of `t`."""

    floor: float

    @abstractmethod
    def signal(self, t: Time) -> Time:
        """Scale of the signal before the floor, decreasing from 1 at `t = 0`."""

    def noise(self, t: Time, alpha: Time) -> Time:
        """Scale of the noise; variance preserving unless a schedule says otherwise."""
        if isinstance(alpha, torch.Tensor):
            return (1 - alpha * alpha).clamp(min=0).sqrt()
        return math.sqrt(max(1 - alpha * alpha, 0.0))

    def __call__(self, t: Time) -> tuple[Time, Time]:
        """Return `(alpha, sigma)` at time `t`."""
        alpha = self.signal(t)
        alpha = alpha.clamp(min=self.floor) if isinstance(alpha, torch.Tensor) else max(alpha, self.floor)
        return alpha, self.noise(t, alpha)


@dataclass(frozen=True)
class Linear(Schedule):
    """Noise rate linear in time (Song et al. 2021, VP-SDE; Ho et al. 2020 in continuous time)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    floor: float = 1e-4

    def signal(self, t: Time) -> Time:
        """`exp(-1/2 int_0^t beta)`."""
        exponent = -self.beta_min * t / 2 - (self.beta_max - self.beta_min) * t * t / 4
        return _apply(math.exp, torch.exp, exponent)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Squared-cosine schedule (Nichol and Dhariwal 2021, eq. 17), `squaredcos_cap_v2` of `diffusers`.

    At `t = (k + 1) / 100` it equals the 100 discrete steps `k`, the last of which that definition caps at
    `beta = 0.999`: that cap is the floor here.
    """

    offset: float = 0.008
    floor: float = 4.928054666245e-4

    def signal(self, t: Time) -> Time:
        """`cos(pi/2 (t + c)/(1 + c))`, scaled to 1 at `t = 0`."""
        angle = (t + self.offset) / (1 + self.offset) * (math.pi / 2)
        start = math.cos(self.offset / (1 + self.offset) * math.pi / 2)
        return _apply(math.cos, torch.cos, angle) / start


@dataclass(frozen=True)
class Flow(Schedule):
    """Straight lines between noise and data, `x_t = (1 - t) x + t eps` (Lipman et al. 2023, Liu et al. 2023)."""

    floor: float = 5e-4

    def signal(self, t: Time) -> Time:
        """`1 - t`."""
        return 1 - t

    def noise(self, t: Time, alpha: Time) -> Time:
        """`t`."""
        return t
