r"""Chunk strategies: when the next chunk is asked for, what it must agree with, and which action is written meanwhile.

    action number     0 1 2 3 4 5 6 7 8 9 ...            counted as they are consumed, never by seconds
    chunk of 0        a a a a a a . . .                  planned from the observation before action 0
    chunk of 4              | - - a a a a . . .          asked for at 4, there at 6: its delay is d = 2

Element `To-1` of a chunk is the action whose number is the chunk's `origin`. Of the `H = Tp-To+1` elements from there
on `Ta` are executed; `d + Ta <= H` has to hold. A strategy is a value: it keeps nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.guidance import RealTimeChunk, Trained
from diffpolicy.diffusion.prefix import Decay, Guide, Prefix, linear, prefix_weights
from diffpolicy.errors import ControlError


class Planner(Protocol):
    """What control needs of a policy."""

    spec: Spec
    normalizer: Normalizer

    @property
    def device(self) -> torch.device:
        """Where it plans."""
        ...

    @property
    def max_delay(self) -> int:
        """Longest delay for which it was trained to continue chunks, 0 for none."""
        ...

    def draws(self, repeats: int = 1) -> int:
        """Noise tensors of a plan."""
        ...

    def plan(
        self, history: Mapping[str, torch.Tensor], noise: torch.Tensor, prefix: Prefix | None = None
    ) -> torch.Tensor:
        """Chunks `(B, Tp, Da)`, physical units."""
        ...


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
    weak: Planner | None = None
    """A worse policy whose samples `choose` sees too."""

    @property
    def trained(self) -> bool:
        """Whether the policy must have been trained to continue chunks (`DenoiserConfig.max_delay`)."""
        return False

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

    def choose(
        self, chunks: np.ndarray, former: Chunk | None, origin: int, delay: int, weak: np.ndarray | None = None
    ) -> int:
        """Return which of the sampled chunks `(samples, Tp, Da)` to take, given the weak policy's, if there is one."""
        return 0


def reach(spec: Spec) -> int:
    """Return `H`, actions of a chunk from the current step's on."""
    return spec.horizon - spec.n_obs_steps + 1


def check_delay(policy: Planner, strategy: Strategy, delay: int) -> None:
    """Refuse a delay for which chunks are too short, or which the policy was not trained for.

    Raises:
        ControlError: if `n_obs_steps - 1 + n_action_steps + delay` exceeds the horizon, or the strategy asks for a
            policy that was trained to continue chunks and this one was not, for such a delay.
    """
    spec = policy.spec
    if spec.n_action_steps + delay > reach(spec):
        last = spec.n_obs_steps - 1 + spec.n_action_steps + delay
        raise ControlError(
            f"n_obs_steps {spec.n_obs_steps} - 1 + n_action_steps {spec.n_action_steps} + delay {delay} "
            f"= {last} exceeds horizon {spec.horizon}; train with a longer horizon, execute fewer or plan faster"
        )
    if strategy.trained and not (delay <= policy.max_delay and policy.max_delay > 0):
        raise ControlError(
            f"the policy was trained to continue chunks for delays up to {policy.max_delay} and the delay is {delay}; "
            "train with --denoiser.max-delay, or join chunks by another strategy"
        )


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

    The weight of the `i`-th, oldest first, is `exp(-decay i) / sum`; of the newest `keeps`, where the original keeps
    all. Two ways round an obstacle average into it.
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

    The actions that will be executed while it is planned count in full (`Pinned` and `Trained` keep them, guidance
    comes near them), those after them less and less. `RealTime(decay=exponential)` has the original's settings.

    Args:
        guide: `RealTimeChunk` (guided through the Jacobian), `Pinned` (inpainting), either with options by `partial`,
            or `Trained` (with `hard`), for networks that learnt to continue chunks.
        decay: of the weights after the frozen actions: `linear`, `exponential`, or `hard` for none.
        repeats: RePaint's, for `Pinned`.
    """

    guide: Guide = RealTimeChunk
    decay: Decay = linear
    repeats: int = 1

    @property
    def trained(self) -> bool:
        """Whether the network continues what is known by itself."""
        return self.guide is Trained

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
    """Bidirectional decoding (Liu et al. 2024): of several samples the one nearest to the former chunk and likeliest.

    With `|a - b|` the mean distance of two chunks, in physical units, over their actions from the first one to be
    executed on, and `K` the `samples / modes` samples of least `backward`, of this policy and of a weak one (an early
    checkpoint):

        backward_i = sum_k w_k |a_i,k - former_k| / sum_k w_k     over the actions both know, the next of them k = 0
        w_k        = 1 for the `delay` actions that the robot does meanwhile, then decay^(k - delay)
        forward_i  = mean |a_i - a_j| over the K/2 nearest strong j  -  the same over the K/2 nearest weak j
        choice     = argmin over K of backward_i + forward_i

    Without a weak policy there is no forward half, and the choice is the least backward one; the original keeps the
    half of `forward` that compares strong samples. Before the first chunk it compares all samples, here `K` of them.
    """

    samples: int = 16
    decay: float = 0.5
    modes: int = 3
    weak: Planner | None = None

    def action(self, chunks: Sequence[Chunk], number: int) -> np.ndarray | None:
        """Take it from the newest chunk."""
        return _newest(chunks, number)

    def choose(
        self, chunks: np.ndarray, former: Chunk | None, origin: int, delay: int, weak: np.ndarray | None = None
    ) -> int:
        """Return the one nearest to the former chunk, and to its like rather than to the weak ones."""
        backward = self._backward(chunks, former, origin, delay)
        if weak is None:
            return int(backward.argmin())
        kept = max(2, len(chunks) // self.modes)
        strong = np.argsort(backward, kind="stable")[:kept]
        rivals = weak[np.argsort(self._backward(weak, former, origin, delay), kind="stable")[:kept]]
        first = delay if former is None else former.start + delay
        forward = _nearness(chunks[strong], chunks[strong], first, 1) - _nearness(chunks[strong], rivals, first, 0)
        return int(strong[(backward[strong] + forward).argmin()])

    def _backward(self, chunks: np.ndarray, former: Chunk | None, origin: int, delay: int) -> np.ndarray:
        """Weighted distance of each sample `(samples,)` to the former chunk; 0 where they share no action."""
        if former is None:
            return np.zeros(len(chunks))
        shift, first = origin - former.origin, former.start
        both = len(former.actions) - shift - first
        if both <= 0:
            return np.zeros(len(chunks))
        distance = np.linalg.norm(chunks[:, first : first + both] - former.actions[first + shift :], axis=-1)
        weights = self.decay ** np.maximum(np.arange(both) - delay, 0)
        return distance @ weights / weights.sum()


def _nearness(chunks: np.ndarray, others: np.ndarray, first: int, itself: int) -> np.ndarray:
    """Mean distance of each chunk to the nearer half of the others, leaving out the `itself` nearest."""
    apart = np.linalg.norm(chunks[:, None, first:] - others[None, :, first:], axis=-1).mean(-1)
    return np.sort(apart, axis=1)[:, itself : itself + max(1, len(others) // 2)].mean(1)
