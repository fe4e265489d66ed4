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
