"""Findings: what a check says, and the evidence that it looks at. A check is a function of the evidence alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.inspection.ranges import Range, episode_of_obs, episode_of_step


class Severity(IntEnum):
    """How much a finding matters, the worst first."""

    WRONG = 0  # training or evaluation on it cannot be right
    SUSPECT = 1  # often the reason why a policy fails: look before you train
    NOTE = 2  # good to know, and right for many datasets


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong: where, what was found, what to do about it."""

    severity: Severity
    where: str
    what: str
    advice: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.severity.name.lower():<8} {self.where}: {self.what}"


@dataclass(frozen=True)
class Surroundings:
    """What an environment says about its data; `problem` says in one line why it could not be asked.

    Args:
        env_id: Gymnasium id.
        obs_shapes: shape of one observation of each name.
        low: of the action space, `(Da,)`, possibly infinite.
        high: likewise.
        max_steps: its time limit, None without one.
        problem: why nothing else is known, None if all is well.
    """

    env_id: str
    obs_shapes: Mapping[str, tuple[int, ...]]
    low: np.ndarray
    high: np.ndarray
    max_steps: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Evidence:
    """Everything that checks look at: the episodes, what was measured of them, and the environment if there is one."""

    episodes: Episodes
    obs: tuple[Range, ...]
    action: Range
    reward: Range
    environment: Surroundings | None

    @property
    def space(self) -> Surroundings | None:
        """The environment, where its action space is known and of the dataset's size."""
        env = self.environment
        return env if env is not None and env.problem is None and len(env.low) == self.action.dims else None

    @property
    def rewarded(self) -> bool:
        """Whether any reward differs from zero."""
        return bool(self.reward.low[0] != 0 or self.reward.high[0] != 0 or self.reward.bad[0])

    def place(self, of: Range, row: int) -> str:
        """Name the episode and step of a row."""
        seen = any(of is r for r in self.obs)
        episode, step = (episode_of_obs if seen else episode_of_step)(self.episodes, row)
        return f"episode {episode}, step {step}"


Check = Callable[[Evidence], Iterator[Finding]]


def percent(share: float) -> str:
    """Return a share as a person says it: never 0 % of something that is there, never 100 % of less than all."""
    if 0 < share < 1e-4 or 0.995 <= share < 1:
        return "<0.01 %" if share < 0.5 else ">99 %"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:.4g}"


def listed(indices: Sequence[int] | np.ndarray, most: int = 5) -> str:
    """Return `3, 17, 20 and 4 more`."""
    shown = ", ".join(str(int(i)) for i in indices[:most])
    return shown + (f" and {len(indices) - most} more" if len(indices) > most else "")


def counted(n: int, noun: str) -> str:
    """Return `1 step` or `3,000 steps`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
