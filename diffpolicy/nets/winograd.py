r"""Convolution by minimal filtering (Winograd 1980; Lavin and Gray 2016): half the products of a training step.

A U-Net trained on a CPU spends its time in the products of its convolutions. Four neighbouring outputs of a kernel of
3 need 12 products taken one by one, but only 6 as polynomials: with `n = 4 + k - 1` points (one at infinity), the
values of the kernel `G w` times the values of the signal `D x`, then back:

    x (L, B C_in) -- D --> (n, T B, C_in)
                               @  n products   --> (n, T B, C_out) -- Y --> (L, B C_out)
    w (k, C_in C_out) - G --> (n, C_in, C_out)

`D` and `Y` hold the tiles, the zeros at both ends and the interpolation in one matrix each, made once a length.
All is plain tensor algebra, so gradients of any order exist. Rounding is about ten times that of the direct way: 5e-6
of the outputs' size (`tests/nets/test_conv.py`).
"""

from functools import lru_cache

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
    to_values, kernel_values, from_values = (matrix.to(x.dtype) for matrix in _matrices(length, width))
    signal = (to_values @ x.reshape(-1, length).t()).view(len(kernel_values), -1, channels)
    kernel = (kernel_values @ weight.permute(2, 1, 0).reshape(width, -1)).view(-1, channels, out_channels)
    products = torch.bmm(signal, kernel).view(-1, batch * out_channels)
    return (from_values @ products).view(length, batch, out_channels).permute(1, 2, 0) + bias.unsqueeze(-1)


@lru_cache
def _matrices(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `D (n T, L)`, `G (n, k)` and `Y (L, n T)`."""
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


def _values(count: int, terms: int) -> torch.Tensor:
    """Return `(count, terms)`: the matrix that evaluates a polynomial of so many terms at the points and infinity."""
    finite = torch.tensor(POINTS[: count - 1], dtype=torch.double).unsqueeze(-1) ** torch.arange(terms)
    return torch.cat([finite, torch.eye(terms, dtype=torch.double)[-1:]])
