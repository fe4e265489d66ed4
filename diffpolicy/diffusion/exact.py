r"""Analytic denoisers: the truth that tests and documents use.

For data from a mixture of Gaussians `sum_k w_k N(m_k, s^2 I)` (variance per element), given `x_t`,

    E[x | x_t] = sum_k p_k(x_t) (m_k + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha m_k))
    p_k(x_t)  ~  w_k N(x_t; alpha m_k, alpha^2 s^2 + sigma^2)

One component is a Gaussian; `s = 0` is a finite dataset (the denoiser that an unlimited network would learn). For a
Gaussian `N(m, C)` whose actions correlate over time, with `A` and `S` the diagonals of alpha and sigma,

    E[x | x_t] = m + C A (A C A + S^2)^-1 (x_t - A m)
"""

import torch

from diffpolicy.diffusion.denoiser import Denoiser, broadcast
from diffpolicy.diffusion.schedule import Schedule


class Mixture(Denoiser):
    """Exact posterior mean under a mixture of Gaussians; ignores `cond`."""

    means: torch.Tensor
    variance: torch.Tensor
    log_weights: torch.Tensor

    def __init__(
        self, schedule: Schedule, means: torch.Tensor, std: torch.Tensor | float, weights: torch.Tensor | None = None
    ) -> None:
        """Means `(M, Tp, Da)`, standard deviation broadcast against `(Tp, Da)`, weights `(M,)` (equal if None)."""
        super().__init__()
        self.schedule = schedule
        variance = torch.as_tensor(std, dtype=means.dtype, device=means.device) ** 2
        weights = means.new_ones(len(means)) if weights is None else weights
        self.register_buffer("means", means)
        self.register_buffer("variance", variance.expand(means.shape[1:]).clone())
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        """`E[x | x_t]`, shape of `x_t` `(B, Tp, Da)`."""
        time = t if isinstance(t, torch.Tensor) else x_t.new_full((x_t.shape[0],), t)
        alpha, sigma = (scale.unsqueeze(1) for scale in self.schedule(broadcast(time, x_t)))
        marginal = alpha**2 * self.variance + sigma**2
        marginal = marginal.clamp(min=torch.finfo(marginal.dtype).eps ** 2)  # a finite dataset at sigma = 0: its limit
        residual = x_t.unsqueeze(1) - alpha * self.means
        log_likelihood = -0.5 * (residual**2 / marginal).flatten(2).sum(-1)
        posterior = (self.log_weights + log_likelihood).softmax(-1)[..., None, None]
        return (posterior * (self.means + alpha * self.variance / marginal * residual)).sum(1)


def gaussian(schedule: Schedule, mean: torch.Tensor, std: torch.Tensor | float) -> Mixture:
    """Denoiser of `N(mean, std^2)`, independent per element of a chunk `(Tp, Da)`."""
    return Mixture(schedule, mean[None], std)


def finite_dataset(schedule: Schedule, chunks: torch.Tensor) -> Mixture:
    """Denoiser of the empirical distribution of `chunks` `(M, Tp, Da)`."""
    return Mixture(schedule, chunks, 0.0)


class CorrelatedGaussian(Denoiser):
    """Exact posterior mean of `N(mean (Tp, Da), covariance (Tp, Tp))`, the same for every action dimension."""

    mean: torch.Tensor
    covariance: torch.Tensor

    def __init__(self, schedule: Schedule, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("mean", mean)
        self.register_buffer("covariance", covariance)

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        """`E[x | x_t]`, shape of `x_t` `(B, Tp, Da)`."""
        time = t if isinstance(t, torch.Tensor) else x_t.new_full((x_t.shape[0],), t)
        alpha, sigma = (scale.expand(*x_t.shape[:2], 1) for scale in self.schedule(broadcast(time, x_t)))
        scaled = self.covariance * alpha.mT
        marginal = alpha * scaled + torch.diag_embed(sigma.squeeze(-1) ** 2)
        return self.mean + scaled @ torch.linalg.solve(marginal, x_t - alpha * self.mean)

    def given(self, chunk: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `(B, Tp, Da)` and covariance `(Tp, Tp)` given the actions `known (Tp,)` bool of `chunk (B, Tp, Da)`."""
        cross = self.covariance[:, known]
        gain = cross @ torch.linalg.inv(self.covariance[known][:, known])
        return self.mean + gain @ (chunk - self.mean)[:, known], self.covariance - gain @ cross.mT
