"""The convolution over few positions against PyTorch's own."""

import pytest
import torch
from torch import nn

from diffpolicy.nets.conv import FEW_POSITIONS, Conv1d


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
