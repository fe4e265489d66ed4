"""Episodes: the one type that files, rollouts and training speak. Flat arrays, in memory or memory-mapped.

E episodes with N steps in all; an episode of L steps has L + 1 observations, the last one seen after its last action:

    episode        0                   1
    obs      o0 o1 o2 o3 o4 | o5 o6 o7 o8        N + E rows
    action   a0 a1 a2 a3    | a4 a5 a6           N rows
    reward   r0 r1 r2 r3    | r4 r5 r6           N rows
    length         4        |      3             E rows;  terminated, truncated, has_final likewise

`terminated` (the task ended: no future value) and `truncated` (the recording ended) never merge. Formats that do not
store the observation after the last action get a copy of the one before, and `has_final` False: good for imitation,
left out of bootstrapping.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from diffpolicy.errors import DatasetError

CHECK_ROWS = 1 << 18


@dataclass(frozen=True)
class Episode:
    """One episode, views into the flat arrays: observations `(L+1, ...)`, action `(L, Da)`, reward `(L,)`."""

    obs: Mapping[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    terminated: bool
    truncated: bool
    info: Mapping[str, np.ndarray] = field(default_factory=dict)
    has_final: bool = True

    def __len__(self) -> int:
        """Return the number of actions."""
        return len(self.action)


@dataclass(frozen=True)
class Episodes:
    """E episodes as flat arrays; see the picture above.

    Args:
        obs: named observations, `{name: (N+E, ...)}`.
        action: `(N, Da)`, physical units.
        reward: `(N,)`.
        length: actions of each episode, `(E,)`, each at least 1.
        terminated: the task truly ended, `(E,)` bool.
        truncated: time ran out or the recording stopped, `(E,)` bool.
        info: further per-step arrays, `{name: (N, ...)}`.
        has_final: whether the observation after the last action was recorded, `(E,)` bool; all True if None.
        meta: provenance, plain JSON values (who acted, versions, seeds, environment).
        weight: how likely training takes one window of the episode, relative to others, `(E,)`; None for all alike.

    Raises:
        DatasetError: if there is no episode, shapes disagree, or an array in memory holds anything but finite numbers
            (a memory-mapped one is checked where it is first read whole, by `Normalizer.fit`).
    """

    obs: Mapping[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    length: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    info: Mapping[str, np.ndarray] = field(default_factory=dict)
    has_final: np.ndarray | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    weight: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.has_final is None:
            object.__setattr__(self, "has_final", np.ones(len(self.length), dtype=bool))
        self._check_lengths()
        self._check_shapes()
        for name, array in self.arrays().items():
            _check_numbers(name, array)
            if not isinstance(array, np.memmap):
                check_finite(name, array)

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array that training reads, by the name that errors give it."""
        obs = {f"obs {name!r}": array for name, array in self.obs.items()}
        return {**obs, "action": self.action, "reward": self.reward}

    def _check_lengths(self) -> None:
        if self.length.ndim != 1 or (len(self.length) and self.length.dtype.kind not in "iu"):
            raise DatasetError(
                f"length has shape {self.length.shape} and type {self.length.dtype}; wanted one whole number an episode"
            )
        if len(self.length) == 0:
            raise DatasetError("the dataset has zero episodes; give at least one episode of one step")
        if np.min(self.length) < 1:
            first = int(np.argmin(self.length))
            raise DatasetError(f"episode {first} has {self.length[first]} steps; wanted at least 1: leave it out")

    def _check_shapes(self) -> None:
        if self.action.ndim != 2 or not np.issubdtype(self.action.dtype, np.floating):
            raise DatasetError(
                f"actions have shape {self.action.shape} and type {self.action.dtype}; "
                "wanted continuous actions, floats of shape (N, Da): discrete action spaces are not supported"
            )
        if not self.obs:
            raise DatasetError("the dataset has no observations; give at least one named array")
        n, e = int(np.sum(self.length)), len(self.length)
        _check_rows({f"obs {k!r}": v for k, v in self.obs.items()}, n + e, "one a step and one at each end")
        _check_rows({"action": self.action, **{f"info {k!r}": v for k, v in self.info.items()}}, n, "one a step")
        _check_rows({"reward": self.reward}, n, "one number a step", ndim=1)
        ends = {name: getattr(self, name) for name in ("terminated", "truncated", "has_final")}
        _check_rows(ends, e, "one an episode", ndim=1)
        if self.weight is not None:
            _check_rows({"weight": self.weight}, e, "one an episode", ndim=1)
            if not (np.all(np.isfinite(self.weight)) and np.all(self.weight >= 0) and np.any(self.weight > 0)):
                raise DatasetError(
                    "the weights of the episodes are not numbers of at least 0 with one above; correct them"
                )

    def __len__(self) -> int:
        """Return the number of episodes."""
        return len(self.length)

    @property
    def steps(self) -> int:
        """Number of actions in all, `N`."""
        return len(self.action)

    @cached_property
    def start(self) -> np.ndarray:
        """First step of each episode in `action`, `(E,)`; add its number for the first row of `obs`."""
        return np.concatenate([[0], np.cumsum(self.length, dtype=np.int64)[:-1]])

    def __getitem__(self, i: int) -> Episode:
        """Return episode `i`, views only."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)}")
        i %= len(self)
        a, n = int(self.start[i]), int(self.length[i])
        assert self.has_final is not None
        return Episode(
            obs={name: array[a + i : a + i + n + 1] for name, array in self.obs.items()},
            action=self.action[a : a + n],
            reward=self.reward[a : a + n],
            terminated=bool(self.terminated[i]),
            truncated=bool(self.truncated[i]),
            info={name: array[a : a + n] for name, array in self.info.items()},
            has_final=bool(self.has_final[i]),
        )

    def select(self, index: Sequence[int] | np.ndarray) -> "Episodes":
        """Copy some episodes, in the order given."""
        chosen = from_list([self[int(i)] for i in index], meta=self.meta)
        return replace(chosen, weight=None if self.weight is None else np.asarray(self.weight)[np.asarray(index)])

    def rename(self, names: Mapping[str, str]) -> "Episodes":
        """Keep and rename observations: `{new name: old name}`, without copying.

        Raises:
            DatasetError: if an old name is not there.
        """
        for old in names.values():
            if old not in self.obs:
                raise DatasetError(f"there is no observation {old!r} in the dataset; it has {sorted(self.obs)}")
        return replace(self, obs={new: self.obs[old] for new, old in names.items()})

    def ended_by(self, name: str) -> "Episodes":
        """Have those episodes end truly, too, in whose last step the info value `name` is not 0.

        For formats that cannot tell how episodes end (LeRobot's `next.success`): critics then see the last reward, with
        nothing after it.

        Raises:
            DatasetError: if there is no such value.
        """
        if name not in self.info:
            raise DatasetError(f"there is no info value {name!r} in the dataset; it has {sorted(self.info)}")
        ended = np.asarray(self.terminated) | (self.info[name][self.start + np.asarray(self.length) - 1] != 0)
        return replace(self, terminated=ended, truncated=np.asarray(self.truncated) & ~ended)

    @cached_property
    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode, `(E,)`."""
        return np.add.reduceat(np.asarray(self.reward, dtype=np.float64), self.start)


def _check_rows(arrays: Mapping[str, np.ndarray], rows: int, why: str, ndim: int | None = None) -> None:
    for name, array in arrays.items():
        if array.shape[:1] != (rows,) or (ndim is not None and array.ndim != ndim):
            raise DatasetError(
                f"{name} has shape {array.shape}; wanted {rows} rows, {why}: compare it with the other arrays"
            )


def _check_numbers(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "fiub":
        raise DatasetError(f"{name} has type {array.dtype}; wanted numbers: convert it or leave it out")


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuse an array with a value that is no finite number, block by block.

    Raises:
        DatasetError: with the first such value and its row.
    """
    if array.dtype.kind != "f":
        return
    for row in range(0, len(array), CHECK_ROWS):
        block = np.asarray(array[row : row + CHECK_ROWS])
        finite = np.isfinite(block)
        if not finite.all():
            first = np.argwhere(~finite)[0]
            raise DatasetError(
                f"{name} holds {block[tuple(first)]} in row {row + int(first[0])}; wanted finite numbers: remove that "
                "episode or repair the value"
            )


def from_list(episodes: Sequence[Episode], meta: Mapping[str, Any] | None = None) -> Episodes:
    """Join single episodes into flat arrays.

    Raises:
        DatasetError: if there are none, or one of them has other names than the first, or rows than its actions want.
    """
    if not episodes:
        raise DatasetError("the dataset has zero episodes; give at least one episode of one step")
    first = episodes[0]
    for i, e in enumerate(episodes):
        rows = {name: len(array) for name, array in e.obs.items()}
        if rows != dict.fromkeys(first.obs, len(e) + 1) or len(e.reward) != len(e):
            raise DatasetError(
                f"episode {i} has {len(e)} actions, {len(e.reward)} rewards and rows of observations {rows}; wanted "
                f"a reward an action, and one row more of {sorted(first.obs)}: record what followed the last action"
            )
        if e.info.keys() != first.info.keys():
            raise DatasetError(
                f"episode {i} has info {sorted(e.info)}, the first {sorted(first.info)}; wanted the same names: leave "
                "out, or fill in, what not all have"
            )
    return Episodes(
        obs={name: np.concatenate([e.obs[name] for e in episodes]) for name in first.obs},
        action=np.concatenate([e.action for e in episodes]),
        reward=np.concatenate([e.reward for e in episodes]),
        length=np.array([len(e) for e in episodes], dtype=np.int64),
        terminated=np.array([e.terminated for e in episodes], dtype=bool),
        truncated=np.array([e.truncated for e in episodes], dtype=bool),
        info={name: np.concatenate([e.info[name] for e in episodes]) for name in first.info},
        has_final=np.array([e.has_final for e in episodes], dtype=bool),
        meta=meta or {},
    )


def from_steps(
    obs: Mapping[str, np.ndarray] | np.ndarray,
    action: np.ndarray,
    reward: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray | None = None,
    next_obs: Mapping[str, np.ndarray] | np.ndarray | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Episodes:
    """Make episodes of one row a step, as D4RL's and d3rlpy's datasets have them.

    Args:
        obs: before each step, `(N, ...)`, which gets the name `obs`, or `{name: (N, ...)}`.
        action: `(N, Da)`.
        reward: `(N,)`.
        terminated: the task truly ended with this step, `(N,)`.
        truncated: time ran out after this step, `(N,)`; none if not given.
        next_obs: after each step, as `obs`. Without it what followed an episode's last step is not known, and targets
            leave it out.
        meta: provenance, plain JSON values.

    Returns:
        The episodes up to the last end; the steps after it are of no whole episode (`meta["dropped_steps"]`).

    Raises:
        DatasetError: if rows disagree, or no step ends an episode.
    """
    before = _named(obs)
    after = before if next_obs is None else _named(next_obs)
    action, reward = np.asarray(action), np.asarray(reward)
    ended = np.asarray(terminated, dtype=bool)
    cut = np.zeros_like(ended) if truncated is None else np.asarray(truncated, dtype=bool)
    named = {"action": action, **{f"obs {name!r}": array for name, array in before.items()}}
    _check_rows({"terminated": ended, "truncated": cut, "reward": reward}, len(action), "one number an action", ndim=1)
    _check_rows(named, len(action), "one an action")
    shapes = [{name: array.shape for name, array in each.items()} for each in (before, after)]
    if shapes[0] != shapes[1]:
        raise DatasetError(f"obs has {shapes[0]} and next_obs {shapes[1]}; wanted the same names and shapes")
    cut = cut & ~ended
    ends = np.flatnonzero(ended | cut) + 1
    if len(ends) == 0:
        raise DatasetError("no step ends an episode; mark the last step of each as terminated or truncated")
    n = int(ends[-1])
    return Episodes(
        obs={name: np.insert(array[:n], ends, after[name][ends - 1], axis=0) for name, array in before.items()},
        action=action[:n],
        reward=reward[:n],
        length=np.diff(ends, prepend=0),
        terminated=ended[ends - 1],
        truncated=cut[ends - 1],
        has_final=np.full(len(ends), next_obs is not None),
        meta={**(meta or {}), "dropped_steps": len(ended) - n},
    )


def _named(obs: Mapping[str, np.ndarray] | np.ndarray) -> dict[str, np.ndarray]:
    named = obs if isinstance(obs, Mapping) else {"obs": obs}
    return {name: np.asarray(array) for name, array in named.items()}


def concatenate(parts: Sequence[Episodes]) -> Episodes:
    """Join datasets with the same observations, in memory; of `info`, what all of them have, and `mask`.

    `weight` and `meta` are not joined: what they mean together is the caller's to say.
    """
    if any("mask" in part.info for part in parts):
        parts = [replace(part, info={"mask": np.ones(part.steps, dtype=bool), **part.info}) for part in parts]
    first = parts[0]
    shared = [name for name in first.info if all(name in part.info for part in parts)]

    def joined(arrays: Iterable[np.ndarray | None]) -> np.ndarray:
        return np.concatenate([array for array in arrays if array is not None])

    return Episodes(
        obs={name: joined(part.obs[name] for part in parts) for name in first.obs},
        action=joined(part.action for part in parts),
        reward=joined(part.reward for part in parts),
        length=joined(part.length for part in parts),
        terminated=joined(part.terminated for part in parts),
        truncated=joined(part.truncated for part in parts),
        info={name: joined(part.info[name] for part in parts) for name in shared},
        has_final=joined(part.has_final for part in parts),
    )


def split(episodes: Episodes, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split by episode: indices of training and validation, the latter `round(fraction * E)` but never all."""
    if not 0 <= fraction < 1:
        raise DatasetError(f"the validation fraction is {fraction}; give a number from 0 to less than 1")
    order = np.random.default_rng(seed).permutation(len(episodes))
    held_out = min(round(fraction * len(episodes)), len(episodes) - 1)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
