"""Known parts of a chunk: their weights, inpainting and real-time chunking, against closed forms on Gaussians."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from diffpolicy.diffusion import denoiser as predictions
from diffpolicy.diffusion.denoiser import Denoiser, NetworkDenoiser
from diffpolicy.diffusion.exact import CorrelatedGaussian, Mixture, gaussian
from diffpolicy.diffusion.guidance import Clipped, Pinned, RealTimeChunk, Spread, vector_jacobian
from diffpolicy.diffusion.prefix import exponential, hard, linear, prefix_weights
from diffpolicy.diffusion.sampler import (
    Ddim,
    DpmPP2M,
    Heun,
    Leg,
    Sample,
    Sampler,
    draws_of,
    even,
    legs,
    renoise,
    sample,
)
from diffpolicy.diffusion.schedule import Cosine, Flow, Linear, Schedule

SCHEDULES = {"linear": Linear(), "cosine": Cosine(), "flow": Flow()}
SAMPLERS = {"ddim": Ddim(), "ddpm": Ddim(1.0), "heun": Heun(), "dpm++2m": DpmPP2M()}
PREDICTIONS = {name: getattr(predictions, name) for name in ("epsilon", "sample", "v_prediction", "flow")}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())

Tp = 8
STEPS = torch.arange(Tp, dtype=torch.float64)
COVARIANCE = 0.25 * 0.9 ** (STEPS[:, None] - STEPS).abs()
CHUNK = torch.zeros(1, Tp, 1, dtype=torch.float64).index_copy(
    1, torch.arange(3), torch.tensor([[[0.5], [0.6], [0.7]]]).double()
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(schedule: Schedule) -> CorrelatedGaussian:
    return CorrelatedGaussian(schedule, torch.zeros(Tp, 1, dtype=torch.float64), COVARIANCE)


def miss(guided: Denoiser, exact: CorrelatedGaussian, known: torch.Tensor, sampler: Sampler, steps: int, repeats=1):
    """Distance of the free actions' mean from the conditional one, as a share of that one; from mirrored noise."""
    noise = randn(draws_of(sampler, steps, repeats), 500, Tp, 1)
    x = sample(guided, sampler, torch.cat([noise, -noise], 1), None, steps, repeats)
    mean, _ = exact.given(CHUNK, known)
    return ((x.mean(0) - mean[0])[~known].norm() / mean[0, ~known].norm()).item()


# --- weights ---


def test_the_weights_of_delay_2_prefix_end_6_and_horizon_10_are_1_1_8_6_4_2_0_0_0_0():
    weights = prefix_weights(10, start=0, delay=2, end=6)
    torch.testing.assert_close(weights, torch.tensor([1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0]))


@pytest.mark.parametrize("n_obs_steps", [1, 2, 3])
@pytest.mark.parametrize("decay", [linear, exponential, hard])
def test_with_a_history_of_to_they_are_shifted_by_to_minus_1_and_what_has_been_executed_counts_in_full(
    n_obs_steps: int, decay: Callable
):
    start = n_obs_steps - 1
    plain = prefix_weights(10, start=0, delay=2, end=6, decay=decay)
    shifted = prefix_weights(10 + start, start=start, delay=2, end=6 + start, decay=decay)
    torch.testing.assert_close(shifted, torch.cat([torch.ones(start), plain]))


def test_exponential_weights_are_c_times_e_to_the_c_minus_1_over_e_minus_1_and_hard_ones_stop_after_the_delay():
    c = torch.tensor([0.8, 0.6, 0.4, 0.2])
    expected = c * (c.exp() - 1) / (torch.e - 1)
    torch.testing.assert_close(prefix_weights(10, 0, 2, 6, exponential)[2:6], expected)
    assert prefix_weights(10, 0, 2, 6, hard).tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("decay", [linear, exponential, hard])
def test_weights_fall_from_1_to_0_and_never_reach_beyond_the_former_chunk_for_every_delay_and_end(decay: Callable):
    for start in (0, 1, 2):
        for delay in range(12):
            for end in range(13):
                weights = prefix_weights(12, start, delay, end, decay)
                assert weights.isfinite().all() and weights.min() >= 0 and weights.max() <= 1
                assert (weights.diff() <= 0).all()
                assert (weights[end:] == 0).all()
                assert (weights[: min(start + delay, end)] == 1).all()


# --- the exact Gaussian that the tests below trust ---


