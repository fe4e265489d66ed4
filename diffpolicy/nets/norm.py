r"""GroupNorm followed by Mish, as one step of a training on a CPU.

PyTorch evaluates Mish through two transcendental functions forward and two backward, and the backward pass of its
GroupNorm is slower than the sums that it needs. With `w = exp(y)` and `n = w (w + 2)` both are rational:

    mish(y) = y n / (n + 2)        mish'(y) = n / (n + 2) + 4 y w (w + 1) / (n + 2)^2

so one exponential serves both, and the backward pass is a product with `mish'(y)`, kept from the forward one.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffpolicy.nets.conv import trains_on_cpu

LINEAR = 20.0
"""Above this Mish is the identity in float32; the exponential is taken no further."""


class GroupNormMish(nn.GroupNorm):
    """`nn.GroupNorm`, then Mish: `(B, C, L) -> (B, C, L)`; its parameters are GroupNorm's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each group of channels, scale, shift, activate."""
        if trains_on_cpu(x, self.weight):
            return _NormMish.apply(x.contiguous(), self.weight, self.bias, self.num_groups, self.eps)
        return functional.mish(super().forward(x))


class _NormMish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        batch, channels, length = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, length, groups, eps)
        w = y.clamp(max=LINEAR).exp_()
        n = torch.addcmul(2 * w, w, w)
        inverse = (n + 2).reciprocal_()
        ratio = n.mul_(inverse)
        slope = w.addcmul_(w, w).mul_(inverse).mul_(inverse).mul_(y).mul_(4).add_(ratio)
        ctx.save_for_backward(x, weight, mean, rstd, slope)
        return y.mul_(ratio)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, rstd, slope = ctx.saved_tensors
        batch, groups = mean.shape
        mean, rstd = mean.unsqueeze(-1), rstd.unsqueeze(-1)
        normal = torch.addcmul(-mean * rstd, x.view(batch, groups, -1), rstd)
        at_y = gradient.contiguous() * slope  # whoever reads the output transposed sends it back so
        to_bias, to_weight = at_y.sum(2), (at_y * normal.view_as(x)).sum(2)
        size = normal.shape[-1]
        shift = (to_bias * weight).view(batch, groups, -1).sum(2, keepdim=True) / size
        tilt = (to_weight * weight).view(batch, groups, -1).sum(2, keepdim=True) / size
        at_x = at_y.mul_(weight.unsqueeze(-1)).view_as(normal).sub_(shift).addcmul_(normal, tilt, value=-1).mul_(rstd)
        return at_x.view_as(x), to_weight.sum(0), to_bias.sum(0), None, None
