"""A plain network over the flattened chunk: for short horizons and small machines, where convolutions do not pay."""

import torch
from torch import nn

from diffpolicy.nets.embed import TimeEmbedding


class Mlp(nn.Module):
    """`(B, Tp, Da), (B,), (B, C) -> (B, Tp, Da)`: residual blocks of LayerNorm, Linear, Mish, Linear.

    Args:
        action_dim: `Da`.
        horizon: `Tp`, fixed.
        cond_dim: `C`, size of the encoded observation history (0 for none).
        hidden_dim: width.
        depth: number of residual blocks.
        step_embed_dim: size of the diffusion time's embedding.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        cond_dim: int,
        hidden_dim: int = 256,
        depth: int = 3,
        step_embed_dim: int = 64,
    ) -> None:
        super().__init__()
        self.time = TimeEmbedding(step_embed_dim)
        self.inlet = nn.Linear(horizon * action_dim + step_embed_dim + cond_dim, hidden_dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden_dim),
                nn.Linear(hidden_dim, hidden_dim),
                nn.Mish(),
                nn.Linear(hidden_dim, hidden_dim),
            )
            for _ in range(depth)
        )
        self.outlet = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Mish(), nn.Linear(hidden_dim, horizon * action_dim))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Predict; what the prediction means is the denoiser's business."""
        parts = [x_t.flatten(1), self.time(t)] + ([] if cond is None else [cond])
        h = self.inlet(torch.cat(parts, dim=-1))
        for block in self.blocks:
            h = h + block(h)
        return self.outlet(h).view_as(x_t)
