"""Samplers against closed forms.

For data `N(m, s^2)` the probability flow keeps `z` in `x_t = alpha m + sqrt(alpha^2 s^2 + sigma^2) z`, so every
deterministic sampler has an exact answer; every step is linear, so a stochastic one has an exact mean and variance.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from diffpolicy.diffusion.denoiser import Denoiser, NetworkDenoiser, flow
from diffpolicy.diffusion.exact import Mixture, gaussian
from diffpolicy.diffusion.sampler import Ddim, DpmPP2M, Heun, Leg, Sample, Sampler, even, legs, sample
from diffpolicy.diffusion.schedule import Cosine, Flow, Linear, Schedule

SCHEDULES = {"linear": Linear(), "cosine": Cosine(), "flow": Flow()}
DETERMINISTIC = {"ddim": Ddim(), "heun": Heun(), "dpm++2m": DpmPP2M()}
SAMPLERS = {**DETERMINISTIC, "ddim_eta_0.5": Ddim(0.5), "ddpm": Ddim(1.0)}
ORDER = {"ddim": 1, "heun": 2, "dpm++2m": 2}
COUNTS = [16, 32, 64, 128, 256]

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
every_deterministic = pytest.mark.parametrize("name", DETERMINISTIC)

MEAN = torch.tensor([[0.2], [-0.5], [0.0]], dtype=torch.float64)
STD = torch.tensor([[0.2], [0.4], [0.7]], dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_the_flow(schedule: Schedule, z: torch.Tensor, t: float) -> torch.Tensor:
    """Where the probability flow of `N(MEAN, STD^2)` is at `t`, for the trajectory of `z`."""
    alpha, sigma = schedule(t)
    return alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * z


def order(errors: list[float], counts: list[int]) -> float:
    """Least-squares slope of `-log(error)` over `log(count)`."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (counts, errors))
    x = x - x.mean()
    return -(x @ y / (x @ x)).item()


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


