"""Inspection: what is in a dataset and what looks wrong, before anybody trains on it.

    Episodes --measure--> Range of each array --+--> Evidence --checks--> Findings, the worst first
    environment --ask--> Surroundings ----------+                             |
                                     page(inspection, episodes) -> one HTML file

A check is one function of the evidence in one of the tuples `CHECKS`. Everything is read block by block.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.inspection import environment, motion, order, values
from diffpolicy.inspection.findings import Check, Evidence, Finding, Severity, Surroundings
from diffpolicy.inspection.ranges import Range, measure, readable

CHECKS: tuple[Check, ...] = (*environment.CHECKS, *values.CHECKS, *motion.CHECKS, *order.CHECKS)
PRINTED = 8

__all__ = ["CHECKS", "Finding", "Inspection", "Range", "Severity", "Surroundings", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """What was found: sizes, ranges of every array, and findings, the worst first."""

    episodes: int
    steps: int
    lengths: np.ndarray
    returns: np.ndarray
    obs: tuple[Range, ...]
    action: Range
    reward: Range
    environment: Surroundings | None
    meta: Mapping[str, Any]
    findings: tuple[Finding, ...]

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of one severity."""
        return tuple(f for f in self.findings if f.severity == severity)

    @property
    def verdict(self) -> str:
        """One line: how much looks wrong."""
        wrong, suspect, notes = (len(self.of(severity)) for severity in Severity)
        looks = [f"{n} {word}" for n, word in ((wrong, "wrong"), (suspect, "to look at")) if n]
        known = [f"{notes} good to know"] if notes else []
        return ", ".join([*(looks or ["nothing looks wrong"]), *known])

    def __str__(self) -> str:
        """Return a dozen lines."""
        rows = [
            ("episodes", f"{self.episodes:,} of {span(self.lengths)} steps, {self.steps:,} in all"),
            ("return", f"{span(self.returns)}, mean {mean(self.returns)}"),
            ("observed", ", ".join(f"{r.name.removeprefix('obs ')} {r.shape}" for r in self.obs)),
            ("action", f"{self.action.dims} dimensions"),
            ("findings", self.verdict),
        ]
        lines = [f"  {name:<12} {value}" for name, value in rows]
        lines += [f"    {finding}" for finding in self.findings[:PRINTED]]
        hidden = len(self.findings) - PRINTED
        return "\n".join(lines + ([f"    and {hidden} more on the page"] if hidden > 0 else []))


def span(numbers: np.ndarray) -> str:
    """Return `low to high`, or the one number that there is; what is not finite does not count."""
    kept = numbers[np.isfinite(numbers)]
    if not len(kept):
        return "not finite"
    low, high = float(kept.min()), float(kept.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def mean(numbers: np.ndarray) -> str:
    """Return the mean of the finite numbers."""
    kept = numbers[np.isfinite(numbers)]
    return f"{kept.mean():.4g}" if len(kept) else "not finite"


def inspect(episodes: Episodes, env_id: str | None = None, env_kwargs: Mapping[str, Any] | None = None) -> Inspection:
    """Look at a dataset.

    Args:
        episodes: physical units, in memory or memory-mapped; nothing is copied whole.
        env_id: Gymnasium id to compare with; the one in the metadata if None.
        env_kwargs: arguments of `gymnasium.make`, with `env_id`.
    """
    asked = environment.of_metadata(episodes.meta) if env_id is None else environment.ask(env_id, env_kwargs or {})
    evidence = Evidence(
        episodes=episodes,
        obs=tuple(measure(f"obs {readable(name)!r}", array) for name, array in episodes.obs.items()),
        action=measure("action", episodes.action),
        reward=measure("reward", episodes.reward),
        environment=asked,
    )
    return Inspection(
        episodes=len(episodes),
        steps=episodes.steps,
        lengths=np.asarray(episodes.length),
        returns=episodes.returns,
        obs=evidence.obs,
        action=evidence.action,
        reward=evidence.reward,
        environment=asked,
        meta=episodes.meta,
        findings=tuple(sorted(_run(evidence), key=lambda finding: finding.severity)),
    )


def _run(evidence: Evidence) -> Iterator[Finding]:
    for check in CHECKS:
        yield from check(evidence)
