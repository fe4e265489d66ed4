"""Results of offline RL runs: one JSON file a run, and what many of them say together, with 95 % intervals.

    RESULTS/idql-hopper-mixed-0.json      agent, dataset and training seed; the score of each episode

A run's score is the mean of its episodes. A group of datasets (all `mixed` ones, say) has the mean of its datasets'
means with an interval, and the interquartile mean of its runs (Agarwal et al. 2021) without. Intervals are percentiles
of a bootstrap that draws, for each dataset, training seeds with replacement, one fewer than there are, since with all
of so few it knows too little of how they differ (Rao and Wu 1988), then episodes of each, which makes them a little
wide; that of one run's successes is Wilson's. With one training seed an interval knows of episodes alone. Two agents
are compared with all that each has, drawn apart: runs of one seed have nothing in common but their first states, and
the scores of their episodes do not go together. (Those of one network that acts in two ways do, and have no interval.)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.report import Estimate, wilson

RESAMPLES = 5000
NARROWLY = "+narrow"
"""An agent whose name ends so is the agent before it, the same networks, and samples with less noise."""
EVALUATION_SEED = 100_000
SEEDS_APART = 1000
"""Episode k of training seed s begins from `EVALUATION_SEED + SEEDS_APART s + k`, for every agent."""

Statistic = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Of one array `(B, seeds)` of runs' scores a dataset: `(B,)`."""
Table = Mapping[str, Mapping[str, np.ndarray]]
"""`table[agent][dataset]` holds scores `(training seeds, episodes)`."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    agent: str
    dataset: str
    seed: int
    score: tuple[float, ...]
    """Score of each episode: D4RL's, 0 random and 100 its expert, or 100 for a success."""
    returns: tuple[float, ...]
    steps: int
    """Gradient steps."""
    first_episode_seed: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def name(self) -> str:
        """Return what its file is called."""
        return f"{self.agent}-{self.dataset}-{self.seed}"

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{self.name}.json"
        temporary.write_text(json.dumps(asdict(self), indent=1))
        temporary.replace(folder / f"{self.name}.json")


def read(folder: Path) -> list[Run]:
    """Read every run of a folder, in the order of their names."""
    return [Run(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def tabulate(runs: Sequence[Run]) -> dict[str, dict[str, np.ndarray]]:
    """Return scores `(training seeds, episodes)` by agent and dataset, episodes cut to the fewest.

    Seeds count from 0 to the first that has not been run: nobody has picked those that came out well.
    """
    table: dict[str, dict[str, np.ndarray]] = {}
    for agent in sorted({run.agent for run in runs}):
        table[agent] = {}
        for dataset in dict.fromkeys(run.dataset for run in runs if run.agent == agent):
            of_seed = {run.seed: run for run in runs if (run.agent, run.dataset) == (agent, dataset)}
            own = [of_seed[seed] for seed in takewhile(of_seed.__contains__, count())]
            if own:
                episodes = min(len(run.score) for run in own)
                table[agent][dataset] = np.array([run.score[:episodes] for run in own])
    return {agent: own for agent, own in table.items() if own}


def mean_of_datasets(runs: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over datasets of the mean over seeds, of one `(B, seeds)` a dataset: `(B,)`."""
    return np.mean([run.mean(1) for run in runs], axis=0)


def interquartile_mean(runs: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of the middle half of all runs, a quarter (rounded down) cut at each end, `(B,)`."""
    ordered = np.sort(np.concatenate(runs, axis=1), axis=1)
    cut = ordered.shape[1] // 4
    return ordered[:, cut : ordered.shape[1] - cut].mean(1)


def estimate(scores: Sequence[np.ndarray]) -> Estimate:
    """Return datasets' mean of scores `(seeds, episodes)` with its interval, Wilson's of one run's successes."""
    if len(scores) == 1 and len(scores[0]) == 1 and set(scores[0].flat) <= {0.0, 100.0}:
        rate = wilson(int((scores[0] > 0).sum()), scores[0].size)
        return Estimate(100 * rate.value, 100 * rate.low, 100 * rate.high)
    return _between(value_of(scores), _drawn(scores, 0))


def difference(table: Table, agent: str, other: str, datasets: Sequence[str]) -> Estimate | None:
    """Return by how much an agent's mean over datasets is ahead of another's.

    None where either lacks a dataset, or where both are the same networks.
    """
    if agent.removesuffix(NARROWLY) == other.removesuffix(NARROWLY):
        return None
    if not all(dataset in table.get(a, {}) for a in (agent, other) for dataset in datasets):
        return None
    ours, theirs = ([table[a][dataset] for dataset in datasets] for a in (agent, other))
    return _between(value_of(ours) - value_of(theirs), _drawn(ours, 0) - _drawn(theirs, 1))


def value_of(scores: Sequence[np.ndarray], statistic: Statistic = mean_of_datasets) -> float:
    """Return a statistic of datasets' scores `(seeds, episodes)`."""
    return float(statistic([s.mean(1)[None] for s in scores])[0])


def _between(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _drawn(scores: Sequence[np.ndarray], stream: int) -> np.ndarray:
    """Mean over datasets of resampled runs, `(RESAMPLES,)`."""
    rng = np.random.default_rng(stream)
    return mean_of_datasets([_resampled(s, rng) for s in scores])


def _resampled(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scores of resampled runs: seeds with replacement, one fewer than there are, then episodes of each."""
    seeds, episodes = scores.shape
    drawn = max(seeds - 1, 1)
    seed = rng.integers(seeds, size=(RESAMPLES, drawn, 1))
    episode = rng.integers(episodes, size=(RESAMPLES, drawn, episodes))
    return scores[seed, episode].mean(-1)
