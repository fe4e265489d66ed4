"""The two stages of a network: what time says and what the condition says add up to the modulation."""

import pytest
import torch

from diffpolicy.nets.mlp import Mlp
from diffpolicy.nets.network import Network
from diffpolicy.nets.prefixed import Prefixed
from diffpolicy.nets.unet1d import UNet1d

NETWORKS = {
    "unet": lambda: UNet1d(2, 5, (16, 32), groups=4, step_embed_dim=32),
    "mlp": lambda: Mlp(2, 8, 5, hidden_dim=32, step_embed_dim=16),
    "prefixed": lambda: Prefixed(UNet1d(3, 5, (16, 32), groups=4, step_embed_dim=32), 3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_modulation_is_the_share_of_time_plus_the_share_of_the_condition(name):
    torch.manual_seed(0)
    network: Network = NETWORKS[name]().double()
    t, cond = torch.rand(7, dtype=torch.double), torch.randn(7, 5, dtype=torch.double)
    whole = network.modulation(t, cond)
    assert (network.of_time(t) + network.of_cond(cond) - whole).abs().max() < 1e-12
    assert (network.of_cond(cond).std() > 0.01) and (network.of_time(t).std() > 0.01)
    x = torch.randn(7, 8, 2, dtype=torch.double)
    assert (network.body(x, network.of_time(t) + network.of_cond(cond)) - network(x, t, cond)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["unet", "mlp"])
def test_without_a_condition_the_modulation_is_the_share_of_time(name):
    torch.manual_seed(0)
    network = (UNet1d(2, 0, (16, 32), groups=4, step_embed_dim=32) if name == "unet" else Mlp(2, 8, 0)).double()
    t = torch.rand(7, dtype=torch.double)
    assert (network.modulation(t, None) - network.of_time(t)).abs().max() < 1e-12
