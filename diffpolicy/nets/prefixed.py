"""A network that is told which actions of a chunk stand clean already: training-time real-time chunking.

    x_t  a a a x x x x x x x     (B, Tp, Da)        times   0 0 0 t t t t t t t
    mask 1 1 1 0 0 0 0 0 0 0     one channel more

A network speaks to all positions of a chunk with one time; here that is the time of what is not clean, and the mask
says where it does not hold (Black et al. 2025, arXiv 2512.05964, give each action its own time). Lengths of prefixes
are equally likely in training; in their simulations short ones are e times as likely as those one longer.
"""

import torch
from torch.nn import functional

from diffpolicy.nets.network import Network


class Prefixed(Network):
    """`(B, Tp, Da), (B,) or (B, Tp), (B, C) -> (B, Tp, Da)`; actions whose own time is 0 are clean.

    Args:
        inner: the same of `Da + 1` channels.
        longest: of the clean prefixes that it is trained with, in actions from the chunk's first.
    """

    def __init__(self, inner: Network, longest: int) -> None:
        super().__init__()
        self.inner = inner
        self.longest = longest

    def prefixes(self, n: int, horizon: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        """Which actions of `n` chunks are clean in training, `(n, horizon)`: the first 0 to `longest`, as likely."""
        length = torch.randint(self.longest + 1, (n, 1), generator=generator, device=device)
        return torch.arange(horizon, device=device) < length

    def of_time(self, t: torch.Tensor) -> torch.Tensor:
        """As the network inside."""
        return self.inner.of_time(t)

    def of_cond(self, cond: torch.Tensor) -> torch.Tensor:
        """As the network inside."""
        return self.inner.of_cond(cond)

    def modulation(self, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """As the network inside."""
        return self.inner.modulation(t, cond)

    def body(self, x_t: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """Nothing is clean."""
        return self.inner.body(functional.pad(x_t, (0, 1)), modulation)[..., :-1]

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Predict a chunk some of which may be clean."""
        if t.ndim == 1:
            return super().forward(x_t, t, cond)
        marked = torch.cat([x_t, (t == 0).to(x_t).unsqueeze(-1)], dim=-1)
        return self.inner.body(marked, self.inner.modulation(t.amax(1), cond))[..., :-1]
