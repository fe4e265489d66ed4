"""Encoders: a mapping of named observation histories to one condition vector."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn


class FlattenEncoder(nn.Module):
    """Concatenate the named histories, in a fixed order: `{name: (B, To, D_name)} -> (B, To * sum D_name)`."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)

    def forward(self, obs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Encode."""
        return torch.cat([obs[name].flatten(2) for name in self.names], dim=-1).flatten(1)


class EmbeddingEncoder(nn.Module):
    """The flat history, and beside it a learned embedding of it: `-> (B, flat_dim + embed_dim)`.

    A U-Net's FiLM passes its condition through one elementwise Mish: states that differ in how their entries relate
    (is the tool left or right of the block?) look alike to it. Two layers in front tell them apart.

    Args:
        names: of the observations, in order.
        flat_dim: size of the flat history.
        embed_dim: size of the embedding.
    """

    def __init__(self, names: Sequence[str], flat_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.flatten = FlattenEncoder(names)
        self.net = nn.Sequential(nn.Linear(flat_dim, 2 * embed_dim), nn.Mish(), nn.Linear(2 * embed_dim, embed_dim))

    def forward(self, obs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Encode."""
        flat = self.flatten(obs)
        return torch.cat([flat, self.net(flat)], dim=-1)
