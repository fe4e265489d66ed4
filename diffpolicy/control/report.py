"""What a control loop did: counts while it runs, and the page a person reads afterwards."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from diffpolicy.data.normalizer import Normalizer, rounding

RECENT = 1000


@dataclass
class Counts:
    """Counted by a loop, in memory of fixed size.

    Observations: `dropped` periods without a new one, `late` ones older than one seen before, `bad` ones not finite,
    `outside` how many of each name lay outside the range of training, `furthest` by how much of that range at most.
    Plans: `plans` asked for, `bad_chunks` not finite, `stale` too old to execute, `delays` of the last, in actions.
    Actions: `written`, `consumed` from chunks, `rested`, `over_budget` periods in which the next chunk was late.
    """

    dropped: int = 0
    late: int = 0
    bad: int = 0
    outside: Counter[str] = field(default_factory=Counter)
    furthest: dict[str, float] = field(default_factory=dict)
    plans: int = 0
    bad_chunks: int = 0
    stale: int = 0
    delays: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))
    written: int = 0
    consumed: int = 0
    rested: int = 0
    over_budget: int = 0


class Range:
    """The range of each observation in training, from the normalizer; angles wrap and have none."""

    def __init__(self, normalizer: Normalizer) -> None:
        self._bounds = {}
        for name in normalizer.names:
            array = normalizer[name]
            low, high = (bound.cpu().numpy().astype(np.float64) for bound in (array.minimum, array.maximum))
            slack = rounding(low, high)
            slack[array.angles] = np.inf
            width = np.where(high - low > slack, high - low, 1.0)
            self._bounds[name] = low - slack, high + slack, width

    def count(self, obs: Mapping[str, np.ndarray], counts: Counts) -> None:
        """Count the names of `obs` that lie outside."""
        for name, (low, high, width) in self._bounds.items():
            beyond = float((np.maximum(low - obs[name], obs[name] - high) / width).max())
            if beyond > 0:
                counts.outside[name] += 1
                counts.furthest[name] = max(counts.furthest.get(name, 0.0), beyond)


@dataclass(frozen=True)
class Report:
    """How a run ended and what was counted.

    `reason` is one sentence; `error` what was raised, if anything; `ok` whether it ended because it was told to.
    `clipped` counts actions asked for beyond each limit, `missed` periods skipped; `lateness` is in seconds, a beat.
    """

    reason: str
    ok: bool
    error: BaseException | None
    counts: Counts
    clipped: Mapping[str, int]
    missed: int = 0
    lateness: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __str__(self) -> str:
        """Return a page, one fact a line."""
        c, delays = self.counts, self.counts.delays
        lines = [
            f"ended        {self.reason}",
            f"actions      {c.written} written: {c.consumed} of chunks, {c.rested} at rest; {c.over_budget} too late",
            f"chunks       {c.plans} planned, {c.stale} too old, {c.bad_chunks} not finite",
            f"observations {c.dropped} periods without one, {c.late} late, {c.bad} not finite",
        ]
        if delays:
            lines.append(f"delay        {np.median(delays):.0f} actions, {max(delays)} at most")
        lines += [
            f"outside      {n} x {name!r}, by {c.furthest[name]:.0%} of its range" for name, n in c.outside.items()
        ]
        lines += [f"clipped      {n} x {name}" for name, n in self.clipped.items() if n]
        if len(self.lateness):
            p99 = 1e3 * np.quantile(self.lateness, 0.99)
            lines.append(f"clock        {self.missed} periods missed, late by {p99:.2f} ms at p99")
        return "\n".join(lines)
