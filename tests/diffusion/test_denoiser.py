"""Predictions: each inverts the forward process exactly, and the one loss is least at the exact denoiser."""

import pytest
import torch
from torch import nn

from diffpolicy.diffusion.denoiser import (
    NetworkDenoiser,
    Prediction,
    broadcast,
    diffuse,
    epsilon,
    flow,
    sample,
    v_prediction,
)
from diffpolicy.diffusion.exact import Mixture, gaussian
from diffpolicy.diffusion.schedule import Cosine, Flow, Linear, Schedule

PREDICTIONS = {"epsilon": epsilon, "sample": sample, "v_prediction": v_prediction, "flow": flow}
SCHEDULES = {"linear": Linear(), "cosine": Cosine(), "flow": Flow()}
TIMES = [1e-6, 1e-3, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0]

every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


class Oracle(nn.Module):
    """A network that answers with what it was told."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        return self.answer


class Posterior(nn.Module):
    """The network that an unlimited training would reach: the posterior mean of a prediction's target."""

    def __init__(self, exact: Mixture, prediction: Prediction) -> None:
        super().__init__()
        self.exact = exact
        self.prediction = prediction

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        x = self.exact(x_t, t)
        alpha, sigma = self.exact.schedule(broadcast(t, x_t))
        return self.prediction.target(x, (x_t - alpha * x) / sigma, alpha, sigma)


