r"""Chunk strategies: when the next chunk is asked for, what it must agree with, and which action is written meanwhile.

    action number     0 1 2 3 4 5 6 7 8 9 ...            counted as they are consumed, never by seconds
    chunk of 0        a a a a a a . . .                  planned from the observation before action 0
    chunk of 4              | - - a a a a . . .          asked for at 4, there at 6: its delay is d = 2

Element `To-1` of a chunk is the action whose number is the chunk's `origin`. Of the `H = Tp-To+1` elements from there
on `Ta` are executed; `d + Ta <= H` has to hold. A strategy is a value: it keeps nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.guidance import RealTimeChunk
from diffpolicy.diffusion.prefix import Decay, Guide, Prefix, linear, prefix_weights


@dataclass(frozen=True)
class Chunk:
    """A planned chunk: `actions (Tp, Da)`, number of its element `start = To-1`, and when its observation was made."""

    actions: np.ndarray
    origin: int
    start: int
    time: float

    def at(self, number: int) -> np.ndarray | None:
        """Return the action of that number, None beyond the chunk's end."""
        index = self.start + number - self.origin
        return self.actions[index] if 0 <= index < len(self.actions) else None


class Strategy(ABC):
    """One way of joining chunks."""

    waits: bool = False
    """Whether the arm rests while a chunk is planned."""
    keeps: int = 1
    """How many of the last chunks are kept."""
    samples: int = 1
    """Chunks sampled a plan, of which `choose` takes one."""
    repeats: int = 1
    """How often each step of the sampler is taken."""

    def due(self, spec: Spec, since: int, delay: int) -> bool:
        """Whether to ask for a chunk, `since` actions after the last one's origin, if it takes `delay` of them."""
        return since >= max(1, min(spec.n_action_steps, reach(spec) - delay))

    def budget(self, spec: Spec, delay: int) -> int:
        """Return how many actions from its origin on a chunk may be executed before the next one is late."""
        return min(spec.n_action_steps + delay, reach(spec))

    @abstractmethod
    def action(self, chunks: Sequence[Chunk], number: int) -> np.ndarray | None:
        """Return the action of that number from the chunks, oldest first; None if none has it."""

    def prefix(self, spec: Spec, former: Chunk, origin: int, delay: int) -> Prefix | None:
        """Return what a chunk with this origin must agree with."""
        return None

    def choose(self, chunks: np.ndarray, former: Chunk | None, origin: int, delay: int) -> int:
        """Return which of the sampled chunks `(samples, Tp, Da)` to take."""
        return 0


def reach(spec: Spec) -> int:
    """Return `H`, actions of a chunk from the current step's on."""
    return spec.horizon - spec.n_obs_steps + 1


def _newest(chunks: Sequence[Chunk], number: int) -> np.ndarray | None:
    return chunks[-1].at(number) if chunks else None


@dataclass(frozen=True)
class Synchronous(Strategy):
    """Receding horizon as in simulation: `Ta` actions, then the arm rests until the next chunk is there."""

    waits = True

    def due(self, spec: Spec, since: int, delay: int) -> bool:
        """Ask when the chunk is used up."""
        return since >= spec.n_action_steps

    def budget(self, spec: Spec, delay: int) -> int:
        """`Ta`."""
        return spec.n_action_steps

    def action(self, chunks: Sequence[Chunk], number: int) -> np.ndarray | None:
        """Take it from the newest chunk."""
        return _newest(chunks, number)


@dataclass(frozen=True)
class Switch(Strategy):
    """The next chunk is planned while this one is executed, and taken as it comes: no rest, but a jump."""

    def action(self, chunks: Sequence[Chunk], number: int) -> np.ndarray | None:
        """Take it from the newest chunk."""
        return _newest(chunks, number)


@dataclass(frozen=True)
class Ensemble(Strategy):
    """Temporal ensembling (Zhao et al. 2023): plan without pause, average all chunks that know an action.

    The weight of the `i`-th, oldest first, is `exp(-decay i) / sum`. Two ways round an obstacle average into it.
    """

    decay: float = 0.01
    keeps: int = 16

    def due(self, spec: Spec, since: int, delay: int) -> bool:
        """Ask at every new action."""
        return since >= 1

    def action(self, chunks: Sequence[Chunk], number: int) -> np.ndarray | None:
        """Average."""
        known = [action for chunk in chunks if (action := chunk.at(number)) is not None]
        if not known:
            return None
        weights = np.exp(-self.decay * np.arange(len(known)))
        return weights @ np.stack(known) / weights.sum()


@dataclass(frozen=True)
class RealTime(Strategy):
    """Real-time chunking (Black et al. 2025): a chunk is planned to agree with the rest of the one being executed.

    The actions that will be executed while it is planned are frozen; those after them count less and less.

    Args:
        guide: `RealTimeChunk` (guided through the Jacobian), `Pinned` (inpainting), either with options by `partial`.
        decay: of the weights after the frozen actions: `linear`, `exponential`, or `hard` for none.
        repeats: RePaint's, for `Pinned`.
    """

    guide: Guide = RealTimeChunk
    decay: Decay = linear
    repeats: int = 1

    def action(self, chunks: Sequence[Chunk], number: int) -> np.ndarray | None:
        """Take it from the newest chunk."""
        return _newest(chunks, number)

    def prefix(self, spec: Spec, former: Chunk, origin: int, delay: int) -> Prefix | None:
        """Return the rest of the former chunk; beyond its end stands its last action, with weight 0, never zeros."""
        shift = origin - former.origin
        end = spec.horizon - shift
        if end <= 0:
            return None
        rest = former.actions[np.minimum(np.arange(spec.horizon) + shift, spec.horizon - 1)]
        weights = prefix_weights(spec.horizon, spec.n_obs_steps - 1, delay, end, self.decay)
        return Prefix(torch.from_numpy(rest)[None].float(), weights, self.guide, self.repeats)


@dataclass(frozen=True)
class Bidirectional(Strategy):
    """Bidirectional decoding, its backward half (Liu et al. 2024): of several samples the nearest to the former chunk.

    `argmin_i sum_k decay^k |a_i,k - former_k|` over the actions both know, from the first one to be executed on. Its
    forward half, the contrast with a weaker policy, is left out.
    """

    samples: int = 16
    decay: float = 0.5

    def action(self, chunks: Sequence[Chunk], number: int) -> np.ndarray | None:
        """Take it from the newest chunk."""
        return _newest(chunks, number)

    def choose(self, chunks: np.ndarray, former: Chunk | None, origin: int, delay: int) -> int:
        """Return the nearest."""
        if former is None:
            return 0
        shift, first = origin - former.origin, former.start + delay
        both = len(former.actions) - shift - first
        if both <= 0:
            return 0
        distance = np.linalg.norm(chunks[:, first : first + both] - former.actions[first + shift :], axis=-1)
        return int((distance @ self.decay ** np.arange(both)).argmin())
