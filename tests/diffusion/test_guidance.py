"""Guidance: denoisers made of denoisers."""

import pytest
import torch

from diffpolicy.diffusion.denoiser import Denoiser
from diffpolicy.diffusion.exact import CorrelatedGaussian, gaussian
from diffpolicy.diffusion.guidance import ClassifierFree, Clipped, ValueGuided
from diffpolicy.diffusion.sampler import Ddim, DpmPP2M, Heun, Sample, Sampler, sample
from diffpolicy.diffusion.schedule import Cosine, Flow, Linear, Schedule

SCHEDULES = {"linear": Linear(), "cosine": Cosine(), "flow": Flow()}
SAMPLERS = {"ddim": Ddim(), "ddpm": Ddim(1.0), "heun": Heun(), "dpm++2m": DpmPP2M()}


class Constant(Denoiser):
    """Estimates the same chunk always, and writes down what it was asked."""

    def __init__(self, schedule: Schedule, chunk: torch.Tensor) -> None:
        super().__init__()
        self.schedule = schedule
        self.chunk = chunk
        self.asked: list[tuple] = []

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        self.asked.append((x_t, t, cond))
        return self.chunk


def test_clipped_leaves_what_lies_within_its_limit_and_clips_the_rest_to_it():
    estimate = torch.tensor([[[-7.0, -1.0, -0.5, 0.0, 0.999, 1.0, 1.001, float("inf")]]])
    chunk = Clipped(Constant(Cosine(), estimate))(torch.zeros_like(estimate), 0.5, None)
    assert chunk.flatten().tolist() == pytest.approx([-1.0, -1.0, -0.5, 0.0, 0.999, 1.0, 1.0, 1.0])
    chunk = Clipped(Constant(Cosine(), estimate), limit=0.25)(torch.zeros_like(estimate), 0.5, None)
    assert chunk.flatten().tolist() == [-0.25, -0.25, -0.25, 0.0, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_clipped_has_the_schedule_of_its_denoiser_and_passes_input_time_and_condition_on(schedule: Schedule):
    inner = Constant(schedule, torch.zeros(2, 3, 1))
    clipped = Clipped(inner)
    x_t, t, cond = torch.randn(2, 3, 1), torch.rand(2), torch.randn(2, 5)
    clipped(x_t, t, cond)
    assert clipped.schedule is schedule
    ((seen_x, seen_t, seen_cond),) = inner.asked
    assert seen_x is x_t and seen_t is t and seen_cond is cond


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_of_data_around_2_a_denoiser_clipped_to_1_samples_1(sampler: Sampler):
    """The last leg returns the estimate itself, so the chunk lies within the limit, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    exact = gaussian(Cosine(), torch.full((4, 2), 2.0), 0.05)
    chunks = sample(Clipped(exact), sampler, torch.randn(10, 32, 4, 2, generator=generator), None, 10)
    assert chunks.max() == 1.0
    assert chunks.min() > 0.9


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_a_limit_that_nothing_reaches_changes_nothing(sampler: Sampler):
    exact = gaussian(Cosine(), torch.zeros(4, 2), 0.3)
    noise = torch.randn(10, 8, 4, 2, generator=torch.Generator().manual_seed(0))
    chunks = sample(Clipped(exact, limit=100.0), sampler, noise, None, 10)
    assert torch.equal(chunks, sample(exact, sampler, noise, None, 10))


# --- uphill on a value


def noise(count: int = 16, draws: int = 30) -> torch.Tensor:
    return torch.randn(draws, count, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def correlated(schedule: Schedule, mean: torch.Tensor) -> CorrelatedGaussian:
    """Four actions around `mean (4, 2)`, of spread 0.4, whose neighbours correlate by 0.8."""
    apart = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    return CorrelatedGaussian(schedule, mean, 0.4**2 * 0.8 ** apart.double())


SLOPE = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.5, 0.5], [0.0, 0.0]], dtype=torch.float64)


def guided_by_linear_value(exact: Denoiser, weight: float, until: float = 0.0) -> ValueGuided:
    """J(x) = SLOPE x, of which `E[J | x_t]` is what a value of noised chunks learns."""
    return ValueGuided(exact, lambda x_t, t, cond: (SLOPE * exact(x_t, t, cond)).flatten(1).sum(1), weight, until)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_with_a_linear_value_a_gaussian_is_sampled_around_its_mean_plus_w_times_covariance_times_slope(
    sampler: Sampler, schedule: Schedule
):
    """`p(x) e^(w J(x))` is `N(m + w C grad J, C)`: from the same noise, the same chunks as of its own denoiser."""
    mean = torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2)
    exact = correlated(schedule, mean)
    shift = 1.5 * exact.covariance @ SLOPE
    assert shift.abs().max() > 0.3
    chunks = sample(guided_by_linear_value(exact, 1.5), sampler, noise(), None, 30)
    assert (chunks - sample(correlated(schedule, mean + shift), sampler, noise(), None, 30)).abs().max() < 1e-6


@torch.inference_mode()
def test_guidance_works_while_nothing_is_to_be_differentiated_and_clipped_stays_in_the_box():
    exact = correlated(Cosine(), torch.zeros(4, 2, dtype=torch.float64))
    chunks = sample(Clipped(guided_by_linear_value(exact, 30.0)), Ddim(), noise(), None, 30)
    assert chunks.abs().max() == 1.0
    assert chunks[:, 0, 0].mean() > 0.98 and chunks[:, 1, 1].mean() < -0.98


def test_at_and_below_its_last_time_and_with_weight_0_it_is_the_denoiser_to_the_bit():
    exact, x_t = correlated(Cosine(), torch.zeros(4, 2, dtype=torch.float64)), noise()[0]
    plain = exact(x_t, 0.09)
    assert torch.equal(guided_by_linear_value(exact, 2.0, until=0.1)(x_t, 0.09, None), plain)
    assert torch.equal(guided_by_linear_value(exact, 0.0)(x_t, 0.09, None), plain)
    assert (guided_by_linear_value(exact, 2.0, until=0.08)(x_t, 0.09, None) - plain).abs().max() > 1e-3
    for step in range(20):  # the times of 20 steps, whichever way they are rounded
        t = 1 - step / 20
        guided = not torch.equal(guided_by_linear_value(exact, 2.0, until=(20 - 7) / 20)(x_t, t, None), exact(x_t, t))
        assert guided == (step < 7)


# --- told and not told


class Told(Denoiser):
    """The first of two denoisers where the condition is 0, the second where it is 1; counts its evaluations."""

    def __init__(self, free: Denoiser, told: Denoiser) -> None:
        super().__init__()
        self.schedule, self.free, self.told, self.evaluated = free.schedule, free, told, 0

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        assert cond is not None
        self.evaluated += 1
        return torch.where(cond[:, :, None] == 0, self.free(x_t, t, cond), self.told(x_t, t, cond))


def classifier_free(free: Denoiser, told: Denoiser, weight: float) -> ClassifierFree:
    return ClassifierFree(Told(free, told), lambda cond: cond + 1, weight)


def normal(mean: float, std: float, schedule: Schedule | None = None) -> Denoiser:
    return gaussian(schedule or Cosine(), torch.full((4, 2), mean, dtype=torch.float64), std)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_of_two_gaussians_of_equal_spread_it_samples_the_one_at_w_times_their_distance(sampler: Sampler, weight: float):
    guided = classifier_free(normal(-0.5, 0.3), normal(0.2, 0.3), weight)
    chunks = sample(guided, sampler, noise(), torch.zeros(16, 1), 30)
    expected = sample(normal(-0.5 + 0.7 * weight, 0.3), sampler, noise(), None, 30)
    assert (chunks - expected).abs().max() < 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_of_two_around_0_the_probability_flow_has_the_spread_s_to_1_minus_w_times_s_told_to_w(
    schedule: Schedule, weight: float
):
    """`dz / drho = z rho sum_i w_i / (s_i^2 + rho^2)` with `z = x_t / alpha`, `rho = sigma / alpha`, integrated."""
    guided = classifier_free(normal(0.0, 0.8, schedule), normal(0.0, 0.4, schedule), weight)
    start = noise()
    chunks = sample(guided, Heun(), start, torch.zeros(16, 1), 200)
    assert torch.allclose(chunks / start[0], torch.full_like(chunks, 0.8 ** (1 - weight) * 0.4**weight), rtol=0.01)


def test_weights_0_and_1_are_the_unconditional_and_the_conditional_denoiser_to_the_bit_in_one_evaluation():
    free, told, x_t, cond = normal(-0.5, 0.3), normal(0.2, 0.6), noise()[0], torch.zeros(16, 1)
    for weight, alone in ((0.0, free), (1.0, told)):
        guided = classifier_free(free, told, weight)
        assert torch.equal(guided(x_t, 0.4, cond), alone(x_t, 0.4, None))
        assert guided.denoiser.evaluated == 1
    guided = classifier_free(free, told, 2.0)
    assert torch.allclose(guided(x_t, 0.4, cond), 2 * told(x_t, 0.4, None) - free(x_t, 0.4, None))
    assert torch.allclose(guided(x_t, torch.full((16,), 0.4), cond), guided(x_t, 0.4, cond))
    assert guided.denoiser.evaluated == 3  # both halves at once


# --- low temperature


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_temperature_of_one_half_samples_a_gaussian_with_a_quarter_of_its_variance(
    sampler: Sampler, temperature: float
):
    exact, many = normal(0.3, 0.4), noise(4000)
    cold, plain = (Sample(exact, sampler, 30, temperature=t)(None, many) for t in (temperature, 1.0))
    assert abs(cold.mean() - 0.3) < 0.01
    assert cold.var().item() == pytest.approx(temperature**2 * plain.var().item(), rel=1e-6, abs=1e-12)