def chunks(batch: int, horizon: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean chunks in the unit box and noise, `(B, Tp, 2)` each."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(batch, horizon, 2, generator=generator, dtype=torch.float64) - 1
    return x, torch.randn(x.shape, generator=generator, dtype=torch.float64)


def per_action(batch: int, horizon: int) -> torch.Tensor:
    """A different time for each action, from 0 (a clean prefix) to 1, `(B, Tp)`."""
    return torch.linspace(0, 1, batch * horizon, dtype=torch.float64).reshape(horizon, batch).T.contiguous()


def invert(schedule: Schedule, prediction: Prediction, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the clean chunk and what the denoiser makes of it when its network gives the exact target."""
    x, eps = chunks(t.shape[0])
    alpha, sigma = schedule(broadcast(t, x))
    network = Oracle(prediction.target(x, eps, alpha, sigma))
    return x, NetworkDenoiser(network, schedule, prediction)(diffuse(x, eps, alpha, sigma), t, None)


def test_the_targets_of_x_3_and_eps_2_at_alpha_0_8_and_sigma_0_6():
    x, eps, alpha, sigma = (torch.tensor(value, dtype=torch.float64) for value in (3, 2, 0.8, 0.6))
    targets = {name: prediction.target(x, eps, alpha, sigma).item() for name, prediction in PREDICTIONS.items()}
    assert targets == pytest.approx({"epsilon": 2.0, "sample": 3.0, "v_prediction": -0.2, "flow": -1.0})
    assert diffuse(x, eps, alpha, sigma).item() == pytest.approx(3.6)


@every_schedule
@every_prediction
def test_the_exact_target_gives_back_the_clean_chunk_at_each_of_11_times(schedule: Schedule, prediction: Prediction):
    x, estimate = invert(schedule, prediction, torch.tensor(TIMES, dtype=torch.float64))
    assert (estimate - x).abs().max() < 1e-11


@every_schedule
@every_prediction
def test_the_exact_target_gives_back_the_clean_chunk_with_a_time_per_action(schedule: Schedule, prediction: Prediction):
    x, estimate = invert(schedule, prediction, per_action(6, 4))
    assert (estimate - x).abs().max() < 1e-11


@every_schedule
@every_prediction
def test_a_float_time_and_a_tensor_of_it_give_the_same_estimate(schedule: Schedule, prediction: Prediction):
    x_t, output = chunks(3)
    denoiser = NetworkDenoiser(Oracle(output), schedule, prediction)
    for t in TIMES:
        difference = denoiser(x_t, t, None) - denoiser(x_t, torch.full((3,), t, dtype=torch.float64), None)
        assert difference.abs().max() <= 1e-9 * denoiser(x_t, t, None).abs().max()


@every_schedule
@every_prediction
def test_the_loss_of_the_exact_target_is_0_and_of_an_error_of_3_is_9(schedule: Schedule, prediction: Prediction):
    x, eps = chunks(6)
    for t in [torch.tensor(TIMES[:6], dtype=torch.float64), torch.linspace(0, 1, 6).double(), per_action(6, 4)]:
        target = prediction.target(x, eps, *schedule(broadcast(t, x)))
        assert NetworkDenoiser(Oracle(target), schedule, prediction).loss(x, t, eps, None).abs().max() == 0
        loss = NetworkDenoiser(Oracle(target + 3), schedule, prediction).loss(x, t, eps, None)
        assert loss.shape == x.shape
        assert (loss - 9).abs().max() < 1e-12


@every_schedule
@every_prediction
def test_at_time_0_the_loss_and_its_gradient_are_finite(schedule: Schedule, prediction: Prediction):
    x, eps = (part.float() for part in chunks(5))
    for t in [torch.zeros(5), torch.zeros(5, 4)]:
        output = torch.zeros_like(x).requires_grad_()
        loss = NetworkDenoiser(Oracle(output), schedule, prediction).loss(x, t, eps, None)
        (gradient,) = torch.autograd.grad(loss.sum(), output)
        assert loss.isfinite().all() and gradient.isfinite().all()
        estimate = NetworkDenoiser(Oracle(output), schedule, prediction)(x, t, None)
        assert estimate.isfinite().all()


@every_schedule
def test_at_time_0_every_prediction_but_sample_returns_its_input_whatever_the_network_says(schedule: Schedule):
    x, output = chunks(5)
    for prediction in [epsilon, v_prediction, flow]:
        estimate = NetworkDenoiser(Oracle(output), schedule, prediction)(x, 0.0, None)
        assert (estimate - x).abs().max() < 1e-6


@every_schedule
def test_an_exact_denoiser_is_the_same_denoiser_under_all_4_predictions(schedule: Schedule):
    means = chunks(3, seed=1)[0]
    exact = Mixture(schedule, means, 0.3, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    x, eps = chunks(20)
    for t in [0.01, 0.1, 0.5, 0.9, 0.99, 1.0]:
        x_t = diffuse(x, eps, *schedule(broadcast(torch.full((20,), t, dtype=torch.float64), x)))
        for prediction in PREDICTIONS.values():
            converted = NetworkDenoiser(Posterior(exact, prediction), schedule, prediction)
            assert (converted(x_t, t, None) - exact(x_t, t)).abs().max() < 1e-11


def least_loss(prediction: Prediction, alpha: float, sigma: float, std: float) -> float:
    """Posterior variance of the target for data `N(mean, std^2)`: what no denoiser can go below.

    With `x - E[x | x_t] = r` and so `eps - E[eps | x_t] = -alpha / sigma r`, `Var r = std^2 sigma^2 / marginal`.
    """
    factor = {
        epsilon: alpha,
        sample: sigma,
        v_prediction: alpha**2 + sigma**2,
        flow: alpha + sigma,
    }[prediction]
    return factor**2 * std**2 / (alpha**2 * std**2 + sigma**2)


@every_schedule
@every_prediction
def test_the_exact_denoiser_has_the_least_loss_in_closed_form_within_4_standard_errors(
    schedule: Schedule, prediction: Prediction
):
    std, count = 0.4, 20_000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, count, 1, 1, generator=generator, dtype=torch.float64)
    x, eps = 0.2 + std * noise[0], noise[1]
    exact = gaussian(schedule, torch.full((1, 1), 0.2, dtype=torch.float64), std)
    denoiser = NetworkDenoiser(Posterior(exact, prediction), schedule, prediction)
    for t in [0.05, 0.3, 0.6, 0.95]:
        loss = denoiser.loss(x, torch.full((count,), t, dtype=torch.float64), eps, None)
        expected = least_loss(prediction, *schedule(t), std)
        assert abs(loss.mean().item() - expected) < 4 * loss.std().item() / count**0.5