@every_schedule
def test_a_correlated_gaussian_without_correlation_is_the_gaussian_of_independent_actions(schedule: Schedule):
    mean, std = randn(Tp, 2), torch.linspace(0.1, 2, Tp).double()
    x_t, per_action = randn(5, Tp, 2, seed=1), torch.rand(5, Tp, generator=torch.Generator().manual_seed(2)).double()
    exact, independent = CorrelatedGaussian(schedule, mean, std.square().diag()), gaussian(schedule, mean, std[:, None])
    for t in (0.1, 0.5, 1.0, per_action):
        torch.testing.assert_close(exact(x_t, t), independent(x_t, t), rtol=1e-9, atol=1e-9)


@every_schedule
def test_a_known_prefix_at_time_0_and_the_rest_at_time_1_give_the_conditional_mean(schedule: Schedule):
    """Per-action times: what has no noise is known, what is all noise is not (up to the floor of alpha)."""
    exact, known = correlated(schedule), torch.arange(Tp) < 3
    mean, _ = exact.given(CHUNK, known)
    t = torch.where(known, 0.0, 1.0).double()[None]
    x_t = torch.where(known[:, None], CHUNK, torch.zeros(1, Tp, 1, dtype=torch.float64))
    torch.testing.assert_close(exact(x_t, t), mean, rtol=0, atol=1e-4)


# --- pinned ---


@every_sampler
@every_schedule
def test_pinned_actions_come_back_to_the_bit_in_single_precision(schedule: Schedule, sampler: Sampler):
    exact = gaussian(schedule, torch.zeros(6, 2), 0.5)
    chunk, weights = randn(4, 6, 2, seed=1).float(), torch.tensor([1.0, 1, 1, 0.5, 0, 0])
    noise = randn(sampler.draws(10), 4, 6, 2).float()
    x = sample(Pinned(exact, chunk, weights), sampler, noise, None, 10)
    assert torch.equal(x[:, :3], chunk[:, :3])
    assert not torch.equal(x[:, 3:], chunk[:, 3:])


@every_sampler
def test_what_lies_under_a_weight_of_0_does_not_matter(sampler: Sampler):
    exact, noise, weights = correlated(Cosine()), randn(sampler.draws(7), 4, Tp, 1), (STEPS < 3).double()
    moved = torch.where(STEPS[:, None] < 3, CHUNK, 1e6)
    for guide in (Pinned, RealTimeChunk):
        x = [
            sample(guide(exact, chunk.expand(4, -1, -1), weights), sampler, noise, None, 7) for chunk in (CHUNK, moved)
        ]
        assert torch.equal(*x)


def test_plain_replacement_misses_the_conditional_mean_by_half_and_repaint_approaches_it_as_repeats_grow():
    """The figures in the docstring of `Pinned`."""
    exact, known = correlated(Cosine()), torch.arange(Tp) < 3
    pinned = Pinned(exact, CHUNK, known)
    misses = [miss(pinned, exact, known, Ddim(1.0), 20, repeats) for repeats in (1, 2, 4, 16, 64)]
    assert misses == pytest.approx([0.54, 0.39, 0.24, 0.11, 0.06], abs=0.03)
    guided = [miss(RealTimeChunk(exact, CHUNK, known), exact, known, sampler, 20) for sampler in (Ddim(1.0), Ddim())]
    assert guided == pytest.approx([0.27, 0.37], abs=0.03)


# --- resampling ---


@every_schedule
def test_putting_noise_back_has_the_marginal_of_the_later_time(schedule: Schedule):
    """From `alpha x + sigma eps` at `t` the forward process leads to the same at `s > t`, in mean and variance."""
    for s, t in ((0.3, 0.2), (1.0, 0.9), (0.1, 0.0)):
        alpha, sigma = schedule(t) if t > 0 else (1.0, 0.0)
        leg = Leg(t, alpha, sigma, s, *schedule(s))
        zero, one = torch.zeros(()), torch.ones(())
        assert alpha * renoise(one, leg, zero).item() == pytest.approx(leg.alpha_s, rel=1e-6)
        variance = (sigma * renoise(one, leg, zero).item()) ** 2 + renoise(zero, leg, one).item() ** 2
        assert variance == pytest.approx(leg.sigma_s**2, rel=1e-6)


