r"""What late plans cost: success and boundary jump of strategies over delays, in any Gymnasium environment.

    written     a(b-2) a(b-1) | a(b) ...           b: the first action of a new chunk
    change(b) = | (a(b) - a(b-1)) - (a(b-1) - a(b-2)) |         of velocity, each dimension as a share of the action's
                                                                range in the data
    jump(b)   = the largest change from the end of the former chunk to b

Where chunks follow each other that is the change at b. An arm that repeats its last action until the chunk is there
stops and starts: the larger of the two counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from diffpolicy.control.delayed import Delayed
from diffpolicy.control.strategies import Strategy
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.scores import Reference
from diffpolicy.errors import SpecError
from diffpolicy.evaluate import play_unseen, summarise
from diffpolicy.policy import Policy
from diffpolicy.report import Execution, Report


@dataclass
class Borders:
    """Where chunks began, as `Delayed` tells it: `{episode: [(step, delay, rested), ...]}`."""

    found: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)

    def hear(self, episode: int, step: int, delay: int, rested: int) -> None:
        """Note a chunk's first action."""
        self.found.setdefault(episode, []).append((step, delay, rested))

    def jumps(self, episodes: Episodes, width: np.ndarray) -> np.ndarray:
        """Mean jump of each episode, `(E,)`; `width (Da,)` is the range of the action."""
        return np.array(
            [self._jump(k, np.asarray(episodes[k].action, np.float64) / width) for k in range(len(episodes))]
        )

    def _jump(self, episode: int, action: np.ndarray) -> float:
        change = np.linalg.norm(action[2:] - 2 * action[1:-1] + action[:-2], axis=-1)  # the first is that at action 2
        spans = [(max(0, step - rested - 2), step - 1) for step, _, rested in self.found[episode][1:] if step >= 2]
        return float(np.mean([change[first:last].max() for first, last in spans])) if spans else float("nan")

    def delays(self, episodes: Episodes) -> Mapping[str, float]:
        """Steps that plans took, those before an episode's first action left out."""
        steps = [delay for k in range(len(episodes)) for _, delay, _ in self.found[k][1:]] or [0]
        return {"p50": float(np.median(steps)), "max": float(max(steps))}


def action_range(policy: Policy) -> np.ndarray:
    """Range of each action dimension in the data, 1 where it never moved."""
    action = policy.normalizer["action"]
    width = (action.maximum - action.minimum).cpu().numpy().astype(np.float64)
    return np.where(width > 0, width, 1.0)


@dataclass(frozen=True)
class Trial:
    """One way of being late: a strategy by its name, and a delay in control steps or the rate at which time counts."""

    name: str
    strategy: Strategy
    delay: int = 0
    rate_hz: float | None = None

    def actor(self, policy: Policy, borders: Borders) -> Delayed:
        """Return the policy that is late in this way.

        Raises:
            ControlError: as `Delayed`.
        """
        return Delayed(policy, self.strategy, self.delay, self.rate_hz, borders.hear)


@dataclass(frozen=True)
class World:
    """What is played: an environment, its seeds, and what success and score are (as in `evaluate`)."""

    env_id: str
    env_kwargs: Mapping[str, Any]
    episodes: int
    seed: int
    success: str | None = None
    score: str | None = None
    reference: str | Reference | None = None
    asynchronous: bool = False


def evaluate_late(
    policy: Policy,
    trial: Trial,
    world: World,
    versions: Mapping[str, str],
    on_episode: Callable[[int], object] = lambda done: None,
) -> tuple[Report, Episodes]:
    """Play unseen seeds with plans that come late, and report.

    Raises:
        ControlError: if the policy's chunks are too short for the delay.
        PolicyError: if the policy's sizes differ from the environment's.
    """
    borders = Borders()
    actor = trial.actor(policy, borders)
    played = play_unseen(
        actor, world.env_id, world.env_kwargs, world.episodes, world.seed, world.asynchronous, on_episode, policy
    )
    execution = Execution(
        trial.name,
        None if trial.rate_hz else trial.delay,
        borders.delays(played),
        borders.jumps(played, action_range(policy)),
    )
    report = summarise(policy, played, versions, world.success, world.score, world.reference, execution)
    return report, played


def cell_of(report: Report, trial: Trial, world: World, weights: str) -> dict[str, Any]:
    """Return what a picture over delays needs of a report: plain values, with `quality` its score, else its success.

    `weights` says whose they are (`fingerprint`), so that another policy's cells are not taken for this one's.

    Raises:
        SpecError: if the environment knows neither a score nor a success.
    """
    quality = report.score or report.success
    if quality is None or report.execution is None:
        raise SpecError(f"{report.env_id} knows neither success nor score; evaluate a task that does")
    jump = report.execution.jump
    return {
        "strategy": trial.name,
        "delay": report.execution.steps["p50"] if trial.rate_hz else trial.delay,
        "real_time": trial.rate_hz is not None,
        "rate_hz": trial.rate_hz,
        "env": [world.env_id, dict(world.env_kwargs)],
        "weights": weights,
        "episodes": report.episodes,
        "seeds": list(report.seeds),
        "sampler": report.sampler,
        "kind": "score" if report.score else "success",
        "quality": asdict(quality),
        "jump": jump and asdict(jump),
        "steps": dict(report.execution.steps),
        "report": report.to_json(),
    }


def fingerprint(policy: Policy, trial: Trial) -> str:
    """Return whose weights a trial has: of the policy, and of the weak one beside it."""
    digest = blake2b(digest_size=8)
    for each in (policy, trial.strategy.weak):
        for name, tensor in each.state_dict().items() if isinstance(each, Policy) else ():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_of(cell: Mapping[str, Any], trial: Trial, world: World, sampler: str) -> bool:
    """Whether a cell of an earlier run is this trial's, be it of the same weights or not."""
    wanted = {
        "strategy": trial.name,
        "rate_hz": trial.rate_hz,
        "env": [world.env_id, dict(world.env_kwargs)],
        "seeds": [world.seed, world.seed + world.episodes - 1],
        "sampler": sampler,
    }
    if trial.rate_hz is None:
        wanted["delay"] = trial.delay
    return all(cell.get(key) == value for key, value in wanted.items())
