"""Reward transforms, `r -> scale r + shift`: critics learn best from returns of a size that networks start at.

Published settings (`kind`, then `scale`, `shift`), as the authors' code has them:

                                     IQL (Kostrikov et al. 2022)    Diffusion-QL (Wang et al. 2023)
    halfcheetah, hopper, walker2d    return_range                   plain
    AntMaze                          plain, 1, -1                   plain, 4, -2
    Adroit                           plain                          standard for pen, no other is trained
    Kitchen                          plain                          plain

Also what returns say: what followed each step, and which episodes training draws more often.
"""

from dataclasses import replace

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.errors import DatasetError, SpecError

MOST_PREFERENCE = 100.0


def plain(episodes: Episodes) -> tuple[float, float]:
    """As they are: `(scale, shift)`."""
    return 1.0, 0.0


def return_range(episodes: Episodes) -> tuple[float, float]:
    """Best and worst episode 1000 apart: `(scale, shift)`.

    Raises:
        DatasetError: if all episodes have the same return.
    """
    returns = np.add.reduceat(np.asarray(episodes.reward, dtype=np.float64), np.asarray(episodes.start))
    width = returns.max() - returns.min()
    if not width > 0:
        raise DatasetError(f"every episode has the return {returns[0]:g}; their range cannot scale rewards: use plain")
    return 1000 / float(width), 0.0


def standard(episodes: Episodes) -> tuple[float, float]:
    """Mean 0, standard deviation 1: `(scale, shift)`.

    Raises:
        DatasetError: if all rewards are the same.
    """
    reward = np.asarray(episodes.reward, dtype=np.float64)
    mean, std = float(reward.mean()), float(reward.std())
    if not std > 0:
        raise DatasetError(f"every reward is {mean:g}; they cannot be standardised: use plain")
    return 1 / std, -mean / std


def transformed(episodes: Episodes, scale: float, shift: float) -> Episodes:
    """Return the same episodes with rewards `scale r + shift`."""
    if (scale, shift) == (1.0, 0.0):
        return episodes
    reward = (np.asarray(episodes.reward, dtype=np.float64) * scale + shift).astype(np.float32)
    return replace(episodes, reward=reward)


def returns_to_go(episodes: Episodes, gamma: float) -> np.ndarray:
    """`G(step) = r(step) + gamma G(step + 1)` of every step, `(N,)`, 0 beyond the end of the recording.

    After a step that `info["mask"]` marks as the task's end nothing follows.
    """
    reward, start, length = np.asarray(episodes.reward, dtype=np.float64), episodes.start, np.asarray(episodes.length)
    mask = episodes.info.get("mask")
    onward = gamma * (np.ones(len(reward)) if mask is None else np.asarray(mask, dtype=np.float64))
    found, ahead = np.zeros(len(reward)), np.zeros(len(length))
    for step in range(int(length.max()) - 1, -1, -1):  # of all episodes at once
        here = np.flatnonzero(length > step)
        rows = start[here] + step
        ahead[here] = reward[rows] + onward[rows] * ahead[here]
        found[rows] = ahead[here]
    return found


def in_unit(returns: np.ndarray) -> np.ndarray:
    """Scale returns so that the lowest is 0 and the highest 1; all 0 where they are alike."""
    return (returns - returns.min()) / max(float(np.ptp(returns)), 1e-8)


def check_preference(preference: float) -> None:
    """Refuse what `preferred` cannot do.

    Raises:
        SpecError: if it is not a number from 0 to `MOST_PREFERENCE`.
    """
    if not 0 <= preference <= MOST_PREFERENCE:
        raise SpecError(f"got a preference of {preference}; wanted a number from 0 (all alike) to {MOST_PREFERENCE:g}")


def preferred(episodes: Episodes, preference: float) -> Episodes:
    """Have training draw windows in proportion to exp(preference R), R in [0, 1] the return of their episode.

    The return weighting of Hong et al. (2023, arXiv 2306.13085), where the preference is 1/alpha: all recorded rewards
    count alike, without discount, and `info["mask"]` ends nothing. Their tables have its other form, which first takes
    from a return what the initial state predicts. A mixture's shares count as well.

    Raises:
        DatasetError: if all episodes have the same return.
    """
    if preference == 0:
        return episodes
    if not np.ptp(episodes.returns) > 0:
        raise DatasetError(
            f"every episode has the return {episodes.returns[0]:g}, so none can be preferred; give a preference of 0"
        )
    weight = np.exp(preference * (in_unit(episodes.returns) - 1))
    return replace(episodes, weight=weight if episodes.weight is None else weight * np.asarray(episodes.weight))
