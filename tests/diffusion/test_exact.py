"""Analytic denoisers against what they claim to be: integrals over the data, and Tweedie's formula by autograd."""

import pytest
import torch

from diffpolicy.diffusion.denoiser import broadcast
from diffpolicy.diffusion.exact import Mixture, finite_dataset, gaussian
from diffpolicy.diffusion.schedule import Cosine, Flow, Linear, Schedule

SCHEDULES = {"linear": Linear(), "cosine": Cosine(), "flow": Flow()}
TIMES = [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def double(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_normal(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - std.log()


def log_marginal(exact: Mixture, std: torch.Tensor, weights: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor):
    """Log density of `x_t` up to a constant, from the definition, `(B,)`."""
    alpha, sigma = exact.schedule(broadcast(t, x_t))
    spread = (alpha**2 * std**2 + sigma**2).sqrt()
    each = [log_normal(x_t, alpha * mean, spread).sum((1, 2)) for mean in exact.means]
    return torch.logsumexp(torch.stack(each, -1) + weights.log(), -1)


def integrate(x: torch.Tensor, log_prior: torch.Tensor, x_t: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """`E[x | x_t]` by summing over a grid of points `x (G, D)` with `log_prior (G,)`; `x_t (B, D)` to `(B, D)`."""
    log_likelihood = -0.5 * ((x_t[:, None] - alpha * x) / sigma).square().sum(-1)
    return (log_prior + log_likelihood).softmax(-1) @ x


@every_schedule
def test_a_mixture_of_3_equals_the_integral_over_its_density_to_1e_9(schedule: Schedule):
    means, std, weights = double([-0.8, 0.1, 0.7]), 0.15, double([0.2, 0.5, 0.3])
    x = torch.linspace(-4, 4, 20_001, dtype=torch.float64)[:, None]
    log_prior = torch.logsumexp(weights.log() + log_normal(x, means, double([std])), -1)
    x_t = torch.linspace(-2, 2, 13, dtype=torch.float64)[:, None]
    for t in TIMES:
        expected = integrate(x, log_prior, x_t, *schedule(t))
        estimate = Mixture(schedule, means.reshape(3, 1, 1), std, weights)(x_t[..., None], t)
        assert (estimate.squeeze(-1) - expected).abs().max() < 1e-9


@every_schedule
def test_a_chunk_of_2_actions_equals_the_integral_over_the_plane_to_1e_9(schedule: Schedule):
    """The modes of a chunk are chosen as a whole: neither action alone says which."""
    means, std = double([[-0.5, -0.5], [0.5, 0.4], [-0.4, 0.6]]), double([0.2, 0.3])
    axis = torch.linspace(-3, 3, 401, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis)
    log_prior = torch.logsumexp(log_normal(plane[:, None], means, std).sum(-1), -1)
    x_t = double([[0.3, -0.8], [-0.2, 0.1], [1.5, 1.0]])
    for t in [0.1, 0.4, 0.8, 1.0]:
        expected = integrate(plane, log_prior, x_t, *schedule(t))
        estimate = Mixture(schedule, means[..., None], std[:, None])(x_t[..., None], t)
        assert (estimate.squeeze(-1) - expected).abs().max() < 1e-9


@every_schedule
@pytest.mark.parametrize("per_action", [False, True], ids=["one_time_a_chunk", "one_time_an_action"])
def test_a_mixture_obeys_tweedies_formula_by_autograd_to_1e_9(schedule: Schedule, per_action: bool):
    """`E[x | x_t] = (x_t + sigma^2 grad log p(x_t)) / alpha` (Efron 2011), elementwise."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    std = 0.1 + 0.4 * torch.rand(3, 2, generator=generator, dtype=torch.float64)
    weights = double([0.1, 0.2, 0.3, 0.4])
    exact = Mixture(schedule, means, std, 7 * weights)
    x_t = torch.randn(len(TIMES), 3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    t = double(TIMES)
    if per_action:
        t = torch.stack([t, t.flip(0), t.roll(3)], dim=1)
    (score,) = torch.autograd.grad(log_marginal(exact, std, weights, x_t, t).sum(), x_t)
    alpha, sigma = schedule(broadcast(t, x_t))
    expected = (x_t + sigma**2 * score) / alpha
    assert (exact(x_t, t) - expected).abs().max() < 1e-9


@every_schedule
def test_a_gaussian_is_the_line_between_its_mean_and_the_observation(schedule: Schedule):
    """`E[x | x_t] = m + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha m)`, element by element."""
    mean, std = double([[0.2, -0.5], [0.9, 0.0]]), double([[0.1, 0.5], [1.0, 2.0]])
    x_t = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in TIMES:
        alpha, sigma = schedule(t)
        expected = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)
        assert (gaussian(schedule, mean, std)(x_t, t) - expected).abs().max() < 1e-12


@every_schedule
def test_at_time_0_a_gaussian_returns_its_input(schedule: Schedule):
    x = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (gaussian(schedule, x[0], 0.5)(x, 0.0) - x).abs().max() < 1e-12


@every_schedule
def test_a_finite_dataset_returns_the_nearest_of_50_chunks_as_the_noise_goes_to_0(schedule: Schedule):
    generator = torch.Generator().manual_seed(0)
    data = 2 * torch.rand(50, 4, 2, generator=generator, dtype=torch.float64) - 1
    x_t = 2 * torch.rand(200, 4, 2, generator=generator, dtype=torch.float64) - 1
    nearest = data[torch.cdist(x_t.flatten(1), data.flatten(1)).argmin(1)]
    worst = [(finite_dataset(schedule, data)(x_t, t) - nearest).flatten(1).norm(dim=1) for t in (1e-3, 1e-4, 1e-5)]
    shares = [(distance < 1e-6).double().mean().item() for distance in worst]
    assert shares == sorted(shares)
    assert shares[-1] > 0.99


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_at_time_0_a_finite_dataset_returns_its_own_chunks(schedule: Schedule, dtype: torch.dtype):
    data = torch.rand(20, 4, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert (finite_dataset(schedule, data)(data, 0.0) - data).abs().max() < 1e-6
    prefix_known = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=dtype).expand(20, 4)
    assert (finite_dataset(schedule, data)(data, prefix_known) - data).abs().max() < 1e-6


@every_schedule
def test_at_time_1_a_finite_dataset_returns_its_mean_within_1_percent(schedule: Schedule):
    data = 2 * torch.rand(50, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    noise = torch.randn(100, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (finite_dataset(schedule, data)(noise, 1.0).mean(0) - data.mean(0)).abs().max() < 1e-2


def test_an_exact_denoiser_moves_to_double_precision_as_every_module_does():
    exact = gaussian(Flow(), torch.zeros(3, 2), 0.5).double()
    estimate = exact(torch.zeros(1, 3, 2, dtype=torch.float64), 0.5)
    assert exact.means.dtype == estimate.dtype == torch.float64
