"""The plain network: what it is made of, and that it learns the exact denoiser."""

import pytest
import torch
from torch.nn import functional

from diffpolicy.diffusion.denoiser import NetworkDenoiser, diffuse, v_prediction
from diffpolicy.diffusion.exact import Mixture
from diffpolicy.diffusion.schedule import Cosine
from diffpolicy.nets.mlp import Mlp


def inputs(batch: int = 5, horizon: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, horizon, 2, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.randn(batch, 3, generator=generator)


def make(cond_dim: int = 3, depth: int = 2) -> Mlp:
    torch.manual_seed(0)
    return Mlp(2, 4, cond_dim, hidden_dim=32, depth=depth, step_embed_dim=16)


def test_with_depth_0_it_is_a_norm_a_mish_and_2_linear_maps_of_chunk_time_and_condition():
    network, (x, t, cond) = make(depth=0), inputs()
    together = torch.cat([x.reshape(5, 8), network.time(t), cond], dim=1)
    hidden = functional.layer_norm(together @ network.inlet.weight.T + network.inlet.bias, (32,))
    linear = network.outlet[-1]
    expected = functional.mish(hidden) @ linear.weight.T + linear.bias
    assert (network(x, t, cond) - expected.reshape(5, 4, 2)).abs().max() < 1e-5


def test_a_block_whose_last_weights_are_0_changes_nothing():
    network, (x, t, cond) = make(depth=1), inputs()
    shallow = make(depth=0)
    shallow.load_state_dict({n: w for n, w in network.state_dict().items() if not n.startswith("blocks")})
    assert (network(x, t, cond) - shallow(x, t, cond)).abs().max() > 1e-3
    for weight in network.blocks[0][-1].parameters():
        weight.data.zero_()
    assert torch.equal(network(x, t, cond), shallow(x, t, cond))


def test_without_a_condition_it_takes_none():
    network, (x, t, _) = make(cond_dim=0), inputs()
    assert network(x, t, None).shape == x.shape
    assert torch.equal(network(x, t, None), network(x, t, torch.zeros(5, 0)))


@pytest.mark.parametrize("part", [0, 1, 2], ids=["chunk", "time", "condition"])
def test_every_input_matters_to_every_action(part: int):
    network, arguments = make(), list(inputs())
    before = network(*arguments)
    arguments[part] = arguments[part] + 0.1
    assert (network(*arguments) - before).abs().min() > 1e-6


def test_each_chunk_of_a_batch_of_5_is_computed_as_if_alone_to_1e_6():
    network, (x, t, cond) = make(), inputs()
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(5)])
    assert (network(x, t, cond) - alone).abs().max() < 1e-6


def test_trained_for_600_steps_on_two_modes_it_is_the_exact_denoiser_to_a_root_mean_square_of_0_06():
    """The regression that knows nothing of the posterior finds it: `argmin E (F - target)^2 = E[target | x_t]`."""
    means = torch.tensor([[-0.6, -0.6], [0.6, 0.2]])[..., None]
    exact, generator = Mixture(Cosine(), means, 0.1), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    denoiser = NetworkDenoiser(Mlp(1, 2, 0, hidden_dim=64, depth=2, step_embed_dim=16), Cosine(), v_prediction)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mode = torch.randint(2, (count,), generator=generator)
        x = means[mode] + 0.1 * torch.randn(count, 2, 1, generator=generator)
        return x, torch.rand(count, generator=generator), torch.randn(count, 2, 1, generator=generator)

    for _ in range(600):
        x, t, eps = draw(256)
        optimizer.zero_grad()
        denoiser.loss(x, t, eps, None).mean().backward()
        optimizer.step()
        decay.step()
    x, t, eps = draw(4000)
    x_t = diffuse(x, eps, *(scale[:, None, None] for scale in Cosine()(t)))
    with torch.no_grad():
        error = denoiser(x_t, t, None) - exact(x_t, t)
    assert error.square().mean().sqrt() < 0.06
