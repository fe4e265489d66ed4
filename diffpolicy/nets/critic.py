"""Critics: an ensemble of networks that value an action chunk, all members in one batched product a layer.

    cond (B, C) -> its first obs_dim entries, the flat history ---+
    chunk (B, Tp, Da) -> the executed actions, (B, Ta Da) --------+--> Q (E, B) --aggregate--> (B,)

Every encoder puts the flat history first (`nets/encoder.py`), so a critic reads the condition of any policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from diffpolicy.nets.embed import TimeEmbedding

Aggregate = Callable[[torch.Tensor], torch.Tensor]
Scales = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def minimum(q: torch.Tensor) -> torch.Tensor:
    """Smallest of the members, `(E, ...) -> (...)` (Fujimoto et al. 2018)."""
    return q.amin(0)


def mean(q: torch.Tensor) -> torch.Tensor:
    """Mean of the members, `(E, ...) -> (...)`."""
    return q.mean(0)


@dataclass(frozen=True)
class LowerBound:
    """`mean - rho std` over the members, `(E, ...) -> (...)`: the lower confidence bound (Fang et al. 2024)."""

    rho: float

    def __call__(self, q: torch.Tensor) -> torch.Tensor:
        """Aggregate."""
        return q.mean(0) - self.rho * q.std(0, correction=0)


class EnsembleLinear(nn.Module):
    """E linear maps at once: `(B, in)`, the same for all, or `(E, B, in) -> (E, B, out)`."""

    def __init__(self, members: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = in_dim**-0.5
        self.weight = nn.Parameter(torch.empty(members, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return torch.baddbmm(self.bias, x.expand(len(self.weight), -1, -1), self.weight)


class EnsembleNorm(nn.Module):
    """LayerNorm with a scale and a shift for each member, `(E, B, dim)`."""

    def __init__(self, members: int, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(members, 1, dim))
        self.shift = nn.Parameter(torch.zeros(members, 1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        return torch.addcmul(self.shift, functional.layer_norm(x, x.shape[-1:]), self.scale)


class Ensemble(nn.Sequential):
    """E networks of Linear, (LayerNorm,) activation a layer, then one output: `(B, in) -> (E, B, 1)`.

    Args:
        in_dim: size of an input row.
        hidden: width of each layer.
        members: E.
        activation: makes the activation of a layer.
        layer_norm: whether to normalise before each activation (Ball et al. 2023): it bounds what a critic says of
            actions far from the data.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        members: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        layer_norm: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [EnsembleLinear(members, in_dim, size)]
            layers += [EnsembleNorm(members, size)] if layer_norm else []
            layers += [activation()]
            in_dim = size
        super().__init__(*layers, EnsembleLinear(members, in_dim, 1))


class Critic(nn.Module):
    """Value of doing a chunk's executed actions after a history.

    Args:
        body: of inputs `obs_dim + Ta Da`.
        obs_dim: size of the flat history, the first entries of a condition.
        executed: the executed part of a chunk, `[To-1 : To-1+Ta]`.
        aggregate: one number of those of the members, for targets and for choosing.
    """

    def __init__(self, body: Ensemble, obs_dim: int, executed: slice, aggregate: Aggregate) -> None:
        super().__init__()
        self.body = body
        self.obs_dim = obs_dim
        self.executed = executed
        self.aggregate = aggregate

    def forward(self, cond: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        """Return the value by each member, `(E, B)`, of chunks `(B, Tp, Da)` on the unit scale after `cond (B, C)`."""
        actions = chunk[:, self.executed].flatten(1)
        return self.body(torch.cat([cond[:, : self.obs_dim], actions], dim=-1)).squeeze(-1)

    def value(self, cond: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        """Aggregate over the members, `(B,)`."""
        return self.aggregate(self(cond, chunk))


class Value(nn.Module):
    """Value of a history alone, `cond (B, C) -> (B,)`: one network over the first `obs_dim` entries."""

    def __init__(self, body: Ensemble, obs_dim: int) -> None:
        super().__init__()
        self.body = body
        self.obs_dim = obs_dim

    def forward(self, cond: torch.Tensor) -> torch.Tensor:
        """Evaluate."""
        return self.body(cond[:, : self.obs_dim]).squeeze(-1).squeeze(0)


class NoisedValue(nn.Module):
    """Value of a noised chunk after a history, to guide its sampling and, of clean chunks, to choose among samples.

    It sees `alpha x_t`: so its slope falls with `alpha` towards `t = 1`, as that of the true `E[return | x_t]` does,
    and guidance, which divides by `alpha`, stays bounded.

    Args:
        body: of inputs `obs_dim + time_dim + Tp Da`.
        obs_dim: size of the flat history, the first entries of a condition.
        time_dim: size of the diffusion time's embedding.
        scales: `t (B,) -> (alpha, sigma)`, the schedule.
        aggregate: one number of those of the members.
    """

    def __init__(self, body: Ensemble, obs_dim: int, time_dim: int, scales: Scales, aggregate: Aggregate) -> None:
        super().__init__()
        self.body = body
        self.obs_dim = obs_dim
        self.time = TimeEmbedding(time_dim)
        self.scales = scales
        self.aggregate = aggregate

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Return the value by each member, `(E, B)`, of `x_t (B, Tp, Da)` at times `t (B,)` after `cond (B, C)`."""
        signal = self.scales(t)[0].unsqueeze(-1) * x_t.flatten(1)
        return self.body(torch.cat([cond[:, : self.obs_dim], self.time(t), signal], dim=-1)).squeeze(-1)

    def noised(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Aggregate over the members, `(B,)`."""
        assert cond is not None
        return self.aggregate(self(x_t, t, cond))

    def value(self, cond: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        """Value `(B,)` of clean chunks."""
        return self.noised(chunk, chunk.new_zeros(len(chunk)), cond)
