"""Plans for a strategy: what was asked for becomes chunks, many at once; a loop asks for one, a simulation for many.

    Ask(history, stream, former, origin, delay) --strategy.prefix--> Policy.plan --strategy.choose--> chunk

A plan without a former chunk may be a rehearsal: it is made with a prefix of no weight, which changes nothing but takes
as long as what follows.

The noise of a plan is drawn from the ask's own stream: the same ask gets the same chunk, alone or beside others, up to
the rounding of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffpolicy.control.strategies import Chunk, Planner, Strategy
from diffpolicy.diffusion.prefix import Prefix


@dataclass(frozen=True)
class Ask:
    """One plan that is wanted: `history {name: (To, ...)}`, the stream of its noise, and what it has to agree with.

    `former` is the chunk being executed, None at the start; `origin` the number of the new chunk's first action,
    `delay` how many actions are expected to be executed meanwhile; `rehearse` whether a plan without a former chunk is
    to take as long as one with it, because it is timed.
    """

    history: Mapping[str, np.ndarray]
    stream: np.random.Generator
    former: Chunk | None
    origin: int
    delay: int
    rehearse: bool = False


def plan_chunks(policy: Planner, strategy: Strategy, asks: Sequence[Ask]) -> list[np.ndarray]:
    """Return one chunk `(Tp, Da)` in float64 for each ask, in physical units; those with a prefix make one batch."""
    prefixes = [_prefix(policy, strategy, ask) for ask in asks]
    chunks: list[np.ndarray] = [np.empty(0)] * len(asks)
    for known in (False, True):
        rows = [i for i, prefix in enumerate(prefixes) if (prefix is not None) == known]
        if rows:
            together = _stack([prefix for i in rows if (prefix := prefixes[i]) is not None])
            for i, chunk in zip(rows, _batch(policy, strategy, [asks[i] for i in rows], together), strict=True):
                chunks[i] = chunk
    return chunks


def _prefix(policy: Planner, strategy: Strategy, ask: Ask) -> Prefix | None:
    """What the chunk must agree with: of a policy that learnt to continue chunks no more than it learnt."""
    spec, former = policy.spec, ask.former
    delay = min(ask.delay, policy.max_delay) if strategy.trained else ask.delay
    if former is not None:
        return strategy.prefix(spec, former, ask.origin, delay)
    if not ask.rehearse:
        return None
    blank = Chunk(np.zeros((spec.horizon, spec.action_dim)), ask.origin, spec.n_obs_steps - 1, 0.0)
    prefix = strategy.prefix(spec, blank, ask.origin, delay)
    return None if prefix is None else replace(prefix, weights=torch.zeros_like(prefix.weights))


def _stack(prefixes: list[Prefix]) -> Prefix | None:
    if not prefixes:
        return None
    chunk = torch.cat([prefix.chunk for prefix in prefixes])
    return replace(prefixes[0], chunk=chunk, weights=torch.stack([prefix.weights for prefix in prefixes]))


def _batch(policy: Planner, strategy: Strategy, asks: Sequence[Ask], prefix: Prefix | None) -> list[np.ndarray]:
    n = strategy.samples
    if prefix is not None:
        chunk, weights = prefix.chunk.repeat_interleave(n, 0), prefix.weights.repeat_interleave(n, 0)
        prefix = replace(prefix, chunk=chunk.to(policy.device), weights=weights)
    samples = _sample(policy, n, asks, prefix)
    rivals = None if strategy.weak is None else _sample(strategy.weak, n, asks, None)
    picks = [
        strategy.choose(samples[i], ask.former, ask.origin, ask.delay, None if rivals is None else rivals[i])
        for i, ask in enumerate(asks)
    ]
    return [samples[i, pick] for i, pick in enumerate(picks)]


def _sample(policy: Planner, n: int, asks: Sequence[Ask], prefix: Prefix | None) -> np.ndarray:
    """`n` chunks an ask, `(asks, n, Tp, Da)`; draws the next noise of each stream."""
    spec, device = policy.spec, policy.device
    shape = (policy.draws(prefix.repeats if prefix else 1), n, spec.horizon, spec.action_dim)
    noise = np.concatenate([ask.stream.standard_normal(shape, dtype=np.float32) for ask in asks], axis=1)
    history = {
        name: torch.from_numpy(np.stack([ask.history[name] for ask in asks]).repeat(n, 0)).to(device)
        for name in asks[0].history
    }
    chunks = policy.plan(history, torch.from_numpy(noise).to(device), prefix).cpu().numpy().astype(np.float64)
    return chunks.reshape(len(asks), n, *chunks.shape[1:])
