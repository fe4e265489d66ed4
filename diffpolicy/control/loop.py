r"""One run of one robot, a step a period: what is observed, planned and written. It knows no clock and never waits.

    observation -> history -> [ask for a chunk] -> [take the chunk that is ready] -> action of its number -> limits

A chunk is bound to the number of the action that its observation belongs to, so its delay is what was consumed since.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpolicy.control.clock import Outcome, Worker
from diffpolicy.control.limits import Limiter, Limits
from diffpolicy.control.plans import Ask, plan_chunks
from diffpolicy.control.report import Counts, Range, Report
from diffpolicy.control.strategies import Chunk, reach
from diffpolicy.errors import PolicyError
from diffpolicy.observations import Obs, name_observations

if TYPE_CHECKING:
    from diffpolicy.control.runner import Runner

RECENT_DELAYS = 10


@dataclass(frozen=True)
class Stamped:
    """An observation with the moment it was made, in seconds of the loop's clock (`time.monotonic`)."""

    obs: Obs
    time: float


@dataclass(frozen=True)
class Safety:
    """What must not happen, and what happens instead.

    Args:
        limits: on every action written.
        rest: the action that means "do not move" (zeros for velocities); None where repeating the last one does.
        finish: if the next chunk is late, go on with the rest of the old one; False rests at once.
        stop_after: periods in a row without a chunk in time, after which the run ends at rest; None never.
        max_age: seconds since an observation after which no action planned from it is executed; None for the time of
            two horizons. A plan that takes longer than this never acts.
        start_within: seconds the first chunk may take.
        settle_within: seconds that coming to rest may take at the end, or twice the longest stop if that is more; a
            robot that still moves then is stopped by `stop`, and the run has failed.
    """

    limits: Limits = field(default_factory=Limits)
    rest: np.ndarray | None = None
    finish: bool = True
    stop_after: int | None = 50
    max_age: float | None = None
    start_within: float = 60.0
    settle_within: float = 2.0


@dataclass(frozen=True)
class _Asked:
    """A plan on its way: what its chunk will be, and when it was asked for."""

    origin: int
    time: float
    beat: int


