"""Denoisers: `D(x_t, t, cond) = E[x | x_t, cond]`, what every sampler and every guidance speaks.

A network `F` becomes a denoiser through two coefficients, one row a prediction, and trains on one loss line:

    D = c_skip x_t + c_out F(x_t, t, cond)            loss = (F - target)^2

    prediction     c_skip                     c_out                      target
    epsilon        1 / alpha                  -sigma / alpha             eps
    sample         0                          1                          x
    v_prediction   alpha / (alpha^2+sigma^2)  -sigma / (alpha^2+sigma^2) alpha eps - sigma x
    flow           1 / (alpha + sigma)        -sigma / (alpha + sigma)   eps - x

The target is computed from `x` and `eps`, never by dividing by `c_out`, which is 0 at `t = 0`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffpolicy.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Prediction:
    """What a network predicts: `coefficients(alpha, sigma) -> (c_skip, c_out)`, `target(x, eps, alpha, sigma)`."""

    coefficients: Callable[[Any, Any], tuple[Any, Any]]
    target: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


epsilon = Prediction(
    coefficients=lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    target=lambda x, eps, alpha, sigma: eps,
)
sample = Prediction(
    coefficients=lambda alpha, sigma: (0 * alpha, 1 + 0 * alpha),
    target=lambda x, eps, alpha, sigma: x,
)
v_prediction = Prediction(
    coefficients=lambda alpha, sigma: (
        alpha / (alpha * alpha + sigma * sigma),
        -sigma / (alpha * alpha + sigma * sigma),
    ),
    target=lambda x, eps, alpha, sigma: alpha * eps - sigma * x,
)
flow = Prediction(
    coefficients=lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    target=lambda x, eps, alpha, sigma: eps - x,
)


def diffuse(x: torch.Tensor, eps: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Forward process, `x_t = alpha x + sigma eps`."""
    return alpha * x + sigma * eps


def broadcast(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give `t`, of shape `(B,)` or `(B, Tp)`, trailing axes until it multiplies `like`, of shape `(B, Tp, Da)`."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


class Denoiser(nn.Module, ABC):
    """`forward(x_t, t, cond) -> E[x | x_t, cond]`, with the schedule that defines what `x_t` is."""

    schedule: Schedule

    @abstractmethod
    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Posterior mean of the clean chunk, shape of `x_t` `(B, Tp, Da)`; `t` a float, `(B,)` or `(B, Tp)`."""


class NetworkDenoiser(Denoiser):
    """A network with a prediction; `network(x_t, t, cond)` takes `t` as a tensor `(B,)`, some also `(B, Tp)`."""

    def __init__(self, network: nn.Module, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction = prediction

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """`c_skip x_t + c_out F(x_t, t, cond)`."""
        if isinstance(t, torch.Tensor):
            c_skip, c_out = self.prediction.coefficients(*self.schedule(broadcast(t, x_t)))
        else:
            c_skip, c_out = self.prediction.coefficients(*self.schedule(t))
            t = x_t.new_full((x_t.shape[0],), t)
        return c_skip * x_t + c_out * self.network(x_t, t, cond)

    def loss(self, x: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Squared error in the network's own units, elementwise `(B, Tp, Da)`; `t` is `(B,)` or `(B, Tp)`."""
        alpha, sigma = self.schedule(broadcast(t, x))
        output = self.network(diffuse(x, eps, alpha, sigma), t, cond)
        return (output - self.prediction.target(x, eps, alpha, sigma)) ** 2
