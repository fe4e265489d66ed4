"""Trajectories equal those of `diffusers` from the same noise: every state on the way, not only the last.

The model is a function of `(x_t, t)`, the exact posterior mean of a mixture of Gaussians put as noise, sample or
velocity; `diffusers` asks it at its step `k`, we at `t = (k + 1) / 100`. `diffusers` rounds its tables to single
precision, which the division by `alpha = 5e-4` at `t = 1` magnifies: they are put back in double precision.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from diffpolicy.diffusion.denoiser import (
    Denoiser,
    NetworkDenoiser,
    Prediction,
    broadcast,
    epsilon,
    sample,
    v_prediction,
)
from diffpolicy.diffusion.exact import Mixture
from diffpolicy.diffusion.guidance import Clipped
from diffpolicy.diffusion.sampler import Ddim, DpmPP2M, Sampler
from diffpolicy.diffusion.sampler import sample as run
from diffpolicy.diffusion.schedule import Cosine

PREDICTIONS = {"epsilon": epsilon, "sample": sample, "v_prediction": v_prediction}
SHAPE = (16, 8, 2)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
every_prediction = pytest.mark.parametrize("name", PREDICTIONS)
clipped_or_not = pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model(nn.Module):
    """What `prediction` is of data around 4 chunks, some of it outside the box: `(x_t, t, cond) -> (B, Tp, Da)`."""

    def __init__(self, prediction: Prediction) -> None:
        super().__init__()
        self.exact = Mixture(Cosine(), 0.7 * randn(4, *SHAPE[1:], seed=1), 0.3)
        self.prediction = prediction

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        x = self.exact(x_t, t)
        alpha, sigma = Cosine()(broadcast(t, x_t))
        return self.prediction.target(x, (x_t - alpha * x) / sigma, alpha, sigma)


class Watched(Denoiser):
    """A denoiser that writes down each input."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.inputs: list[torch.Tensor] = []

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        self.inputs.append(x_t)
        return self.denoiser(x_t, t, cond)


def our_trajectory(sampler: Sampler, prediction: Prediction, noise: torch.Tensor, steps: int, clip: bool):
    """Every state from noise to chunk, `(steps + 1, B, Tp, Da)`."""
    denoiser = NetworkDenoiser(Model(prediction).to(noise.dtype), Cosine(), prediction)
    watched = Watched(Clipped(denoiser) if clip else denoiser)
    chunk = run(watched, sampler, noise, None, steps)
    return torch.stack([*watched.inputs, chunk])


def their_trajectory(step: Callable, timesteps: torch.Tensor, name: str, noise: torch.Tensor) -> torch.Tensor:
    """The same of a scheduler; `step(model_output, k, x, i)` is its step `i`."""
    x, states, model = noise, [noise], Model(PREDICTIONS[name]).to(noise.dtype)
    for i, k in enumerate(timesteps):
        output = model(x, x.new_full((len(x),), (k.item() + 1) / 100))
        x = step(output, k, x, i).prev_sample
        states.append(x)
    return torch.stack(states)


def in_double_precision(scheduler):
    """Put the table of `alpha^2` back in double precision; `1 - beta` of the capped last step magnifies most."""
    betas = scheduler.betas.double()
    assert betas[-1].item() == pytest.approx(0.999, rel=1e-7)
    betas[-1] = 0.999
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def canonical(kind: type, name: str, **options):
    """A scheduler with the settings of Chi et al. (2023)."""
    return kind(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type=name, **options)


@every_prediction
@clipped_or_not
def test_100_steps_of_ddpm_equal_diffusers_at_every_step_to_1e_5(name: str, clip: bool):
    """DDPMScheduler draws its own noise, one draw a step but the last: the same generator gives us the same."""
    scheduler = in_double_precision(canonical(DDPMScheduler, name, variance_type="fixed_small", clip_sample=clip))
    scheduler.set_timesteps(100)
    start, generator = randn(*SHAPE), torch.Generator().manual_seed(7)
    theirs = their_trajectory(
        lambda output, k, x, i: scheduler.step(output, k, x, generator=generator), scheduler.timesteps, name, start
    )
    generator.manual_seed(7)
    draws = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(99)]
    ours = our_trajectory(Ddim(1.0), PREDICTIONS[name], torch.stack([start, *draws]), 100, clip)
    assert (ours - theirs).abs().max() < 1e-5
    assert clip == bool(ours[-1].abs().max() <= 1)


@every_prediction
@clipped_or_not
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 20, 100])
def test_ddim_equals_diffusers_at_every_step_to_1e_5(name: str, clip: bool, eta: float, steps: int):
    """With a clipped sample we work out the noise anew, as Glide and DDPM do: `use_clipped_model_output`."""
    scheduler = canonical(DDIMScheduler, name, clip_sample=clip, set_alpha_to_one=True, timestep_spacing="trailing")
    in_double_precision(scheduler).set_timesteps(steps)
    noise = randn(steps + 1, *SHAPE)

    def step(output: torch.Tensor, k: torch.Tensor, x: torch.Tensor, i: int):
        return scheduler.step(output, k, x, eta=eta, use_clipped_model_output=clip, variance_noise=noise[i + 1])

    theirs = their_trajectory(step, scheduler.timesteps, name, noise[0])
    ours = our_trajectory(Ddim(eta), PREDICTIONS[name], noise, steps, clip)
    assert (ours - theirs).abs().max() < 1e-5


@every_prediction
@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50, 100])
def test_dpm_pp_2m_equals_diffusers_at_every_step_to_1e_5(name: str, steps: int):
    scheduler = canonical(
        DPMSolverMultistepScheduler,
        name,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    table = in_double_precision(scheduler).alphas_cumprod[scheduler.timesteps]
    scheduler.sigmas = torch.cat([(1 / table - 1).sqrt(), table.new_zeros(1)])
    start = randn(*SHAPE)
    theirs = their_trajectory(lambda output, k, x, i: scheduler.step(output, k, x), scheduler.timesteps, name, start)
    ours = our_trajectory(DpmPP2M(), PREDICTIONS[name], start[None], steps, clip=False)
    assert (ours - theirs).abs().max() < 1e-5


def test_in_single_precision_100_clipped_steps_of_ddpm_equal_diffusers_as_it_ships_to_1e_4():
    scheduler = canonical(DDPMScheduler, "epsilon", variance_type="fixed_small", clip_sample=True)
    start, generator = randn(*SHAPE).float(), torch.Generator().manual_seed(7)
    theirs = their_trajectory(
        lambda output, k, x, i: scheduler.step(output, k, x, generator=generator),
        scheduler.timesteps,
        "epsilon",
        start,
    )
    generator.manual_seed(7)
    draws = [torch.randn(SHAPE, generator=generator) for _ in range(99)]
    ours = our_trajectory(Ddim(1.0), epsilon, torch.stack([start, *draws]), 100, clip=True)
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - theirs).abs().max() < 1e-4


def test_the_model_is_asked_at_times_that_are_whole_steps_of_100():
    for steps in [1, 2, 5, 10, 20, 50, 100]:
        scheduler = canonical(DDIMScheduler, "epsilon", timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        ours = [1 - i / steps for i in range(steps)]
        assert ours == pytest.approx(((np.asarray(scheduler.timesteps) + 1) / 100).tolist())
