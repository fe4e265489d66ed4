r"""GroupNorm followed by Mish, as one step of a training on a CPU.

    mish(y) = y h,   h = tanh(softplus(y)) = s (2 - s) / (2 - s (2 - s)),   s = sigmoid(y)
    mish'(y) = h + y s (1 - h^2)

so one sigmoid serves both directions, where PyTorch evaluates an exponential, a logarithm and a hyperbolic tangent in
each. Activations lie length first in memory (`conv.py`), so that sums over a chunk are sums of rows.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffpolicy.nets.conv import trains_on_cpu


class GroupNormMish(nn.GroupNorm):
    """`nn.GroupNorm`, then Mish: `(B, C, L) -> (B, C, L)`; its parameters are GroupNorm's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each group of channels, scale, shift, activate."""
        if trains_on_cpu(x, self.weight):
            out = _NormMish.apply(x.permute(2, 0, 1), self.weight, self.bias, self.num_groups, self.eps)
            return out.permute(1, 2, 0)
        return functional.mish(super().forward(x))


class _NormMish(torch.autograd.Function):
    """`(L, B, C) -> (L, B, C)`; in place wherever it can be, which takes half the time."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        x, ctx.groups = x.contiguous(), groups
        centred = x - _mean(x.sum(0), len(x), groups)
        rstd = (_mean(centred.square().sum(0), len(x), groups) + eps).rsqrt_()
        y = torch.addcmul(bias, centred, rstd * weight)
        s = y.sigmoid()
        p = (2 - s).mul_(s)
        h = p.div_(2 - p)
        ctx.save_for_backward(centred, rstd, weight, y, s, h)
        return y * h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        centred, rstd, weight, y, s, h = ctx.saved_tensors
        slope = h.square().sub_(1).mul_(s).mul_(y).neg_().add_(h)
        at_y = slope.mul_(gradient)
        to_bias, to_weight = at_y.sum(0), (at_y * centred).sum(0).mul_(rstd)
        shift = _mean(to_bias * weight, len(y), ctx.groups)
        tilt = _mean(to_weight * weight, len(y), ctx.groups)
        at_x = torch.addcmul(-rstd * shift, centred, -rstd * rstd * tilt).addcmul_(at_y, rstd * weight)
        return at_x, to_weight.sum(0), to_bias.sum(0), None, None


def _mean(sums: torch.Tensor, length: int, groups: int) -> torch.Tensor:
    """Sums over the length `(B, C)` to the mean of each group, repeated for its channels `(B, C)`."""
    of_groups = sums.view(len(sums), groups, sums.shape[1] // groups)
    return of_groups.mean(2, keepdim=True).div_(length).expand_as(of_groups).reshape(sums.shape)
