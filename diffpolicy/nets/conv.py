"""Convolutions over few positions, as one matrix product.

At batch 1 a deep level of the U-Net is 1024 x 1024 x 5 weights over 4 positions: its cost is reading the weights once.
PyTorch's convolution reorders them at each call, which takes ten times as long; a product of the windows with the
weights as they lie does not:

    out[l] = sum_k W[:, :, k] x[l + k]   =   [x[l] x[l+1] ... ] (L, C_in k)   times   W (C_out, C_in k) transposed

The function and the parameters are those of `nn.Conv1d`; which way is taken depends on sizes only.
"""

import torch
from torch import nn
from torch.nn import functional

FEW_POSITIONS = 64


class Conv1d(nn.Conv1d):
    """`nn.Conv1d`, without groups or dilation, fast where batch times length is small on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, C_in, L) -> (B, C_out, L_out)`."""
        (width,), (stride,), padding = self.kernel_size, self.stride, int(self.padding[0])
        length = (x.shape[-1] + 2 * padding - width) // stride + 1
        if x.device.type != "cpu" or x.shape[0] * length > FEW_POSITIONS:
            return super().forward(x)
        windows = functional.pad(x, (padding, padding)).unfold(-1, width, stride)
        rows = windows.permute(0, 2, 1, 3).reshape(-1, x.shape[1] * width)
        out = functional.linear(rows, self.weight.flatten(1), self.bias)
        return out.view(x.shape[0], length, -1).transpose(1, 2)
