"""What critics see of rewards, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffpolicy.data import rewards
from diffpolicy.data.episodes import Episodes
from diffpolicy.errors import DatasetError

REWARDS: dict[str, Callable[[Episodes], tuple[float, float]]] = {
    "plain": rewards.plain,
    "return_range": rewards.return_range,
    "standard": rewards.standard,
}


@dataclass(frozen=True)
class RewardConfig:
    """What critics see of a reward `r`: `scale k(r) + shift`, with `k` of the kind."""

    kind: Literal["plain", "return_range", "standard"] = "plain"
    """k: r itself; 1000 r / (best return - worst return); or (r - mean) / standard deviation."""
    scale: float = 1.0
    """Factor."""
    shift: float = 0.0
    """Added afterwards."""


def reward_transform(config: RewardConfig, episodes: Episodes) -> tuple[float, float]:
    """Return `(scale, shift)` of what critics see of the rewards of these episodes.

    Raises:
        DatasetError: if the kind needs rewards that differ and they do not.
    """
    scale, shift = REWARDS[config.kind](episodes)
    return config.scale * scale, config.scale * shift + config.shift


def make_rewards(config: RewardConfig, episodes: Episodes) -> Episodes:
    """Return the episodes with their rewards as critics see them.

    Raises:
        DatasetError: if every reward that critics see is 0, or the kind needs rewards that differ and they do not.
    """
    if not np.any(episodes.reward):
        raise DatasetError(
            "every reward is 0, so there is nothing to value; name the task whose rewards are wanted (--relabel, of "
            "OGBench's datasets), or imitate"
        )
    assert episodes.has_final is not None
    unseen = (episodes.start + np.asarray(episodes.length) - 1)[~(episodes.has_final | episodes.terminated)]
    if np.count_nonzero(episodes.reward) == np.count_nonzero(episodes.reward[unseen]):
        raise DatasetError(
            "every reward but 0 is in a last step that nothing recorded follows, so there is nothing to value; say "
            f"which info value ends an episode (--ends, or Episodes.ended_by), of {sorted(episodes.info)}, or imitate"
        )
    return rewards.transformed(episodes, *reward_transform(config, episodes))