class Loop:
    """One run of one robot, a step a period: the logic of `Runner.run` without its clock. Made by `Runner.start`.

    `counts` is what has happened so far; `ended` says that nothing more will be written, because the robot is at rest
    or cannot be brought there (the report says what failed); `unsettled`, that it did not come to rest in time.
    """

    def __init__(self, runner: "Runner", worker: Worker, start: np.ndarray | None, now: float) -> None:
        spec, safety = runner.policy.spec, runner.safety
        self.runner, self.spec, self.safety, self.worker = runner, spec, safety, worker
        self.counts = Counts()
        self.ending = self.ended = self.unsettled = False
        self._reason, self._ok, self._error = "running", True, None
        start = safety.rest if start is None else start
        self._limiter = Limiter(safety.limits, spec.action_dim, runner.period, start)
        if safety.rest is not None:
            self._limiter.check(safety.rest, "safety.rest")
        self._settle_within = max(safety.settle_within, 2 * self._limiter.stop_steps * runner.period)
        self._max_age = 2 * spec.horizon * runner.period if safety.max_age is None else safety.max_age
        self._range = Range(runner.policy.normalizer)
        self._now = self._began = now
        self._beat = 0
        self._settle_until = float("inf")
        self._history: dict[str, np.ndarray] = {}
        self._seen, self._fresh = -float("inf"), False
        self._chunks: deque[Chunk] = deque(maxlen=runner.strategy.keeps)
        self._asked: _Asked | None = None
        self._warm_up = runner.warm_up
        self._delays = deque([runner.delay], maxlen=RECENT_DELAYS)
        self._consumed_at: deque[float] = deque(maxlen=4 * spec.horizon)
        self._without = 0

    # --- what a caller uses ---

    def step(self, now: float, obs: Obs | Stamped | None) -> np.ndarray | None:
        """Take the newest observation (None: nothing new) and return the action to write; None for nothing to write."""
        if self.ended:
            return None
        self._now = max(self._now, now)
        self._beat += 1
        if not self.ending:
            self._observe(obs)
            self._collect()
            self._ask()
            self._collect()  # without a delay there is none
        action = self._settle() if self.ending else self._act()
        self.counts.written += int(action is not None)
        return action

    def finish(self, reason: str) -> None:
        """Come to rest and end, as asked."""
        self._end(reason, None, ok=True)

    def fail(self, reason: str, error: BaseException | None = None, ended: bool = False) -> None:
        """Come to rest and end because of a failure; `ended` if nothing more can be written."""
        said = reason if error is None else f"{reason}: {type(error).__name__}: {error}"
        self._end(said, error, ok=False)
        self.ended = self.ended or ended

    @property
    def now(self) -> float:
        """The time of the last step; it only goes forward."""
        return self._now

    @property
    def delay(self) -> int:
        """Actions that a plan is expected to consume: the largest of the last ones."""
        return min(max(self._delays), reach(self.spec) - 1)

    @property
    def report(self) -> Report:
        """What has happened so far."""
        return Report(self._reason, self._ok, self._error, self.counts, dict(self._limiter.clipped))

    def _end(self, reason: str, error: BaseException | None, ok: bool) -> None:
        if not self.ending:
            self._settle_until = self._now + self._settle_within
        elif ok or not self._ok:
            return  # the first failure is the one told
        self._reason, self._ok, self._error, self.ending = reason, ok, error, True

    # --- observations ---

    def _observe(self, obs: Obs | Stamped | None) -> None:
        """Append the observation to the history; a period without one repeats the last."""
        self._fresh = False
        self.counts.dropped += int(obs is None)
        stamped = obs if isinstance(obs, Stamped) else Stamped(obs, self._now) if obs is not None else None
        try:
            if stamped is None or not self._is_new(stamped):
                return self._append({name: rows[-1] for name, rows in self._history.items()})
            named, _ = name_observations(self.spec, stamped.obs)
            if (many := len(next(iter(named.values())))) != 1:
                raise PolicyError(f"it has {many} rows; give the newest alone, the loop keeps the history")
        except Exception as error:
            return self.fail("the observation is not the policy's", error)
        rows = {name: array[0] for name, array in named.items()}
        self._seen, self._fresh = min(stamped.time, self._now), True
        self._range.count(rows, self.counts)
        return self._append(rows)

    def _is_new(self, stamped: Stamped) -> bool:
        """Whether it is newer than the last and all of it is finite; counts what is not."""
        new = min(stamped.time, self._now) > self._seen
        finite = _is_finite(stamped.obs, self.spec.obs_shapes)
        self.counts.late += int(not new)
        self.counts.bad += int(new and not finite)
        return new and finite

    def _append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Shift the history by one; the first observation fills it."""
        size = self.spec.n_obs_steps
        for name, row in rows.items():
            past = self._history.get(name)
            shifted = np.repeat(row[None], size, 0) if past is None else np.concatenate([past[1:], row[None]])
            self._history[name] = shifted

    def _origin(self) -> int:
        """Number of the action that belonged to the last observation: those written since then come off."""
        since = 0
        for moment in reversed(self._consumed_at):
            if moment < self._seen:
                break
            since += 1
        return self.counts.consumed - since

    # --- plans ---

    def _ask(self) -> None:
        """Begin a plan if the strategy wants one and there is a new observation to plan from."""
        if self._asked is not None or not self._fresh or self.ending:
            return
        origin, newest = self._origin(), self._chunks[-1] if self._chunks else None
        if newest is not None and not self.runner.strategy.due(self.spec, origin - newest.origin, self.delay):
            return
        self._asked = _Asked(origin, self._seen, self._beat)
        job = self._job(newest, origin)
        self.counts.plans += 1
        self.worker.submit(job)

    def _job(self, former: Chunk | None, origin: int) -> Callable[[], np.ndarray]:
        """Return the plan as a function without arguments, for another thread: it reads nothing that changes."""
        runner = self.runner
        stream = np.random.default_rng([runner.seed, 0, self.counts.plans])  # that of episode 0 in `Policy.predict`
        ask = Ask(dict(self._history), stream, former, origin, self.delay, rehearse=runner.warm_up > 0)
        return lambda: plan_chunks(runner.policy, runner.strategy, [ask])[0]

    def _collect(self) -> None:
        """Take the chunk that has become ready."""
        outcome: Outcome | None = self.worker.poll()
        if outcome is None or self._asked is None:
            return
        asked, self._asked = self._asked, None
        came, wanted = np.shape(outcome.value), (self.spec.horizon, self.spec.action_dim)
        if outcome.error is not None:
            self.fail("the policy failed", outcome.error)
        elif came != wanted:
            self.fail(f"the policy planned a chunk of shape {came}; wanted {wanted}")
        elif self._warm_up > 0:
            self._warm_up -= 1
        elif not np.isfinite(outcome.value).all():
            self.counts.bad_chunks += 1
        elif self._now - asked.time > self._max_age:
            self.counts.stale += 1
        else:
            self._take(outcome.value, asked)

    def _take(self, actions: np.ndarray, asked: _Asked) -> None:
        if self._chunks:
            delay = self.counts.consumed - asked.origin
            self._delays.append(delay)
            self.counts.delays.append(delay)
        elif self.runner.warm_up > 0:  # measured at rest: the actions that it would have taken
            self._delays.append(self._beat - asked.beat)
        self._chunks.append(Chunk(actions, asked.origin, self.spec.n_obs_steps - 1, asked.time))

    # --- actions ---

    def _act(self) -> np.ndarray | None:
        """Return the next action of the chunks, or rest where there is none."""
        target = self._target()
        if target is None:
            self.counts.rested += 1
            return self._rest()
        self._consumed_at.append(self._now)
        self.counts.consumed += 1
        return self._limiter.apply(target)

    def _target(self) -> np.ndarray | None:
        """Return the action of the chunks; None while there is none, or none is allowed."""
        safety, strategy, number = self.safety, self.runner.strategy, self.counts.consumed
        if not self._chunks:
            if self._now - self._began > safety.start_within:
                stale = self.counts.stale
                late = f"; {stale} came when they were over {self._max_age:g} s old" if stale else ""
                self.fail(f"there was no first chunk within {safety.start_within:g} s{late}")
            return None
        usable = [chunk for chunk in self._chunks if self._now - chunk.time <= self._max_age]
        target = strategy.action(usable, number)
        late = number - self._chunks[-1].origin >= strategy.budget(self.spec, self.delay)
        if late and (strategy.waits or not safety.finish):
            target = None
        self._without = self._without + 1 if late or target is None else 0
        self.counts.over_budget += int(self._without > 0)
        if safety.stop_after is not None and self._without > safety.stop_after:
            self.fail(f"no chunk came in time for {safety.stop_after} periods in a row")
            return None
        return target

    def _rest(self) -> np.ndarray | None:
        """Return the next action on the way to rest; None if the robot was never told anything."""
        if self.safety.rest is not None:
            return self._limiter.apply(self.safety.rest)
        return None if self._limiter.last is None else self._limiter.brake()

    def _settle(self) -> np.ndarray | None:
        """Come to rest, then end."""
        action = self._rest()
        rest = self.safety.rest
        resting = action is None or rest is None or np.allclose(action, rest, rtol=0, atol=1e-9)
        self.ended = bool(resting and self._limiter.at_rest)
        if not self.ended and self._now >= self._settle_until:
            self._reason += f"; not at rest {self._settle_within:g} s later"
            self._ok, self.ended, self.unsettled = False, True, True
            return None
        return action


def _is_finite(obs: Obs, names: Iterable[str]) -> bool:
    """Whether what is there of these names is finite; what the policy does not use does not matter."""
    arrays: Any = [obs[name] for name in names if name in obs] if isinstance(obs, Mapping) else (obs,)
    return all(bool(np.isfinite(array).all()) for array in arrays)
