r"""Convolution by minimal filtering (Winograd 1980; Lavin and Gray 2016): half the products of a training step.

A U-Net trained on a CPU spends its time in the products of its convolutions. Four neighbouring outputs of a kernel of
3 need 12 products taken one by one, but only 6 as polynomials: with `n = 4 + k - 1` points (one at infinity), the
values of the kernel `G w` times the values of the signal `D x`, then back:

    x (L, B C_in) --- D --> (n, T B, C_in)
                               @  n products   --> (n, T B, C_out) -- Y --> (L, B C_out)
    w (k, C_out C_in) - G --> (n, C_out, C_in)

`D` and `Y` hold the tiles, the zeros at both ends and the interpolation in one matrix each, made once a length; a chunk
of one tile needs 7 points for a kernel of 5, not 8. Gradients of any order exist. Rounding is about ten times that of
the direct way: 5e-6 of the outputs' size (`tests/nets/test_conv.py`).
"""

from functools import lru_cache
from typing import Any

import torch

TILE = 4
"""Outputs of one tile."""
POINTS = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0)
"""Where the polynomials are evaluated, besides infinity; more points than these lose too many digits."""
WIDTHS = (3, 5)
"""Kernel sizes that these points suffice for."""


def winograd_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Convolve without change of length: `(B, C_in, L), (C_out, C_in, k), (C_out,) -> (B, C_out, L)`, `k` 3 or 5."""
    batch, channels, length = x.shape
    out_channels, _, width = weight.shape
    to_values, kernel_values, from_values = _matrices(length, width, x.dtype)
    signal = (to_values @ x.permute(2, 0, 1).reshape(length, -1)).view(len(kernel_values), -1, channels)
    kernel = _KernelValues.apply(weight, kernel_values).view(-1, out_channels, channels)
    products = _Products.apply(signal, kernel).view(-1, batch * out_channels)
    return (from_values @ products).view(length, batch, out_channels).add_(bias).permute(1, 2, 0)


# PyTorch would find the same ways back, but lays the gradients transposed in memory, and copying them takes longer.


class _Products(torch.autograd.Function):
    """`(n, T B, C_in), (n, C_out, C_in) -> (n, T B, C_out)`."""

    @staticmethod
    def forward(ctx: Any, signal: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(signal, kernel)
        return signal @ kernel.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal, kernel = ctx.saved_tensors
        return gradient @ kernel, gradient.transpose(1, 2) @ signal


class _KernelValues(torch.autograd.Function):
    """`(C_out, C_in, k), (n, k) -> (n, C_out C_in)`."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, kernel_values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kernel_values)
        ctx.shape = weight.shape
        return kernel_values @ weight.reshape(-1, weight.shape[2]).t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kernel_values,) = ctx.saved_tensors
        return torch.stack((kernel_values.t() @ gradient).unbind(), dim=1).view(ctx.shape), None


@lru_cache
def _matrices(length: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `D (n T, L)`, `G (n, k)` and `Y (L, n T)`."""
    made = _of_one_tile(width) if length == TILE < width else _of_tiles(length, width)
    to_values, kernel_values, from_values = (matrix.to(dtype) for matrix in made)
    return to_values, kernel_values, from_values


def _of_tiles(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Interpolate the signal under each tile, at as many points as it is long."""
    count, tiles = TILE + width - 1, -(-length // TILE)
    interpolate = torch.linalg.inv(_values(count, count)).t()
    padded = torch.zeros(tiles * TILE + width - 1, length, dtype=torch.double)
    padded[width // 2 : width // 2 + length] = torch.eye(length)
    to_values = torch.zeros(count, tiles, length, dtype=torch.double)
    from_values = torch.zeros(tiles * TILE, count, tiles, dtype=torch.double)
    for tile in range(tiles):
        first = tile * TILE
        to_values[:, tile] = interpolate @ padded[first : first + count]
        from_values[first : first + TILE, :, tile] = _values(count, TILE).t()
    return to_values.reshape(-1, length), _values(count, width), from_values[:length].reshape(length, -1)


def _of_one_tile(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Interpolate the kernel instead: from value to value of a tile among zeros reach `2 TILE - 1` taps at most."""
    count, first = 2 * TILE - 1, TILE - 1 - width // 2
    interpolate = torch.linalg.inv(_values(count, count)).t()
    values = _values(count, TILE)
    return values, interpolate[:, first : first + width], values.flip(1).t()


def _values(count: int, terms: int) -> torch.Tensor:
    """Return `(count, terms)`: the matrix that evaluates a polynomial of so many terms at the points and infinity."""
    finite = torch.tensor(POINTS[: count - 1], dtype=torch.double).unsqueeze(-1) ** torch.arange(terms)
    return torch.cat([finite, torch.eye(terms, dtype=torch.double)[-1:]])
