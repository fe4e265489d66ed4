"""Convolutions on a CPU, each by the way that is fastest for its size; the function is that of `nn.Conv1d`.

*Few positions.* At batch 1 a deep level of the U-Net is 1024 x 1024 x 5 weights over 4 positions: its cost is reading
the weights once. PyTorch's convolution reorders them at each call, which takes ten times as long; a product of the
windows with the weights as they lie does not:

    out[l] = sum_k W[:, :, k] x[l + k]   =   [x[l] x[l+1] ... ] (L, C_in k)   times   W (C_out, C_in k) transposed

*Training.* Over the many positions of a batch its cost is the products, and `winograd_conv1d` takes half of them.
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
        if self.bias is not None and self._winograd_pays(x, length) and trains_on_cpu(x, self.weight):
            return winograd_conv1d(x, self.weight, self.bias)
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