@pytest.mark.parametrize("repeats", [1, 2, 5])
def test_a_path_takes_each_leg_repeats_times_and_ends_with_clean_data(repeats: int):
    path = legs(Cosine(), even(4), repeats)
    assert len([leg for leg in path if leg.s < leg.t]) == 4 * repeats
    assert len([leg for leg in path if leg.s > leg.t]) == 4 * (repeats - 1)
    assert all(leg.s == following.t for leg, following in pairwise(path))
    assert (path[0].t, path[-1].s) == (1.0, 0.0)


@every_sampler
@pytest.mark.parametrize("repeats", [1, 2, 5])
def test_a_planner_says_how_many_draws_and_evaluations_its_repeats_take(sampler: Sampler, repeats: int):
    calls = []

    class Counting(Pinned):
        def forward(self, x_t, t, cond):
            calls.append(t)
            return super().forward(x_t, t, cond)

    planner = Sample(Counting(correlated(Cosine()), CHUNK, STEPS < 3), sampler, 4, repeats)
    noise = randn(planner.draws, 2, Tp, 1)
    chunk = planner(None, noise)
    assert len(calls) == planner.evaluations
    assert not torch.equal(chunk, planner(None, noise.clone().index_fill_(0, torch.tensor([len(noise) - 1]), 0)))
    with pytest.raises(ValueError, match=f"needs {planner.draws} draws of noise, not {planner.draws - 1}"):
        planner(None, noise[:-1])


# --- real-time chunking ---


@every_schedule
@every_sampler
def test_with_zero_weights_real_time_chunking_is_plain_sampling_to_the_bit(schedule: Schedule, sampler: Sampler):
    exact, noise = correlated(schedule), randn(sampler.draws(10), 6, Tp, 1)
    plain = sample(exact, sampler, noise, None, 10)
    chunk = randn(6, Tp, 1, seed=1)
    for guided in (RealTimeChunk(exact, chunk, torch.zeros(Tp)), RealTimeChunk(exact, chunk, torch.ones(Tp), beta=0.0)):
        assert torch.equal(sample(guided, sampler, noise, None, 10), plain)


@every_schedule
@every_sampler
def test_with_one_action_known_and_its_true_variance_guidance_gives_the_conditional_mean_within_1_percent(
    schedule: Schedule, sampler: Sampler
):
    exact, known = correlated(schedule), torch.arange(Tp) < 1

    def true_variance(alpha: float, sigma: float) -> float:
        gain = torch.linalg.solve(alpha**2 * COVARIANCE + sigma**2 * torch.eye(Tp), alpha**2 * COVARIANCE)
        return max((COVARIANCE - COVARIANCE @ gain)[0, 0].item(), 1e-12)

    guided = RealTimeChunk(exact, CHUNK, known, beta=float("inf"), variance=true_variance)
    assert miss(guided, exact, known, sampler, 10) < 0.01
    assert miss(RealTimeChunk(exact, CHUNK, known), exact, known, sampler, 10) > 0.4


@every_schedule
@every_sampler
@pytest.mark.parametrize("std", [0.1, 0.5, 1.0])
def test_with_their_own_spread_independent_actions_meet_what_is_known_to_1e_6(schedule, sampler: Sampler, std: float):
    exact = gaussian(schedule, torch.zeros(Tp, 1, dtype=torch.float64), std)
    guided = RealTimeChunk(exact, CHUNK, STEPS < 3, beta=float("inf"), variance=Spread(std))
    x = sample(guided, sampler, randn(sampler.draws(10), 4, Tp, 1), None, 10)
    assert (x - CHUNK)[:, :3].abs().max() < 1e-6


class ExactlyGuided(Denoiser):
    """`D + sigma^2 / alpha J^T M^T (M C M^T)^-1 (Y - D)`: `C = sigma^2 / alpha J` is the exact covariance."""

    def __init__(self, denoiser: CorrelatedGaussian, chunk: torch.Tensor, known: torch.Tensor) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.chunk, self.known = denoiser, denoiser.schedule, chunk, known

    def forward(self, x_t, t, cond):
        alpha, sigma = self.schedule(t)
        prior = self.denoiser.covariance
        covariance = prior - prior @ torch.linalg.solve(alpha**2 * prior + sigma**2 * torch.eye(Tp), alpha**2 * prior)
        inverse = torch.zeros_like(prior)
        inverse[:3, :3] = torch.linalg.inv(covariance[:3, :3])
        x, pull = vector_jacobian(self.denoiser, x_t, t, cond, lambda x: inverse @ (self.chunk - x))
        return x + sigma**2 / alpha * pull


