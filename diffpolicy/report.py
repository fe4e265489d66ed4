"""What an evaluation reports: numbers with 95 % intervals; two reports to a paired comparison.

A success rate has a Wilson interval, a mean a percentile bootstrap one. Two policies that played the same seeds are
compared pair by pair: what is left is their difference.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.errors import DatasetError

RESAMPLES = 10_000
FEWEST = 6
"""Pairs from which a difference can be decided at 95 %: chance alone gives five the same sign in 1 of 16."""


@dataclass(frozen=True)
class Estimate:
    """A mean or rate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __format__(self, number: str) -> str:
        """Return `value [low, high]`, each number in the format given, `.3f` if none is."""
        value, low, high = (format(x, number or ".3f") for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def __str__(self) -> str:
        """Return `value [low, high]` to three decimals."""
        return f"{self}"


def wilson(successes: int, n: int) -> Estimate:
    """Rate with its Wilson score interval (Wilson 1927), which stays sensible at 0 and 1."""
    z, rate = 1.959964, successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return Estimate(rate, float(min(max(centre - half, 0.0), rate)), float(max(min(centre + half, 1.0), rate)))


def bootstrap(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of `(n,)` with its percentile bootstrap interval (10,000 resamples)."""
    values = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Execution:
    """How chunks were joined while plans came late.

    `delay` is in control steps, None where each plan's own time counted; `steps` is what the plans took, `p50` and
    `max`. `jumps (E,)` is the mean change of velocity at the borders of an episode's chunks as a share of the action's
    range, not a number where an episode has no border; `jump` is the mean of that.
    """

    strategy: str
    delay: int | None
    steps: Mapping[str, float]
    jumps: np.ndarray

    @property
    def jump(self) -> Estimate | None:
        """Mean over the episodes that have a border."""
        known = self.jumps[np.isfinite(self.jumps)]
        return bootstrap(known) if len(known) else None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        e = self.jump
        jump = None if e is None else {"mean": e.value, "ci95": [e.low, e.high]}
        return {"strategy": self.strategy, "delay": self.delay, "steps": dict(self.steps), "jump": jump}

    def __str__(self) -> str:
        """Return what the plans took."""
        told = "" if self.delay is None else f"a delay of {self.delay} steps; "
        return f"{self.strategy}, {told}plans took {self.steps['p50']:.0f} steps, {self.steps['max']:.0f} at most"


@dataclass(frozen=True)
class Report:
    """What `report.json` holds; intervals are 95 %."""

    env_id: str
    env_kwargs: Mapping[str, Any]
    episodes: int
    seeds: tuple[int, int]
    success_rule: str | None
    returns: Estimate
    success: Estimate | None
    score: Estimate | None
    score_kind: str | None
    length: float
    plan_ms: Mapping[str, float]
    sampler: str
    nfe: int
    device: str
    versions: Mapping[str, str]
    by_episode: Mapping[str, list[float | None]]
    execution: Execution | None = None
    acting: Mapping[str, Any] = field(default_factory=dict)
    """How the policy made its actions, `Policy.acting`; empty where it was no policy."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        execution = self.execution and self.execution.to_json()
        values = asdict(self) | {"seeds": list(self.seeds), "execution": execution}
        named = {"return": values.pop("returns"), **values}
        for key, inner in (("return", "mean"), ("success", "rate"), ("score", "mean")):
            e = named[key]
            known = key == "success" or self.episodes > 1  # a rate has an interval even after one episode
            interval = [e["low"], e["high"]] if e is not None and known else None
            named[key] = None if e is None else {inner: e["value"], "ci95": interval}
        if named["score"] is not None:
            named["score"]["kind"] = named["score_kind"]
        del named["score_kind"]
        return named

    def save(self, folder: Path) -> Path:
        """Write `report.json` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.json"
        path.write_text(json.dumps(self.to_json(), indent=1))
        return path

    def __str__(self) -> str:
        """Return the report as a person reads it."""
        rows = [
            ("environment", f"{self.env_id} {dict(self.env_kwargs) or ''}"),
            ("episodes", f"{self.episodes}, seeds {self.seeds[0]} to {self.seeds[1]}"),
            ("return", self._written(self.returns)),
            ("success", f"{self.success}  ({self.success_rule})" if self.success else "not defined for this task"),
            *([("score", f"{self._written(self.score)}  ({self.score_kind})")] if self.score else []),
            ("length", f"{self.length:.1f} steps"),
            *self._execution_rows(),
            ("sampler", f"{self.sampler}, {self.nfe} network evaluations on {self.device}"),
            *self._acting_rows(),
            ("plan", f"p50 {self.plan_ms['p50']:.1f} ms, p99 {self.plan_ms['p99']:.1f} ms at batch 1"),
        ]
        return "\n".join(f"  {name:<12} {value}" for name, value in rows)

    def _written(self, mean: Estimate) -> str:
        return str(mean) if self.episodes > 1 else f"{mean.value:.3f}, of one episode"

    def _acting_rows(self) -> list[tuple[str, str]]:
        """Return what of the acting settings is not the plainest."""
        sampler, selection, guidance = (self.acting.get(name) or {} for name in ("sampler", "selection", "guidance"))
        told = [
            f"{name} {sampler[name]:g}"
            for name, plain in (("temperature", 1), ("eta", 0))
            if sampler.get(name, plain) != plain
        ]
        if selection.get("samples", 1) > 1:
            soft = f" at temperature {selection['temperature']:g}" if selection["temperature"] else ""
            told.append(f"one of {selection['samples']} samples chosen{soft}")
        if guidance:
            told.append(
                f"guided, {', '.join(f'{name} {value:g}' for name, value in guidance.items() if name != 'kind')}"
            )
        return [("acting", "; ".join(told))] if told else []

    def _execution_rows(self) -> list[tuple[str, str]]:
        if self.execution is None:
            return []
        jump = self.execution.jump or "no chunk had a border"
        return [
            ("strategy", str(self.execution)),
            ("jump", f"{jump}  (change of velocity at borders, of the range)"),
        ]


@dataclass(frozen=True)
class Comparison:
    """Paired difference `b - a` of one number an episode, over the same seeds."""

    name: str
    a: float
    b: float
    difference: Estimate
    pairs: int

    def __str__(self) -> str:
        """Return one line."""
        outside = self.difference.low > 0 or self.difference.high < 0
        decided = "a difference" if outside else "no decided difference"
        if self.pairs < FEWEST:
            decided = f"{self.pairs} episode{'s' * (self.pairs > 1)}: too few to tell"
        gap = str(self.difference) if self.pairs > 1 else f"{self.difference.value:.3f}"
        return f"  {self.name:<8} {self.a:.3f} -> {self.b:.3f}   difference {gap}   {decided}"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Comparison]:
    """Compare two `report.json` pair by pair: bootstrap interval of the mean difference over the same seeds.

    Raises:
        DatasetError: if environment, arguments or seeds differ, or what success or the score is.
    """
    for key in ("env_id", "env_kwargs", "seeds"):
        if a[key] != b[key]:
            raise DatasetError(f"the reports differ in {key}: {a[key]} and {b[key]}; evaluate both on the same seeds")
    for (name, one), other in zip(meanings(a).items(), meanings(b).values(), strict=True):
        if one and other and one != other:
            raise DatasetError(f"the reports differ in what {name} is: {one} and {other}; evaluate both as one task")
    pairs = {
        name: np.array([x, b["by_episode"].get(name)], dtype=np.float64)
        for name, x in a["by_episode"].items()
        if name in b["by_episode"]
    }
    known = {name: pair[:, np.isfinite(pair).all(0)] for name, pair in pairs.items()}
    return [
        Comparison(name, float(x.mean()), float(y.mean()), bootstrap(y - x), len(x))
        for name, (x, y) in known.items()
        if len(x)
    ]


def meanings(report: Mapping[str, Any]) -> dict[str, str | None]:
    """Return what success and the score of a `report.json` are; None where it has none."""
    return {"success": report.get("success_rule"), "the score": (report.get("score") or {}).get("kind")}
