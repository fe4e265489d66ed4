"""Guidance: denoisers made of denoisers."""

import pytest
import torch

from diffpolicy.diffusion.denoiser import Denoiser
from diffpolicy.diffusion.exact import gaussian
from diffpolicy.diffusion.guidance import Clipped
from diffpolicy.diffusion.sampler import Ddim, DpmPP2M, Heun, Sampler, sample
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