@every_schedule
@every_sampler
def test_with_three_actions_known_and_their_exact_covariance_the_vector_jacobian_product_gives_the_conditional_mean(
    schedule: Schedule, sampler: Sampler
):
    exact, known = correlated(schedule), torch.arange(Tp) < 3
    assert miss(ExactlyGuided(exact, CHUNK, known), exact, known, sampler, 10) < 0.05


class Smooth(nn.Module):
    """Any smooth function of a chunk, with every action depending on every other."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        shift = 0.0 if cond is None else cond[:, None, :1]
        return torch.sin(x_t + shift) + t[:, None, None] * (x_t.roll(1, 1) * x_t.mean(1, keepdim=True)).tanh()


@every_schedule
@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())
def test_every_prediction_is_guided_by_its_own_jacobian_written_out_in_full(schedule: Schedule, prediction):
    denoiser = NetworkDenoiser(Smooth(), schedule, prediction)
    x_t, chunk, cond = randn(1, 4, 2), randn(1, 4, 2, seed=1), randn(1, 3, seed=2)
    weights = torch.tensor([1, 0.7, 0.2, 0]).double()
    for t in (0.05, 0.5, 0.9):
        alpha, sigma = schedule(t)
        x = denoiser(x_t, t, cond)
        jacobian = torch.autograd.functional.jacobian(lambda x_t, t=t: denoiser(x_t, t, cond), x_t).reshape(8, 8)
        error = (weights[:, None] * (chunk - x)).flatten()
        gain = sigma * min(5.0, sigma / (alpha * Spread()(alpha, sigma)))
        expected = x + gain * (jacobian.T @ error).view_as(x)
        torch.testing.assert_close(
            RealTimeChunk(denoiser, chunk, weights)(x_t, t, cond), expected, rtol=1e-10, atol=1e-10
        )


class Predicting(nn.Module):
    """The network that predicts `prediction` as well as an exact denoiser can: `F = (D - c_skip x_t) / c_out`."""

    def __init__(self, exact: Denoiser, prediction) -> None:
        super().__init__()
        self.exact, self.prediction = exact, prediction

    def forward(self, x_t, t, cond):
        c_skip, c_out = self.prediction.coefficients(*self.exact.schedule(t[0].item()))
        return (self.exact(x_t, t[0].item(), cond) - c_skip * x_t) / c_out


@every_schedule
@every_sampler
def test_epsilon_sample_v_and_flow_networks_of_the_same_data_join_chunks_alike(schedule: Schedule, sampler: Sampler):
    exact, noise, weights = correlated(schedule), randn(sampler.draws(10), 4, Tp, 1), (STEPS < 3).double()
    chunks = [
        sample(
            RealTimeChunk(NetworkDenoiser(Predicting(exact, p), schedule, p), CHUNK, weights), sampler, noise, None, 10
        )
        for p in PREDICTIONS.values()
    ]
    for chunk in chunks[1:]:
        torch.testing.assert_close(chunk, chunks[0], rtol=0, atol=1e-6)


def test_on_flow_it_is_the_rule_of_black_et_al_step_by_step():
    """`x <- x + dt (v + min(beta, (1-tau)/tau (tau^2 + (1-tau)^2) / (1-tau)^2) g)`, `tau = 1 - t`; from the second step
    on, where the floor of `alpha` plays no part."""
    velocity, n = Smooth(), 10
    denoiser = NetworkDenoiser(lambda *args: -velocity(*args), Flow(), predictions.flow)
    x, chunk, weights = randn(3, 4, 2), randn(3, 4, 2, seed=1), torch.tensor([1, 1, 0.5, 0]).double()
    guided = RealTimeChunk(denoiser, chunk, weights)
    for leg in legs(Flow(), even(n))[1:-1]:
        tau = 1 - leg.t

        def estimate(x: torch.Tensor, tau: float = tau) -> torch.Tensor:
            return x + (1 - tau) * velocity(x, torch.full((3,), 1 - tau, dtype=torch.float64), None)

        error = (chunk - estimate(x)) * weights[:, None]
        _, g = torch.autograd.functional.vjp(estimate, x, error)
        weight = min(5.0, (1 - tau) / tau * (tau**2 + (1 - tau) ** 2) / (1 - tau) ** 2)
        expected = x + 1 / n * ((estimate(x) - x) / (1 - tau) + weight * g)
        x, _ = Ddim().step(lambda x_t, t: guided(x_t, t, None), x, leg, None, None)
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


class Scaled(Denoiser):
    """The denoiser of `x_t` multiplied by a number that depends on time: the same estimates, another schedule."""

    def __init__(self, denoiser: Denoiser, scale: Callable[[float], float]) -> None:
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        self.schedule = lambda t: tuple(scale(t) * part for part in denoiser.schedule(t))

    def forward(self, x_t, t, cond):
        return self.denoiser(x_t / self.scale(t), t, cond)


@every_schedule
def test_guidance_does_not_depend_on_the_scale_of_the_noised_chunk(schedule: Schedule):
    exact, x_t = correlated(schedule), randn(2, Tp, 1)
    scaled = Scaled(exact, lambda t: 2 + t)
    for t in (0.1, 0.5, 1.0):
        a = RealTimeChunk(exact, CHUNK, STEPS < 3)(x_t, t, None)
        b = RealTimeChunk(scaled, CHUNK, STEPS < 3)((2 + t) * x_t, t, None)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_schedule
def test_the_true_jacobian_moves_what_is_free_and_joins_better_than_the_identity(schedule: Schedule):
    """The identity moves the known actions only: at one call the free ones stay as they were. Over a whole sampling
    its chunk has a seam that is at least 1.3 times as large, from the last known action to the first free one; and with
    DDPM the arm's own step, from what it executes to the first free action, is larger too. (With DDIM it is not.)"""
    exact, known = correlated(schedule), torch.arange(Tp) < 3
    true, shortcut = RealTimeChunk(exact, CHUNK, known), RealTimeChunk(exact, CHUNK, known, jacobian=False)
    x_t = randn(500, Tp, 1)
    free = exact(x_t, 0.5)
    assert torch.equal(shortcut(x_t, 0.5, None)[:, 3:], free[:, 3:])
    assert (true(x_t, 0.5, None)[:, 3:] - free[:, 3:]).abs().min() > 0
    for sampler in (Ddim(), Ddim(1.0)):
        noise = randn(sampler.draws(10), 2000, Tp, 1)
        joined = [sample(guided, sampler, noise, None, 10) for guided in (true, shortcut)]
        seams = [(x[:, 3] - x[:, 2]).square().mean().sqrt().item() for x in joined]
        assert 1.3 * seams[0] < seams[1]
    steps = [(x[:, 3] - CHUNK[:, 2]).square().mean().sqrt().item() for x in joined]
    assert 1.1 * steps[0] < steps[1]
    assert miss(true, exact, known, Ddim(1.0), 20) < miss(shortcut, exact, known, Ddim(1.0), 20)


