"""The check for velocity actions: does an action say where to go, or how fast?

For windows of w = 1, 4 and 16 steps inside episodes, action dimension i and observed dimension j,

    rate_ij  = | corr( a_i[t] + ... + a_i[t+w-1],  o_j[t+w] - o_j[t] ) |        actions that are summed up to a motion
    level_i  = max over j of | corr( a_i[t], o_j[t+1] ) |                       actions that are positions

Action i is a velocity (or a delta) if some j has `rate_ij >= 0.8` at every w and `level_i <= rate_ij - 0.2`. The
longest window keeps out torques of a periodic gait, whose sum only matches the motion's phase. A dimension j that is
itself the velocity of another one, `| corr(o_j, change of o_k) | >= 0.95`, counts for neither: what changes a velocity
is a force, and a velocity action resembles it. The dataset is reported if at least half of its action dimensions are
velocities. Measured over the three windows: OGBench's relative end-effector actions 0.85 to 0.99; absolute joint
targets below 0.2; torques of locomotion below 0.8, but for one dimension in six of one dataset.

Temporal U-Nets do worse with velocity actions than with position targets (Chi et al. 2023).
"""

from collections.abc import Iterator

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.inspection.findings import Evidence, Finding, Severity
from diffpolicy.inspection.ranges import evenly, flat

WINDOWS = (1, 4, 16)
SAMPLE_WINDOWS = 20_000
FEWEST_WINDOWS = 30
MOST_DIMS = 256
RATE = 0.8
MARGIN = 0.2
DERIVATIVE = 0.95


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Absolute Pearson correlations of all columns, `(n, a), (n, b) -> (a, b)`; 0 for a constant column."""
    return abs(_standard(x).T @ _standard(y)) / len(x)


def _standard(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(0)
    std = centred.std(0)
    moving = std > 1e-6 * np.maximum(1e-3, abs(x).max(0))
    return np.where(moving, centred / np.where(moving, std, 1), 0)


def windows(episodes: Episodes, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (first step, episode) of at most `SAMPLE_WINDOWS` windows inside episodes, evenly spaced."""
    fitting = np.maximum(episodes.length - size + 1, 0)
    picked = evenly(int(fitting.sum()), SAMPLE_WINDOWS)
    before = np.cumsum(fitting) - fitting
    episode = np.searchsorted(before, picked, side="right") - 1
    return episodes.start[episode] + picked - before[episode], episode


def _moves(e: Evidence, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed actions `(n, Da)`, observations before and after `(n, D)` of the sampled windows."""
    step, episode = windows(e.episodes, size)
    total = sum(flat(e.episodes.action[step + k]) for k in range(size))
    arrays = [a for r, a in zip(e.obs, e.episodes.obs.values(), strict=True) if not r.images and not r.bad.any()]
    before, after = (
        np.concatenate([np.zeros((len(step), 0)), *(flat(a[step + episode + k]) for a in arrays)], axis=1)
        for k in (0, size)
    )
    return np.asarray(total), before[:, :MOST_DIMS], after[:, :MOST_DIMS]


def velocity_pairs(e: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Return `rate_ij` of the weakest window where i moves j and 0 elsewhere: its maximum over j `(Da,)`, and all."""
    action, before, after = _moves(e, 1)
    change = after - before
    derivative = correlation((before + after) / 2, change)
    np.fill_diagonal(derivative, 0)
    position = derivative.max(1, initial=0) < DERIVATIVE
    level = np.where(position, correlation(action, after), 0).max(1, initial=0)
    rate = correlation(action, change)
    for size in WINDOWS[1:]:
        if len(windows(e.episodes, size)[0]) >= FEWEST_WINDOWS:
            total, before, after = _moves(e, size)
            rate = np.minimum(rate, correlation(total, after - before))
    found = np.where((rate >= RATE) & (level[:, None] <= rate - MARGIN) & position, rate, 0)
    return found.max(1, initial=0), found


def velocity_actions(e: Evidence) -> Iterator[Finding]:
    """Actions that say how fast to move, not where to."""
    if e.episodes.steps < FEWEST_WINDOWS or e.action.bad.any():
        return
    best, pairs = velocity_pairs(e)
    if pairs.shape[1] == 0:
        return
    dims = np.flatnonzero(best)
    if len(dims) and len(dims) >= (~e.action.constant).sum() / 2:
        i = int(np.argmax(best))
        yield Finding(
            Severity.SUSPECT,
            e.action.where(dims),
            f"looks like a velocity or a delta: the sum of [{i}] over {WINDOWS[0]} to {WINDOWS[-1]} steps gives the "
            f"change of {_observed(e, int(np.argmax(pairs[i])))} (correlation at least {int(100 * best[i]) / 100:.2f})",
            "Convert to absolute targets (position plus delta) if the controller takes them: temporal U-Nets do worse "
            "with velocity actions (Chi et al. 2023). If it does not, execute fewer actions of each chunk.",
        )


def _observed(e: Evidence, column: int) -> str:
    """Name a column of the joined observations."""
    for r in e.obs:
        if r.images or r.bad.any():
            continue
        if column < r.dims:
            return r.where(np.array([column]))
        column -= r.dims
    raise IndexError(column)


CHECKS = (velocity_actions,)
