"""The embedding of diffusion time equals the published one."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from diffpolicy.nets.embed import TimeEmbedding, sinusoidal


def times() -> torch.Tensor:
    """The canonical 100, `(k + 1) / 100`."""
    return torch.arange(1, 101, dtype=torch.float64) / 100


@pytest.mark.parametrize("dim", [4, 32, 64, 256])
def test_at_time_k_plus_1_over_100_it_is_sine_and_cosine_of_k_times_each_frequency_to_1e_9(dim: int):
    """Frequencies `exp(-i log(10000) / (half - 1))`: from 1 to 1e-4, both reached (Chi et al. 2023)."""
    half = dim // 2
    for k, row in enumerate(sinusoidal(times(), dim).tolist()):
        angles = [k * math.exp(-i * math.log(10000) / (half - 1)) for i in range(half)]
        assert row == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], abs=1e-9)


@pytest.mark.parametrize("dim", [32, 256])
def test_at_all_100_steps_it_equals_diffusers_embedding_to_1e_5(dim: int):
    expected = get_timestep_embedding(torch.arange(100), dim, downscale_freq_shift=1)
    assert (sinusoidal(times().float(), dim) - expected).abs().max() < 1e-5


def test_the_first_step_is_0_sines_and_1_cosines_and_the_last_index_is_99():
    assert sinusoidal(torch.tensor([0.01]), 8)[0].tolist() == pytest.approx([0.0] * 4 + [1.0] * 4, abs=1e-6)
    assert sinusoidal(torch.tensor([1.0]), 8)[0, 0].item() == pytest.approx(math.sin(99), abs=1e-5)


def test_a_time_per_action_is_embedded_elementwise():
    t = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    embedding = sinusoidal(t, 16)
    assert embedding.shape == (3, 5, 16)
    assert torch.equal(embedding[1, 2], sinusoidal(t[1, 2], 16))


def test_any_two_of_1000_times_have_embeddings_at_least_1_percent_apart():
    embedding = sinusoidal(torch.linspace(0, 1, 1001, dtype=torch.float64), 32)
    assert embedding.diff(dim=0).norm(dim=1).min() > 0.01
    assert torch.pdist(embedding).min() > 0.01


def test_the_module_is_linear_mish_linear_over_the_sines():
    module, t = TimeEmbedding(16), torch.rand(4, generator=torch.Generator().manual_seed(0))
    first, _, second = module.net
    hidden = sinusoidal(t, 16) @ first.weight.T + first.bias
    hidden = hidden * torch.tanh(torch.log1p(hidden.exp()))
    assert hidden.shape == (4, 64)
    assert (module(t) - (hidden @ second.weight.T + second.bias)).abs().max() < 1e-5


@pytest.mark.parametrize("dim", [0, 2, 7])
def test_an_embedding_without_room_for_sine_and_cosine_of_two_frequencies_is_refused(dim):
    with pytest.raises(ValueError, match="even number of at least 4"):
        TimeEmbedding(dim)
