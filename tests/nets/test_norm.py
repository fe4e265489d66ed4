"""GroupNorm, Mish and FiLM in one step against PyTorch's own."""

import pytest
import torch
from torch import nn

from diffpolicy.compiler import why_no_compiler
from diffpolicy.nets.norm import GroupNormMish, _compiled, fuse_norms


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


@pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=pytest.mark.skipif(why_no_compiler() != "", reason=why_no_compiler()))]
)
@pytest.mark.parametrize("with_film", [False, True])
def test_with_film_and_fused_too_function_and_gradients_are_pytorchs(fused, with_film):
    torch.manual_seed(0)
    norm = GroupNormMish(4, 16)
    nn.init.normal_(norm.weight)
    assert fuse_norms(nn.Sequential(norm) if fused else nn.ReLU()) == fused
    # as a convolution leaves it in training: length first in memory
    x = torch.randn(6, 5, 16, requires_grad=True)
    film, weights = torch.randn(5, 32, requires_grad=True), torch.randn(5, 16, 6)
    given = [x, *norm.parameters(), *([film] if with_film else [])]

    def plain(x: torch.Tensor, film: torch.Tensor | None) -> torch.Tensor:
        y = nn.functional.mish(nn.functional.group_norm(x, 4, norm.weight, norm.bias, norm.eps))
        return y if film is None else y * film[:, :16, None] + film[:, 16:, None]

    found = []
    for function in (norm, plain):
        out = function(x.permute(1, 2, 0), film if with_film else None)
        found.append((out, *torch.autograd.grad((out * weights).sum(), given)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_each_size_is_compiled_once_for_all_networks_however_many(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(function.__code__) or function)
    _compiled.cache_clear()
    for _ in range(2):  # two networks of the same sizes
        for length in range(1, 11):  # more sizes than PyTorch compiles of one function
            norm = GroupNormMish(4, 8)
            fuse_norms(norm)
            norm(torch.randn(length, 2, 8, requires_grad=True).permute(1, 2, 0), torch.randn(2, 16))
    _compiled.cache_clear()
    assert len(compiled) == len({id(code) for code in compiled}) == 10


def test_acting_takes_pytorchs_own_to_the_bit():
    torch.manual_seed(0)
    module, x = GroupNormMish(8, 16), torch.randn(4, 16, 6)
    with torch.no_grad():
        expected = nn.functional.mish(nn.functional.group_norm(x, 8, module.weight, module.bias))
        assert torch.equal(module(x), expected)
