"""Networks whose convolutions and linear layers are products with one matrix, of float32 or 8 bits: only to sample.

    out[l] = [x[l] x[l+1] ... ] (k C_in)   times   W (C_out, k C_in) transposed
    out[2l], out[2l+1] = [x[l-1] x[l] x[l+1]]   times   (W3 W1 0; 0 W2 W0)      the transposed one: kernel 4, stride 2

At batch 1 sampling is reading weights, and compilers read matrices best: they lay them out once, and keep 8 bits with
one scale a row packed until they are used. Small matrices stay exact: they are little to read, and near the network's
ends they decide most. With all of the canonical network in 8 bits an action differs by up to 2.0 % of its range, with
its large matrices (86 % of the weights) by 0.7 % (untrained, the first evaluation exact).
"""

from collections.abc import Callable
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

from diffpolicy.nets.conv import two_phases

Product = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]
AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)
LARGE = 0.01
"""Share of a network's weights from which on a matrix is large."""


class Exact(nn.Module):
    """`x (..., n) -> x W^T + b (..., m)`."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", matrix.detach().contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return functional.linear(x, self.weight, self.bias)


class Compressed(nn.Module):
    """The same with `W = scale * levels`: levels are whole numbers in [-127, 127], one scale an output."""

    levels: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        largest = matrix.detach().abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, largest, 1.0) / 127
        self.register_buffer("levels", (matrix.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix `(m, n)`."""
        return self.levels.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return functional.linear(x, self.weight, self.bias)


class WindowProduct(nn.Module):
    """`(B, C_in, L) -> (B, C_out, L_out)`: `product` takes windows of `width` positions to `phases` positions each."""

    def __init__(self, product: nn.Module, width: int, stride: int, padding: int, phases: int) -> None:
        super().__init__()
        self.product = product
        self.width, self.stride, self.padding, self.phases = width, stride, padding, phases

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Cut windows, multiply, lay the phases side by side."""
        rows = functional.pad(x.transpose(1, 2), (0, 0, self.padding, self.padding))
        starts = torch.arange(0, rows.shape[1] - self.width + 1, self.stride, device=x.device).unsqueeze(1)
        places = (starts + torch.arange(self.width, device=x.device)).flatten()
        windows = rows.index_select(1, places).view(len(rows), len(starts), -1)
        out = self.product(windows)
        return out.reshape(len(out), out.shape[1] * self.phases, -1).transpose(1, 2)


def least_large(network: nn.Module) -> float:
    """Return how many weights a large matrix of this network has at least."""
    return LARGE * sum(weight.numel() for weight in network.parameters())


def with_products(network: AnyNetwork, product: Product) -> AnyNetwork:
    """Return a copy of `network` whose convolutions and linear layers are products.

    Args:
        network: of `Conv1d`, `ConvTranspose1d` (kernel 4, stride 2, padding 1) and `Linear`; it stays as it was.
        product: of the large matrices, `Exact` or `Compressed`; the others are exact.
    """
    copy = deepcopy(network).requires_grad_(False)
    large = least_large(network)

    def product_of(matrix: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        return (product if matrix.numel() >= large else Exact)(matrix, bias)

    for module in list(copy.modules()):
        for name, child in module.named_children():
            setattr(module, name, _as_product(child, product_of))
    return copy


def _as_product(module: nn.Module, product: Product) -> nn.Module:
    if isinstance(module, nn.Linear):
        return product(module.weight, module.bias)
    if isinstance(module, nn.Conv1d):
        matrix = module.weight.permute(0, 2, 1).flatten(1)
        width, stride, padding = module.kernel_size[0], module.stride[0], int(module.padding[0])
        return WindowProduct(product(matrix, module.bias), width, stride, padding, phases=1)
    if isinstance(module, nn.ConvTranspose1d):
        assert (module.kernel_size, module.stride, module.padding) == ((4,), (2,), (1,))
        bias = None if module.bias is None else module.bias.repeat(2)
        matrix = two_phases(module.weight).flatten(1)
        return WindowProduct(product(matrix, bias), width=3, stride=1, padding=1, phases=2)
    return module
