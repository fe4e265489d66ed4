r"""A policy that plans late, as an actor: what a strategy is worth in any Gymnasium environment, without a robot.

    step        0 1 2 3 4 5 6 7 8 9 ...          d = 2, Ta = 4
    asked at    *       *       *                the first chunk of an episode is there at once: the arm waits for it
    used from   *           *       *            d steps later; meanwhile the former chunk, or the last action again

The world goes on while a plan is made. The rules are those of `Loop`, under its strategies, for many environments whose
plans are made as one batch; a test says that both write the same actions. Limits, watchdog and stale plans are the
loop's alone.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import numpy as np

from diffpolicy.control.loop import RECENT_DELAYS
from diffpolicy.control.plans import Ask, plan_chunks
from diffpolicy.control.strategies import Chunk, Strategy, Synchronous, check_delay, reach
from diffpolicy.errors import ControlError
from diffpolicy.observations import Obs, name_observations
from diffpolicy.policy import Policy

Listener = Callable[[int, int, int, int], object]


@dataclass(frozen=True)
class _Planned:
    """A chunk on its way: used from step `ready` of the episode on."""

    actions: np.ndarray
    origin: int
    asked: int
    ready: int


@dataclass(frozen=True)
class _Arm:
    """One environment: its episode, what it has seen, the chunks it holds and what it has done with them."""

    episode: int
    history: Mapping[str, np.ndarray]
    step: int = 0
    consumed: int = 0
    plans: int = 0
    taken: int = 0
    rested: int = 0
    chunks: tuple[Chunk, ...] = ()
    planned: _Planned | None = None
    delays: tuple[int, ...] = ()
    last: np.ndarray | None = None


@dataclass(frozen=True)
class DelayedState:
    """Rollout of N environments; a value that the caller holds."""

    arms: tuple[_Arm, ...]


@dataclass(frozen=True)
class Delayed:
    """An actor for `rollout` and `evaluate` whose chunks come late.

    Args:
        policy: what plans.
        strategy: how chunks are joined.
        delay: control steps that a plan takes; what the strategy is told too.
        rate_hz: control steps a second, for the wall time of each plan, made on its own, in the place of `delay`; the
            strategy is told the largest of the last 10, at first that of the episode's first plan. None for a fixed
            delay.
        on_chunk: hears `(episode, step, delay, rested)` when the first action of a chunk is taken: steps since it was
            asked for (0 for the first chunk of an episode), and how often the last action was repeated just before.
        now: the clock, in seconds.

    Raises:
        ControlError: if the delay is impossible, `n_obs_steps - 1 + n_action_steps + delay` exceeds the horizon, or the
            policy was not trained for what the strategy asks of it.
    """

    policy: Policy
    strategy: Strategy = field(default_factory=Synchronous)
    delay: int = 0
    rate_hz: float | None = None
    on_chunk: Listener = lambda episode, step, delay, rested: None
    now: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        if self.delay < 0 or (self.rate_hz is not None and not 0 < self.rate_hz < float("inf")):
            raise ControlError(
                f"got delay {self.delay} and rate_hz {self.rate_hz}; give whole steps of at least 0 and a rate above 0"
            )
        check_delay(self.policy, self.strategy, self.delay)

    def predict(
        self,
        obs: Obs,
        state: DelayedState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, DelayedState]:
        """Return the actions `(Da,)` or `(N, Da)` and the next state; arguments and noise as in `Policy.predict`."""
        named, batched = name_observations(self.policy.spec, obs)
        rows = [{name: array[i] for name, array in named.items()} for i in range(len(next(iter(named.values()))))]
        if state is None:
            arms = [self._begin(i, row) for i, row in enumerate(rows)]
            if self.rate_hz is not None:  # the first plan compiles and loads: it is not timed
                plan_chunks(self.policy, self.strategy, [self._ask(arms[0], deterministic)])
        else:
            starts = np.zeros(len(rows), dtype=bool) if episode_start is None else np.atleast_1d(episode_start)
            arms = [
                self._begin(arm.episode + len(rows), row) if start else _observe(arm, row)
                for arm, row, start in zip(state.arms, rows, starts, strict=True)
            ]
        arms = [self._collect(arm) for arm in arms]
        due = [i for i, arm in enumerate(arms) if self._is_due(arm)]
        for i, arm in zip(due, self._plan([arms[i] for i in due], deterministic), strict=True):
            arms[i] = self._collect(arm)
        acted = [self._act(arm) for arm in arms]
        actions = np.stack([arm.last for arm in acted if arm.last is not None])
        return (actions if batched else actions[0]), DelayedState(tuple(acted))

    def _begin(self, episode: int, row: Mapping[str, np.ndarray]) -> _Arm:
        steps = self.policy.spec.n_obs_steps
        return _Arm(episode, {name: np.repeat(array[None], steps, 0) for name, array in row.items()})

    def _collect(self, arm: _Arm) -> _Arm:
        """Take the chunk that has become ready."""
        planned = arm.planned
        if planned is None or arm.step < planned.ready:
            return arm
        chunk = Chunk(planned.actions, planned.origin, self.policy.spec.n_obs_steps - 1, float(planned.asked))
        took = arm.consumed - planned.origin if arm.chunks else arm.delays[-1]
        return replace(
            arm,
            planned=None,
            taken=arm.taken + 1,
            chunks=(*arm.chunks, chunk)[-self.strategy.keeps :],
            delays=(*arm.delays, took)[-RECENT_DELAYS:],
        )

    def _is_due(self, arm: _Arm) -> bool:
        if arm.planned is not None or not arm.chunks:
            return arm.planned is None
        return self.strategy.due(self.policy.spec, arm.consumed - arm.chunks[-1].origin, self._expected(arm))

    def _expected(self, arm: _Arm) -> int:
        """Actions that a plan is expected to consume."""
        return min(max(arm.delays, default=self.delay), reach(self.policy.spec) - 1)

    def _plan(self, arms: Sequence[_Arm], deterministic: bool) -> list[_Arm]:
        """Begin a plan for each of the arms: as one batch, or one after the other to time them."""
        asks = [self._ask(arm, deterministic) for arm in arms]
        if self.rate_hz is None:
            chunks = plan_chunks(self.policy, self.strategy, asks) if asks else []
            return [self._asked(arm, chunk, self.delay) for arm, chunk in zip(arms, chunks, strict=True)]
        planned = []
        for arm, ask in zip(arms, asks, strict=True):
            begin = self.now()
            (chunk,) = plan_chunks(self.policy, self.strategy, [ask])
            planned.append(self._asked(arm, chunk, max(1, ceil((self.now() - begin) * self.rate_hz))))
        return planned

    def _ask(self, arm: _Arm, deterministic: bool) -> Ask:
        seed = [self.policy.seed, arm.episode, arm.plans] if deterministic else None
        former = arm.chunks[-1] if arm.chunks else None
        stream, rehearse = np.random.default_rng(seed), self.rate_hz is not None
        return Ask(arm.history, stream, former, arm.consumed, self._expected(arm), rehearse)

    def _asked(self, arm: _Arm, chunk: np.ndarray, delay: int) -> _Arm:
        """The first chunk of an episode is there at once, and its delay is the first that is known."""
        ready = arm.step + (delay if arm.chunks else 0)
        delays = arm.delays if arm.chunks else (delay,)
        return replace(arm, plans=arm.plans + 1, delays=delays, planned=_Planned(chunk, arm.consumed, arm.step, ready))

    def _act(self, arm: _Arm) -> _Arm:
        """Write the next action of the chunks; the last one again while there is none."""
        newest, strategy = arm.chunks[-1], self.strategy
        target = strategy.action(arm.chunks, arm.consumed)
        late = arm.consumed - newest.origin >= strategy.budget(self.policy.spec, self._expected(arm))
        if target is None or (late and strategy.waits):
            return replace(arm, step=arm.step + 1, rested=arm.rested + 1)
        if arm.taken:
            self.on_chunk(arm.episode, arm.step, arm.step - int(newest.time), arm.rested)
        return replace(arm, step=arm.step + 1, consumed=arm.consumed + 1, taken=0, rested=0, last=target)


def _observe(arm: _Arm, row: Mapping[str, Any]) -> _Arm:
    history = {name: np.concatenate([arm.history[name][1:], array[None]]) for name, array in row.items()}
    return replace(arm, history=history)