class Watched(Denoiser):
    """A denoiser that writes down each time it is asked for, and each input."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.times: list[float] = []
        self.inputs: list[torch.Tensor] = []

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        assert isinstance(t, float)
        self.times.append(t)
        self.inputs.append(x_t)
        return self.denoiser(x_t, t, cond)


# --- legs ---


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 100])
def test_legs_join_up_from_time_1_to_clean_data_in_equal_steps(schedule: Schedule, steps: int):
    path = legs(schedule, even(steps))
    assert len(path) == steps
    assert (path[0].t, path[0].alpha, path[0].sigma) == (1.0, *schedule(1.0))
    assert (path[-1].s, path[-1].alpha_s, path[-1].sigma_s) == (0.0, 1.0, 0.0)
    for leg, following in pairwise(path):
        assert (leg.s, leg.alpha_s, leg.sigma_s) == (following.t, following.alpha, following.sigma)
    assert [leg.t - leg.s for leg in path] == pytest.approx([1 / steps] * steps)


@pytest.mark.parametrize("steps", [0, -1])
def test_fewer_than_1_step_is_refused(steps: int):
    with pytest.raises(ValueError, match=f"at least one step, not {steps}"):
        legs(Cosine(), even(steps))


# --- order of convergence on the probability flow of a Gaussian ---


@every_schedule
@every_deterministic
def test_between_times_0_9_and_0_1_ddim_has_order_1_and_heun_and_dpm_pp_2m_order_2(name: str, schedule: Schedule):
    exact, z, errors = gaussian(schedule, MEAN, STD), randn(64, 3, 1), []
    for count in COUNTS:
        times = [0.9 - 0.8 * i / count for i in range(count + 1)]
        x, memory = on_the_flow(schedule, z, 0.9), None
        for t, s in pairwise(times):
            x, memory = DETERMINISTIC[name].step(exact, x, Leg(t, *schedule(t), s, *schedule(s)), None, memory)
        errors.append(rms(x - on_the_flow(schedule, z, 0.1)))
    assert order(errors, COUNTS) == pytest.approx(ORDER[name], abs=0.1)
    assert errors[-1] < {1: 2e-3, 2: 1.2e-5}[ORDER[name]]


def whole_path_errors(sampler: Sampler, schedule: Schedule, counts: list[int]) -> list[float]:
    exact, z = gaussian(schedule, MEAN, STD), randn(64, 3, 1)
    noise, data = on_the_flow(schedule, z, 1.0)[None], on_the_flow(schedule, z, 0.0)
    return [rms(sample(exact, sampler, noise, None, count) - data) for count in counts]


@every_schedule
def test_from_noise_to_data_ddim_has_order_1(schedule: Schedule):
    assert order(whole_path_errors(Ddim(), schedule, COUNTS), COUNTS) == pytest.approx(1, abs=0.06)


def test_from_noise_to_data_heun_has_order_2_on_flow():
    assert order(whole_path_errors(Heun(), Flow(), COUNTS), COUNTS) == pytest.approx(2, abs=0.06)


@every_schedule
@pytest.mark.parametrize("sampler", [Heun(), DpmPP2M()], ids=["heun", "dpm++2m"])
def test_from_noise_to_data_the_second_order_samplers_beat_order_1_25_and_a_third_of_ddims_error(
    schedule: Schedule, sampler: Sampler
):
    """Less than 2 where the last leg, of first order, is what remains: see the next test."""
    errors = whole_path_errors(sampler, schedule, COUNTS)
    ddims = whole_path_errors(Ddim(), schedule, COUNTS[2:])
    assert order(errors, COUNTS) > 1.25
    assert all(ours < ddim / 3 for ours, ddim in zip(errors[2:], ddims, strict=True))


@every_schedule
@every_deterministic
def test_the_last_leg_shrinks_the_deviation_by_its_closed_form(name: str, schedule: Schedule):
    """It returns the posterior mean, short of the data by `1 / sqrt(1 + (sigma / (alpha s))^2)`.

    `sigma^2` falls like `t` on linear and cosine and like `t^2` on flow: that is the order of what is left.
    """
    exact, z = gaussian(schedule, MEAN, STD), randn(16, 3, 1)
    for steps in [5, 10, 100]:
        last = legs(schedule, even(steps))[-1]
        x, _ = DETERMINISTIC[name].step(exact, on_the_flow(schedule, z, last.t), last, None, (z, 1.0))
        shrunk = 1 / (1 + (last.sigma / (last.alpha * STD)) ** 2).sqrt()
        assert (x - (MEAN + shrunk * STD * z)).abs().max() < 1e-12


@every_schedule
@every_deterministic
def test_in_one_step_every_deterministic_sampler_returns_the_posterior_mean_of_the_noise(name: str, schedule: Schedule):
    exact, noise = gaussian(schedule, MEAN, STD), randn(1, 8, 3, 1)
    x = sample(exact, DETERMINISTIC[name], noise, None, 1)
    assert (x - exact(noise[0], 1.0)).abs().max() < 1e-12


# --- Euler on straight lines ---


class Velocity(nn.Module):
    """Any smooth function of input and time."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        return torch.sin(3 * x_t) + t[:, None, None] * x_t.roll(1, 1)


def test_ddim_on_flow_is_eulers_method_x_plus_s_minus_t_times_velocity_to_1e_13():
    """To the letter on each of 10 legs but the first, where the floor of `alpha` adds `5e-4 D` (next test)."""
    denoiser, x = NetworkDenoiser(Velocity(), Flow(), flow), randn(4, 3, 2)
    for leg in legs(Flow(), even(10))[1:]:
        euler = x + (leg.s - leg.t) * Velocity()(x, torch.full((4,), leg.t, dtype=torch.float64), None)
        x, _ = Ddim().step(lambda x_t, t: denoiser(x_t, t, None), x, leg, None, None)
        assert (x - euler).abs().max() < 1e-13


