"""GroupNorm and Mish in one step against PyTorch's two."""

import pytest
import torch
from torch import nn

from diffpolicy.nets.norm import GroupNormMish


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("shape", [(5, 16, 6), (1, 16, 1), (3, 32, 16)])
def test_function_and_gradients_equal_groupnorm_then_mish(shape, scale):
    torch.manual_seed(0)
    ours, theirs = GroupNormMish(8, shape[1]).double(), nn.GroupNorm(8, shape[1]).double()
    with torch.no_grad():
        ours.weight.normal_(0, scale)  # at 30, outputs from -90 to 90: both tails of Mish
        ours.bias.normal_(0, scale)
    theirs.load_state_dict(ours.state_dict())
    x = (3 * torch.randn(shape) + 1).double().requires_grad_()
    weights = torch.randn(shape).double()
    found = []
    for module in (ours, nn.Sequential(theirs, nn.Mish())):
        out = module(x)
        found.append((out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_acting_takes_pytorchs_own_to_the_bit():
    torch.manual_seed(0)
    module, x = GroupNormMish(8, 16), torch.randn(4, 16, 6)
    with torch.no_grad():
        expected = nn.functional.mish(nn.functional.group_norm(x, 8, module.weight, module.bias))
        assert torch.equal(module(x), expected)
