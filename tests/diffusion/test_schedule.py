"""Schedules: laws that every one obeys, and the definitions they claim to be."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffpolicy.diffusion.schedule import Cosine, Flow, Linear, Schedule
from diffpolicy.parts import SCHEDULES as SCHEDULES_BY_NAME

SCHEDULES = [Linear(), Cosine(), Flow()]
NAMES = ["linear", "cosine", "flow"]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)


def grid(points: int = 1001) -> torch.Tensor:
    return torch.linspace(0, 1, points, dtype=torch.float64)


@every_schedule
def test_at_time_0_the_signal_is_1_and_the_noise_is_0(schedule: Schedule):
    assert schedule(0.0) == pytest.approx((1.0, 0.0), abs=1e-7)
    alpha, sigma = schedule(torch.zeros(3, dtype=torch.float64))
    assert alpha.tolist() == pytest.approx([1.0] * 3, abs=1e-12)
    assert sigma.tolist() == pytest.approx([0.0] * 3, abs=1e-7)


@every_schedule
def test_at_time_1_less_than_1_percent_of_the_signal_is_left(schedule: Schedule):
    alpha, sigma = schedule(1.0)
    assert 0 < alpha < 0.01
    assert sigma == pytest.approx(1.0, abs=1e-4)


@every_schedule
def test_the_signal_to_noise_ratio_falls_at_each_of_1000_steps(schedule: Schedule):
    alpha, sigma = schedule(grid()[1:])
    assert (alpha / sigma).log().diff().max() < 0


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_signal_never_rises_and_never_falls_below_the_floor(schedule: Schedule, dtype: torch.dtype):
    alpha, sigma = schedule(torch.linspace(0.999, 1, 1001, dtype=dtype))
    floor = torch.tensor(schedule.floor, dtype=dtype)
    assert alpha.diff().max() <= 0
    assert alpha.min() >= floor
    assert sigma.isfinite().all()


@every_schedule
@given(t=st.floats(0, 1))
def test_a_float_and_a_tensor_give_the_same_scales_to_1e_6(schedule: Schedule, t: float):
    alpha, sigma = schedule(t)
    assert isinstance(alpha, float) and isinstance(sigma, float)
    for shape in [(1,), (2, 3)]:
        alphas, sigmas = schedule(torch.full(shape, t, dtype=torch.float64))
        assert alphas.shape == sigmas.shape == shape
        assert alphas.flatten().tolist() == pytest.approx([alpha] * alphas.numel(), abs=1e-6)
        assert sigmas.flatten().tolist() == pytest.approx([sigma] * sigmas.numel(), abs=1e-6)


@every_schedule
def test_single_precision_gives_the_scales_of_100_steps_to_2e_6(schedule: Schedule):
    t = torch.arange(1, 101) / 100
    for single, double in zip(schedule(t), schedule(t.double()), strict=True):
        assert single.dtype == torch.float32
        assert (single - double).abs().max() < 2e-6


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_linear_and_cosine_preserve_a_variance_of_1(schedule: Schedule):
    alpha, sigma = schedule(grid())
    assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-12


def test_flow_is_the_straight_line_1_minus_t_and_t():
    t = grid()[:-1]
    alpha, sigma = Flow()(t)
    assert torch.equal(alpha, (1 - t).clamp(min=5e-4))
    assert torch.equal(sigma, t)
    assert Flow()(0.25) == (0.75, 0.25)
    assert Flow()(1.0) == (5e-4, 1.0)


def test_linear_has_the_noise_rate_of_song_et_al_2021():
    """`-2 d log(alpha) / dt = beta(t) = 0.1 + 19.9 t`, by autograd."""
    t = grid()[:-1].requires_grad_()
    (rate,) = torch.autograd.grad(-2 * Linear()(t)[0].log().sum(), t)
    assert (rate - (0.1 + 19.9 * t)).abs().max() < 1e-9
    assert Linear()(1.0)[0] == pytest.approx(math.exp(-(0.1 + 20.0) / 4), rel=1e-12)


def squaredcos_cap_v2(steps: int, cap: float = 0.999) -> list[float]:
    """Nichol and Dhariwal (2021), eq. 17, as a running product of `1 - beta` in double precision."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    products, product = [], 1.0
    for k in range(steps):
        product *= 1 - min(1 - alpha_bar((k + 1) / steps) / alpha_bar(k / steps), cap)
        products.append(product)
    return products


def test_cosine_equals_the_capped_definition_at_all_100_steps_to_1e_10():
    for k, product in enumerate(squaredcos_cap_v2(100)):
        assert Cosine()((k + 1) / 100)[0] ** 2 == pytest.approx(product, rel=1e-10)


def test_cosine_equals_diffusers_squaredcos_cap_v2_at_its_100_steps_to_1e_6():
    """The last to 2e-5: there the reference's `1 - 0.999` in single precision has a relative error of 1.3e-5."""
    table = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    alpha, _ = Cosine()(torch.arange(1, 101, dtype=torch.float64) / 100)
    error = (alpha**2 / table - 1).abs()
    assert error[:-1].max() < 1e-6
    assert error[-1] < 2e-5


@pytest.mark.parametrize("steps", [5, 50])
def test_vp_is_diffusion_q_learnings_schedule_at_each_of_its_steps(steps: int):
    """`beta_t = 1 - exp(-b_min / T - (b_max - b_min) (2t - 1) / (2 T^2))`, 0.1 and 10, for t = 1 .. T."""
    signal = 1.0
    for t in range(1, steps + 1):
        beta = 1 - math.exp(-0.1 / steps - 9.9 * (2 * t - 1) / (2 * steps**2))
        signal *= 1 - beta
        assert SCHEDULES_BY_NAME["vp"](t / steps)[0] ** 2 == pytest.approx(signal, rel=1e-6)
