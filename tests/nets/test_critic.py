"""Critics: an ensemble is its members, a critic sees what was executed and nothing else."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffpolicy.nets.critic import Critic, Ensemble, EnsembleLinear, EnsembleNorm, LowerBound, Value, mean, minimum


def make_ensemble(layer_norm: bool, in_dim: int = 5, members: int = 3) -> Ensemble:
    torch.manual_seed(0)
    ensemble = Ensemble(in_dim, (8, 6), members, nn.Mish, layer_norm)
    for parameter in ensemble.parameters():
        nn.init.normal_(parameter)
    return ensemble


def alone(ensemble: Ensemble, member: int, x: torch.Tensor) -> torch.Tensor:
    """One member as a plain network."""
    for layer in ensemble:
        if isinstance(layer, EnsembleLinear):
            x = x @ layer.weight[member] + layer.bias[member]
        elif isinstance(layer, EnsembleNorm):
            x = functional.layer_norm(x, x.shape[-1:]) * layer.scale[member] + layer.shift[member]
        else:
            x = layer(x)
    return x


@pytest.mark.parametrize("layer_norm", [False, True])
def test_an_ensemble_of_3_is_3_networks_in_values_and_gradients_to_1e_5(layer_norm):
    ensemble, x = make_ensemble(layer_norm), torch.randn(7, 5)
    together = ensemble(x)
    assert together.shape == (3, 7, 1)
    for member in range(3):
        expected = alone(ensemble, member, x)
        assert (together[member] - expected).abs().max() < 1e-5
        mine = torch.autograd.grad(together[member].square().sum(), list(ensemble.parameters()), retain_graph=True)
        wanted = torch.autograd.grad(expected.square().sum(), list(ensemble.parameters()))
        for a, b in zip(mine, wanted, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))
            assert a[[m for m in range(3) if m != member]].abs().max() == 0


def make_critic(aggregate=minimum) -> Critic:
    return Critic(
        make_ensemble(False, in_dim=4 + 2 * 3, members=2), obs_dim=4, executed=slice(1, 3), aggregate=aggregate
    )


def test_a_critic_of_executed_1_to_3_depends_on_those_actions_and_the_first_4_conditions_alone():
    critic = make_critic()
    cond, chunk = torch.randn(6, 9, requires_grad=True), torch.randn(6, 5, 3, requires_grad=True)
    of_cond, of_chunk = torch.autograd.grad(critic(cond, chunk).sum(), (cond, chunk))
    assert (of_cond != 0).any(0).tolist() == [True] * 4 + [False] * 5
    assert (of_chunk != 0).any(0).any(-1).tolist() == [False, True, True, False, False]


def test_members_4_and_1_aggregate_to_1_and_2_5_and_with_rho_2_to_minus_0_5():
    q = torch.tensor([[4.0], [1.0]])
    assert [f(q).item() for f in (minimum, mean, LowerBound(2.0))] == pytest.approx([1.0, 2.5, -0.5])
    critic, cond, chunk = make_critic(mean), torch.randn(6, 4), torch.randn(6, 5, 3)
    assert torch.equal(critic.value(cond, chunk), critic(cond, chunk).mean(0))


def test_a_value_has_1_number_a_state_even_for_1_state():
    value = Value(make_ensemble(True, in_dim=4, members=1), obs_dim=4)
    cond = torch.randn(3, 6)
    assert value(cond).shape == (3,)
    assert (value(cond[:1]) - value(cond)[:1]).abs().max() < 1e-6


def test_with_layer_norm_an_action_1000_times_too_large_moves_the_value_less_than_the_norm_of_its_last_weights():
    torch.manual_seed(0)
    ensemble = Ensemble(3, (64, 64), 1, nn.ReLU, layer_norm=True)
    plain = Ensemble(3, (64, 64), 1, nn.ReLU)
    near, far = torch.rand(100, 3), 1000 * torch.rand(100, 3)
    bound = 2 * 64**0.5 * ensemble[-1].weight.norm()
    assert (ensemble(far) - ensemble(near)).abs().max() < bound
    assert (plain(far) - plain(near)).abs().max() > bound
