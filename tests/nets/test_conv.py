"""Our ways of convolving against PyTorch's own."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffpolicy.nets.conv import FEW_POSITIONS, MANY_CHANNELS, Conv1d, Upsample1d, join_channels
from diffpolicy.nets.winograd import WIDTHS, winograd_conv1d


@pytest.mark.parametrize("batch", [1, 3, FEW_POSITIONS, FEW_POSITIONS + 1])
@pytest.mark.parametrize(("width", "stride", "padding"), [(5, 1, 2), (3, 2, 1), (1, 1, 0), (3, 1, 1), (4, 3, 0)])
def test_both_ways_equal_pytorchs_convolution_and_its_gradients(batch, width, stride, padding):
    torch.manual_seed(0)
    ours = Conv1d(6, 10, width, stride, padding).double()
    theirs = nn.Conv1d(6, 10, width, stride, padding).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(batch, 6, 9, dtype=torch.double)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(given) for module, given in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(outputs[0])
    for out in outputs:
        (out * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-10, atol=1e-12)


def test_upsampling_equals_pytorchs_transposed_convolution_and_its_gradients():
    torch.manual_seed(0)
    ours, theirs = Upsample1d(6).double(), nn.ConvTranspose1d(6, 6, 4, 2, 1).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 6, 7, dtype=torch.double, requires_grad=True)
    weights = torch.randn(5, 6, 14, dtype=torch.double)
    found = [
        (out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()]))
        for module in (ours, theirs)
        for out in [module(x)]
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_channels_are_joined_in_either_layout_and_stay_in_it():
    x, y = torch.randn(4, 3, 5), torch.randn(4, 2, 5)
    expected = torch.cat([x, y], dim=1)
    first = [tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0) for tensor in (x, y)]
    assert torch.equal(join_channels(x, y), expected) and join_channels(x, y).is_contiguous()
    joined = join_channels(first[0], first[1])
    assert torch.equal(joined, expected) and joined.permute(2, 0, 1).is_contiguous()


@pytest.mark.parametrize("length", [4, 5, 8, 16, 30])
@pytest.mark.parametrize("width", WIDTHS)
def test_minimal_filtering_is_the_convolution_and_its_gradients_of_both_orders(length, width):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 6, length).double(), torch.randn(7, 6, width).double()
    given = [tensor.requires_grad_() for tensor in (x, weight, torch.randn(7).double())]
    results = []
    for convolve in (winograd_conv1d, partial(functional.conv1d, padding=width // 2)):
        out = convolve(*given)
        first = torch.autograd.grad(out.square().sum(), given, create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), given)
        results.append((out, *first, *second))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", WIDTHS)
def test_minimal_filtering_rounds_to_a_few_millionths(width):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(64, 256, 16), torch.randn(256, 256, width) / (256 * width) ** 0.5, torch.randn(256)
    exact = functional.conv1d(x.double(), weight.double(), bias.double(), padding=width // 2)
    assert (winograd_conv1d(x, weight, bias) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_only_a_training_step_takes_the_minimal_filtering():
    torch.manual_seed(0)
    conv, x = Conv1d(MANY_CHANNELS, MANY_CHANNELS, 3, padding=1), torch.randn(8, MANY_CHANNELS, 16)
    pytorch = functional.conv1d(x, conv.weight, conv.bias, padding=1)
    with torch.no_grad():
        assert torch.equal(conv(x), pytorch)
    trained = conv(x.requires_grad_())
    assert torch.equal(trained, winograd_conv1d(x, conv.weight, conv.bias))
    assert not torch.equal(trained, pytorch)
