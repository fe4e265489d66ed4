"""Convolutions on a CPU, each by the way that is fastest for its size; the function is that of `nn.Conv1d`.

*Few positions.* At batch 1 a deep level of the U-Net is 1024 x 1024 x 5 weights over 4 positions: its cost is reading
the weights once. PyTorch's convolution reorders them at each call, which takes ten times as long; a product of the
windows with the weights as they lie does not:

    out[l] = sum_k W[:, :, k] x[l + k]   =   [x[l] x[l+1] ... ] (L, C_in k)   times   W (C_out, C_in k) transposed

*Training.* Over the many positions of a batch its cost is the products, and `winograd_conv1d` takes half of them. All
that it and its neighbours do is about rows of `(B, C)`, so activations `(B, C, L)` lie length first in memory, as
`(L, B, C)`, from one layer to the next.

Acting, exporting and compiling keep PyTorch's own.
"""

import torch
from torch import nn
from torch.nn import functional

from diffpolicy.nets.winograd import TILE, WIDTHS, winograd_conv1d

FEW_POSITIONS = 64
MANY_CHANNELS = 32
"""Below this, taking a signal to its values and back costs more than the products that it saves."""


def trains_on_cpu(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether this is a training step of full precision on a CPU, not compiled: where we know better.

    Guidance differentiates too, by the noised chunk alone: it must compute what plain sampling does, to the bit.
    """
    eager = not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    full = x.device.type == "cpu" and x.dtype.itemsize >= 4
    return eager and full and x.requires_grad and weight.requires_grad and torch.is_grad_enabled()


class Conv1d(nn.Conv1d):
    """`nn.Conv1d`, without groups or dilation, fast on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, C_in, L) -> (B, C_out, L_out)`."""
        (width,), (stride,), padding = self.kernel_size, self.stride, int(self.padding[0])
        length = (x.shape[-1] + 2 * padding - width) // stride + 1
        if x.device.type == "cpu" and x.shape[0] * length <= FEW_POSITIONS:
            return self._windows_product(x, length)
        if width <= max(WIDTHS) and trains_on_cpu(x, self.weight):  # wider ones copy too much to be faster
            if self.bias is not None and self._winograd_pays(x, length):
                return winograd_conv1d(x, self.weight, self.bias)
            return length_first_product(x, self.weight.permute(0, 2, 1), self.bias, stride, padding)
        return super().forward(x)

    def _winograd_pays(self, x: torch.Tensor, length: int) -> bool:
        few_channels = min(self.in_channels, self.out_channels) < MANY_CHANNELS
        return self.kernel_size[0] in WIDTHS and length == x.shape[-1] >= TILE and not few_channels

    def _windows_product(self, x: torch.Tensor, length: int) -> torch.Tensor:
        (width,), (stride,), padding = self.kernel_size, self.stride, int(self.padding[0])
        windows = functional.pad(x, (padding, padding)).unfold(-1, width, stride)
        rows = windows.permute(0, 2, 1, 3).reshape(-1, x.shape[1] * width)
        out = functional.linear(rows, self.weight.flatten(1), self.bias)
        return out.view(x.shape[0], length, -1).transpose(1, 2)


class Upsample1d(nn.ConvTranspose1d):
    """`nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)`, fast on a CPU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, C, L) -> (B, C, 2 L)`."""
        if not trains_on_cpu(x, self.weight):
            return super().forward(x)
        assert self.bias is not None
        phases = length_first_product(x, two_phases(self.weight), self.bias.repeat(2), 1, 1)  # (B, 2 C, L)
        return phases.unflatten(1, (2, -1)).permute(3, 1, 0, 2).flatten(0, 1).permute(1, 2, 0)


def length_first_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, padding: int
) -> torch.Tensor:
    """Convolve as one product: `(B, C_in, L), (C_out, k, C_in), (C_out,) -> (B, C_out, L_out)`, length first."""
    rows, width = x.permute(2, 0, 1), weight.shape[1]
    if padding:
        rows = functional.pad(rows, (0, 0, 0, 0, padding, padding))
    starts = len(rows) - width + 1
    windows = torch.cat([rows[k : k + starts : stride] for k in range(width)], dim=-1) if width > 1 else rows[::stride]
    return functional.linear(windows, weight.flatten(1), bias).permute(1, 2, 0)


def join_channels(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`(B, C1, L), (B, C2, L) -> (B, C1 + C2, L)`, length first if they are."""
    if x.is_contiguous():
        return torch.cat([x, y], dim=1)
    return torch.cat([x.permute(2, 0, 1), y.permute(2, 0, 1)], dim=2).permute(1, 2, 0)


def two_phases(weight: torch.Tensor) -> torch.Tensor:
    """Weights of an upsampling `(C_in, C_out, 4)` to those of both its outputs a position, `(2 C_out, 3, C_in)`.

    Even outputs see `x[l-1], x[l]`, odd ones `x[l], x[l+1]`.
    """
    tap = weight.permute(2, 1, 0)
    none = torch.zeros_like(tap[0])
    return torch.cat([torch.stack([tap[3], tap[1], none], dim=1), torch.stack([none, tap[2], tap[0]], dim=1)])