@every_sampler
def test_of_two_modes_the_one_that_joins_is_chosen(sampler: Sampler):
    """Chunks go up or down, half and half; after 2 actions that went down, and 4 more that count less, 3 of 4 go down,
    and less than 2 of 3 with replacement."""
    up = torch.linspace(0.1, 0.9, Tp).double()[:, None]
    exact = Mixture(Cosine(), torch.stack([up, -up]), 0.05)
    noise = randn(sampler.draws(10), 400, Tp, 1)
    free = sample(exact, sampler, noise, None, 10)
    guides, weights = (RealTimeChunk, Pinned), prefix_weights(Tp, 0, 2, 6)
    guided, pinned = (sample(guide(exact, -up[None], weights), sampler, noise, None, 10) for guide in guides)
    shares = [(x[:, -1] < 0).double().mean().item() for x in (free, pinned, guided)]
    assert shares[0] == pytest.approx(0.5, abs=0.1)
    assert shares[2] > 0.75 and shares[1] < 0.67


def test_it_works_in_inference_mode_around_a_clipped_denoiser_and_stays_within_the_box():
    noise_network = NetworkDenoiser(Smooth(), Cosine(), predictions.epsilon)
    with torch.inference_mode():
        noise, cond = torch.randn(1, 4, Tp, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 1)
        guided = RealTimeChunk(Clipped(noise_network), torch.zeros(4, Tp, 2), torch.ones(Tp))
        x = sample(Clipped(guided), Ddim(), noise, cond, 10)
        plain = sample(Clipped(noise_network), Ddim(), noise, cond, 10)
    assert x.isfinite().all() and x.abs().max() <= 1
    assert x.square().mean() < plain.square().mean()
    assert partial(Pinned)(noise_network, noise[0], torch.ones(Tp)).weights.shape == (4, Tp, 2)
