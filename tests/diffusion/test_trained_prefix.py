"""Training-time real-time chunking: what is known comes back to the bit, and a network learns to continue it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Batch
from diffpolicy.diffusion.denoiser import NetworkDenoiser
from diffpolicy.diffusion.guidance import Clipped, Trained
from diffpolicy.diffusion.prefix import hard, prefix_weights
from diffpolicy.diffusion.sampler import Ddim, DpmPP2M, Heun, sample
from diffpolicy.errors import SpecError
from diffpolicy.learning.imitator import Imitator
from diffpolicy.nets.prefixed import Prefixed
from diffpolicy.parts import PREDICTIONS, SCHEDULES, DenoiserConfig, make_denoiser, make_encoder

SPEC = Spec({"obs": (2,)}, action_dim=2, horizon=8, n_obs_steps=2, n_action_steps=3)
SAMPLERS = {"ddim": Ddim(), "ddpm": Ddim(1.0), "heun": Heun(), "dpm++2m": DpmPP2M()}


def normalizer() -> Normalizer:
    obs, action = np.array([[-1, -1], [1, 1]], np.float32), np.array([[-1, -1], [1, 1]], np.float32)
    obs = {"obs": np.concatenate([obs, obs[:1]])}
    return Normalizer.fit(from_list([Episode(obs, action, np.zeros(2, np.float32), False, True)]))


def denoiser_of(network: str, schedule: str = "cosine", prediction: str = "epsilon", max_delay: int = 3):
    torch.manual_seed(0)
    config = DenoiserConfig(
        network, (16, 32), 3, 8, 16, 0, 32, 1, schedule=schedule, prediction=prediction, max_delay=max_delay
    )
    return make_denoiser(config, SPEC, normalizer())


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("network", ["unet1d", "mlp"])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_the_known_prefix_comes_back_to_the_bit_and_what_follows_it_depends_on_it(
    network: str, schedule: str, prediction: str, sampler
):
    generator = torch.Generator().manual_seed(0)
    inner = denoiser_of(network, schedule, prediction).requires_grad_(False)
    denoiser = Clipped(inner)
    known = torch.rand(3, 8, 2, generator=generator) * 2 - 1
    noise, cond = torch.randn(4, 3, 8, 2, generator=generator), torch.randn(3, 4, generator=generator)
    weights = prefix_weights(8, start=1, delay=2, end=6, decay=hard)
    chunk = sample(Clipped(Trained(denoiser, known, weights)), sampler, noise, cond, steps=4)
    assert torch.equal(chunk[:, :3], known[:, :3])
    one, other = (Trained(inner, prefix, weights)(noise[0], 0.5, cond) for prefix in (known, known.roll(1, 0)))
    assert (one - other)[:, 3:].abs().max() > 1e-6
    free = sample(Clipped(Trained(denoiser, known, torch.zeros(8))), sampler, noise, cond, steps=4)
    torch.testing.assert_close(free, sample(denoiser, sampler, noise, cond, steps=4), rtol=0, atol=1e-4)


def batch_of(n: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    action = torch.rand(n, 8, 2, generator=generator) * 2 - 1
    obs = {"obs": torch.zeros(n, 2, 2)}
    valid = torch.ones(n, 8, dtype=torch.bool)
    return Batch(obs, action, valid, torch.zeros(n), obs, torch.zeros(n), torch.zeros(n))


def test_in_training_each_length_of_prefix_from_0_to_its_longest_is_as_likely():
    """To - 1 + max_delay = 4: five lengths, 0.2 each; 20,000 draws are within 0.01."""
    network = denoiser_of("mlp").network
    assert isinstance(network, Prefixed) and network.longest == 4
    clean = network.prefixes(20_000, 8, torch.Generator().manual_seed(0), torch.device("cpu"))
    length = clean.sum(1)
    assert bool((clean == (torch.arange(8) < length[:, None])).all())
    share = torch.bincount(length, minlength=9) / len(length)
    torch.testing.assert_close(share, torch.tensor([0.2] * 5 + [0.0] * 4), rtol=0, atol=0.01)


def test_the_loss_does_not_see_the_prefix_and_the_network_sees_it_clean():
    """Watched at its door: the marked actions are the data's own, the others not; the loss is the mean over those."""
    denoiser, seen = denoiser_of("mlp", "flow", "flow"), {}
    model, batch = Imitator(make_encoder(DenoiserConfig(), SPEC, normalizer()), denoiser), batch_of(64)

    def watch(x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        seen.update(x_t=x_t, t=t)
        return torch.zeros_like(x_t) + 100 * (t == 0).unsqueeze(-1)

    denoiser.network.forward = watch
    loss = model.loss(batch, torch.Generator().manual_seed(0))
    clean = seen["t"] == 0
    torch.testing.assert_close(seen["x_t"][clean], batch.action[clean], rtol=0, atol=0)
    assert not torch.isclose(seen["x_t"][~clean], batch.action[~clean]).all(-1).any()
    times = seen["t"].masked_fill(clean, 0).amax(1, keepdim=True).expand(-1, 8)
    assert torch.equal(seen["t"], torch.where(clean, 0.0, times))
    t = times.unsqueeze(-1)
    eps = (seen["x_t"] - (1 - t) * batch.action) / t
    expected = ((eps - batch.action) ** 2)[~clean].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_a_network_trained_with_prefixes_continues_them_and_one_without_a_prefix_knows_nothing():
    """Chunks are constants of either sign: after a prefix of -0.5 comes -0.5, after +0.5 comes +0.5, in 20 of 20."""
    torch.manual_seed(0)
    config = DenoiserConfig("mlp", hidden_dim=64, depth=2, step_embed_dim=16, max_delay=3, prediction="sample")
    denoiser = make_denoiser(config, SPEC, normalizer())
    model, generator = Imitator(make_encoder(config, SPEC, normalizer()), denoiser), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    sign = torch.where(torch.arange(256) % 2 == 0, 0.5, -0.5)[:, None, None]
    batch = replace(batch_of(256), action=sign.expand(256, 8, 2))
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(batch, generator).backward()
        optimizer.step()
    denoiser.requires_grad_(False)
    noise = torch.randn(1, 20, 8, 2, generator=generator)
    known = sign[:20].expand(20, 8, 2)
    chunk = sample(Trained(denoiser, known, prefix_weights(8, 1, 2, 6, hard)), Ddim(), noise, torch.zeros(20, 4), 10)
    assert (chunk - known).abs().mean() < 0.1 and bool((chunk.mean((1, 2)).sign() == sign[:20, 0, 0].sign()).all())
    free = sample(denoiser, Ddim(), noise, torch.zeros(20, 4), 10).mean((1, 2))
    assert 3 <= int((free > 0).sum()) <= 17 and bool((free.abs() - 0.5).abs().median() < 0.1)


def test_a_delay_that_leaves_nothing_to_plan_and_a_network_without_prefixes_are_refused_in_one_sentence():
    with pytest.raises(SpecError, match="max_delay is 7; give at least 0 and at most horizon 8 - n_obs_steps 2 = 6"):
        denoiser_of("mlp", max_delay=7)
    plain = denoiser_of("mlp", max_delay=0)
    assert isinstance(plain, NetworkDenoiser)
    guided = Trained(plain, torch.zeros(1, 8, 2), torch.ones(8))
    with pytest.raises(SpecError, match="not trained to continue a chunk"):
        sample(guided, Ddim(), torch.zeros(1, 1, 8, 2), torch.zeros(1, 4), 2)


def test_weights_below_1_count_as_0_for_a_trained_network():
    denoiser, generator = denoiser_of("mlp"), torch.Generator().manual_seed(0)
    x, cond, known = torch.randn(2, 8, 2, generator=generator), torch.zeros(2, 4), torch.full((2, 8, 2), 0.5)
    soft, whole = (torch.tensor([1, 1, w, w / 2] + [0] * 4, dtype=torch.float32) for w in (0.9, 0.0))
    found, wanted = (Trained(denoiser, known, weights)(x, 0.5, cond) for weights in (soft, whole))
    assert torch.equal(found, wanted)
