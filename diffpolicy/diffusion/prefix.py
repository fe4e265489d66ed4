r"""What is decided of a chunk before it is planned: the rest of the former chunk, and how much each action counts.

index    0 ... To-1 ... To-1+d ......... end ... Tp-1         d    actions executed while this chunk is planned
weight   1      1       c, decaying       0       0           end  first index that the former chunk does not reach

c = (end - i) / (end - To+1 - d + 1)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffpolicy.diffusion.denoiser import Denoiser
from diffpolicy.diffusion.guidance import RealTimeChunk

Decay = Callable[[torch.Tensor], torch.Tensor]
Guide = Callable[[Denoiser, torch.Tensor, torch.Tensor], Denoiser]


def linear(c: torch.Tensor) -> torch.Tensor:
    """`c`, falling from 1 to 0."""
    return c


def exponential(c: torch.Tensor) -> torch.Tensor:
    """`c (e^c - 1) / (e - 1)` (Black et al. 2025, eq. 5)."""
    return c * torch.expm1(c) / (math.e - 1)


def hard(c: torch.Tensor) -> torch.Tensor:
    """0: what is not frozen is free."""
    return torch.zeros_like(c)


def prefix_weights(horizon: int, start: int, delay: int, end: int, decay: Decay = linear) -> torch.Tensor:
    """Weights of a chunk whose first actions are decided.

    Args:
        horizon: `Tp`.
        start: `To - 1`, index of the action of the current step; those before it have been executed. In Black et al.
            (2025) `To` is 1 and `start` 0.
        delay: `d`, how many actions from there on are executed before this chunk is used.
        end: first index that the former chunk does not reach.
        decay: of the weight with `c`.

    Returns:
        `(Tp,)` in [0, 1].
    """
    i = torch.arange(horizon)
    frozen = min(start + delay, end)
    weights = decay(((end - i) / (end - frozen + 1)).clamp(0, 1))
    return torch.where(i < frozen, 1.0, torch.where(i < end, weights, 0.0))


@dataclass(frozen=True)
class Prefix:
    """An input of a plan, as noise is.

    Args:
        chunk: known actions `(B, Tp, Da)` in the units of the plan's result, finite everywhere; where the weight is 0
            it does not matter.
        weights: `(Tp,)` or `(B, Tp)` in [0, 1], 1 known and 0 free.
        guide: how it is imposed: `RealTimeChunk`, `Pinned`, or one of them with its options by `functools.partial`.
        repeats: how often each step of the sampler is taken, with noise put back between (RePaint).
    """

    chunk: torch.Tensor
    weights: torch.Tensor
    guide: Guide = RealTimeChunk
    repeats: int = 1