@every_schedule
def test_ddim_is_eulers_method_in_the_scales_x_plus_d_alpha_x_plus_d_sigma_eps(schedule: Schedule):
    exact, x = gaussian(schedule, MEAN, STD), randn(4, 3, 1)
    for leg in legs(schedule, even(10)):
        clean = exact(x, leg.t)
        eps = (x - leg.alpha * clean) / leg.sigma
        euler = x + (leg.alpha_s - leg.alpha) * clean + (leg.sigma_s - leg.sigma) * eps
        x, _ = Ddim().step(exact, x, leg, None, None)
        assert (x - euler).abs().max() < 1e-13


# --- mean and variance of the stochastic samplers ---


def predicted_moments(schedule: Schedule, eta: float, steps: int, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation of what DDIM makes of `N(0, 1)`, by recursion over its legs.

    With `D = m + g (x_t - alpha m)`, `g = alpha s^2 / (alpha^2 s^2 + sigma^2)`, a leg takes the deviation
    `y = x_t - alpha m` to `(alpha_s g + sqrt(sigma_s^2 - v^2) (1 - alpha g) / sigma) y + v z`.
    """
    path = legs(schedule, even(steps))
    deviation, variance = -path[0].alpha * mean, 1.0
    for leg in path:
        gain = leg.alpha * std**2 / (leg.alpha**2 * std**2 + leg.sigma**2)
        beta = 1 - (leg.alpha * leg.sigma_s / (leg.alpha_s * leg.sigma)) ** 2
        v = eta * leg.sigma_s * math.sqrt(beta)
        slope = leg.alpha_s * gain + math.sqrt(leg.sigma_s**2 - v**2) * (1 - leg.alpha * gain) / leg.sigma
        deviation, variance = slope * deviation, slope**2 * variance + v**2
    return mean + deviation, math.sqrt(variance)


def measured_moments(schedule: Schedule, eta: float, steps: int, mean: float, std: float) -> tuple[float, float]:
    """The same without chance: a linear sampler is its answer to no noise, and to one draw of 1 at a time."""
    draws = Ddim(eta).draws(steps)
    exact = gaussian(schedule, torch.full((1, 1), mean, dtype=torch.float64), std)
    noise = torch.cat([torch.zeros(draws, 1), torch.eye(draws)], 1).double()[..., None, None]
    answers = sample(exact, Ddim(eta), noise, None, steps).flatten()
    return answers[0].item(), (answers[1:] - answers[0]).norm().item()


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [7, 100])
def test_ddim_has_the_mean_and_deviation_of_its_recursion_to_1e_10(schedule: Schedule, eta: float, steps: int):
    expected = predicted_moments(schedule, eta, steps, 0.3, 0.5)
    assert measured_moments(schedule, eta, steps, 0.3, 0.5) == pytest.approx(expected, rel=1e-10)


@every_schedule
def test_the_deviation_of_ddpm_comes_to_within_1_percent_of_the_datas_as_steps_grow_to_1600(schedule: Schedule):
    """`fixed_small` is the variance for data without spread: at 100 steps it leaves 3 to 7 % too little."""
    errors = [abs(predicted_moments(schedule, 1.0, steps, 0.3, 0.5)[1] / 0.5 - 1) for steps in (25, 100, 400, 1600)]
    assert errors == sorted(errors, reverse=True)
    assert 0.03 < errors[1] < 0.07
    assert errors[-1] < 0.01


@every_schedule
def test_20000_samples_of_ddpm_have_the_datas_mean_and_deviation_within_5_standard_errors(schedule: Schedule):
    count, std = 20_000, 0.5
    exact = gaussian(schedule, torch.full((1, 1), 0.3, dtype=torch.float64), std)
    x = sample(exact, Ddim(1.0), randn(100, count, 1, 1), None, 100)
    mean, deviation = predicted_moments(schedule, 1.0, 100, 0.3, std)
    assert x.mean().item() == pytest.approx(mean, abs=5 * std / count**0.5)
    assert x.std().item() == pytest.approx(deviation, abs=5 * std / (2 * count) ** 0.5)
    assert x.mean().item() == pytest.approx(0.3, abs=5 * std / count**0.5 + 0.001)
    assert x.std().item() == pytest.approx(std, rel=0.08)


# --- two modes ---


@every_schedule
@every_sampler
def test_two_modes_keep_their_shares_of_0_3_and_0_7(schedule: Schedule, sampler: Sampler):
    """The start is the quantiles of a Gaussian in place of draws; what DDPM draws later leaves 5 standard errors."""
    count, steps = 2000, 50
    means = torch.tensor([-0.7, 0.7], dtype=torch.float64).reshape(2, 1, 1)
    exact = Mixture(schedule, means, 0.1, torch.tensor([0.3, 0.7], dtype=torch.float64))
    noise = randn(steps, count, 1, 1)
    noise[0] = torch.special.ndtri((torch.arange(count).double() + 0.5) / count).reshape(-1, 1, 1)
    x = sample(exact, sampler, noise, None, steps).flatten()
    assert (x < 0).double().mean().item() == pytest.approx(0.3, abs=0.01 if sampler.draws(steps) == 1 else 0.05)
    assert ((x.abs() - 0.7).abs() < 0.4).double().mean() > 0.99


# --- what a sampler says of itself, and what it refuses ---


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 7, 10])
def test_a_sampler_evaluates_the_denoiser_exactly_as_often_as_it_says(sampler: Sampler, steps: int):
    watched = Watched(gaussian(Cosine(), MEAN, STD))
    planner = Sample(watched, sampler, steps)
    planner(None, randn(planner.draws, 2, 3, 1))
    assert len(watched.times) == planner.evaluations == sampler.evaluations(steps)
    assert watched.times == sorted(watched.times, reverse=True)
    assert watched.times[0] == 1.0 and min(watched.times) > 0


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_heun_takes_2_evaluations_a_step_but_the_last_and_the_others_1(steps: int):
    assert Heun().evaluations(steps) == 2 * steps - 1
    assert Ddim().evaluations(steps) == Ddim(1.0).evaluations(steps) == DpmPP2M().evaluations(steps) == steps


@every_sampler
def test_every_draw_that_a_sampler_asks_for_changes_the_chunk_and_no_further_one_does(sampler: Sampler):
    exact, steps = gaussian(Cosine(), MEAN, STD), 7
    noise = randn(steps + 3, 2, 3, 1)
    chunk = sample(exact, sampler, noise[: sampler.draws(steps)], None, steps)
    assert torch.equal(sample(exact, sampler, noise, None, steps), chunk)
    for draw in range(sampler.draws(steps)):
        moved = noise.clone()
        moved[draw] += 1
        assert (sample(exact, sampler, moved, None, steps) - chunk).abs().min() > 1e-6


@every_sampler
def test_one_draw_too_few_is_refused_with_the_number_needed(sampler: Sampler):
    needed = sampler.draws(7)
    with pytest.raises(ValueError, match=rf"with 7 steps needs {needed} draws of noise, not {needed - 1}"):
        sample(gaussian(Cosine(), MEAN, STD), sampler, randn(needed - 1, 2, 3, 1), None, 7)


@every_schedule
@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 33])
def test_any_number_of_steps_samples_finite_chunks_in_single_precision(
    schedule: Schedule, sampler: Sampler, steps: int
):
    x = sample(gaussian(schedule, MEAN.float(), STD.float()), sampler, randn(steps, 64, 3, 1).float(), None, steps)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert x.abs().max() < 5


@every_sampler
def test_the_same_noise_gives_the_same_chunk_and_neighbours_in_a_batch_do_not_matter(sampler: Sampler):
    exact, noise = Mixture(Cosine(), randn(5, 3, 1), 0.1), randn(7, 6, 3, 1, seed=1)
    chunks = sample(exact, sampler, noise, None, 7)
    assert torch.equal(sample(exact, sampler, noise, None, 7), chunks)
    assert (sample(exact, sampler, noise[:, 2:3], None, 7) - chunks[2:3]).abs().max() < 1e-12
