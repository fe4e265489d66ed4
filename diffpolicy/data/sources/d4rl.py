"""D4RL's HDF5 layout: flat `observations, actions, rewards, terminals, timeouts`, and `next_observations` if present.

An episode ends at a terminal or a timeout; a trailing part that ends at neither is dropped, as in
`d4rl.sequence_dataset`. The observation after the last action comes from `next_observations`; a file without them
has unknown last observations, which bootstrapping then leaves out, as `d4rl.qlearning_dataset` does at timeouts.
Without `timeouts` only terminals end an episode: D4RL's functions then count to the environment's time limit, which
no file holds.

Differences from `d4rl.qlearning_dataset`: a timeout whose next observation is known is kept; a row that is a terminal
and a timeout is kept, as a terminal; the last row of the file is kept; an unfinished last episode is not.
"""

from pathlib import Path

import h5py
import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.errors import DatasetError

REQUIRED = ("observations", "actions", "rewards", "terminals")
FLAT = ("rewards", "terminals", "timeouts")


def is_hdf5(path: Path) -> bool:
    """Whether the file begins as HDF5 does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def load(path: Path) -> Episodes:
    """Read a D4RL-style file.

    Raises:
        DatasetError: if the file is cut short, lacks a key, or its arrays disagree.
    """
    arrays = _read(path)
    _check_shapes(path, arrays)
    n = len(arrays["observations"])
    terminal = arrays["terminals"].astype(bool).reshape(n)
    timeout = arrays["timeouts"].astype(bool).reshape(n) if "timeouts" in arrays else np.zeros(n, dtype=bool)
    ends = np.flatnonzero(terminal | timeout)
    if len(ends) == 0:
        raise DatasetError(
            f"{path} has zero complete episodes: no row of terminals or timeouts is true; mark where each one ends"
        )
    total = int(ends[-1]) + 1
    return Episodes(
        obs={"obs": _with_final_rows(arrays["observations"], arrays.get("next_observations"), ends)},
        action=arrays["actions"][:total],
        reward=arrays["rewards"].reshape(n)[:total],
        length=np.diff(ends, prepend=-1),
        terminated=terminal[ends],
        truncated=timeout[ends] & ~terminal[ends],
        has_final=np.full(len(ends), "next_observations" in arrays),
        meta={"source": "d4rl-hdf5", "file": path.name, "dropped_steps": n - total},
    )


def _check_shapes(path: Path, arrays: dict[str, np.ndarray]) -> None:
    obs = arrays["observations"]
    for name, array in arrays.items():
        if len(array) != len(obs):
            raise DatasetError(
                f"{path}: {name} has {len(array)} rows and observations {len(obs)}; wanted as many: write it again"
            )
        if name in FLAT and array.size != len(obs):
            raise DatasetError(f"{path}: {name} has shape {array.shape}; wanted one number a row: reshape it")
        if name.endswith("observations") and array.shape != (len(obs), obs.shape[-1]):
            raise DatasetError(f"{path}: {name} has shape {array.shape}; wanted flat rows of one size: reshape it")


def _with_final_rows(obs: np.ndarray, next_obs: np.ndarray | None, ends: np.ndarray) -> np.ndarray:
    """Insert after each episode the observation that followed its last action (or a copy of the last one)."""
    final = (obs if next_obs is None else next_obs)[ends]
    return np.insert(obs[: ends[-1] + 1], ends + 1, final, axis=0)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with h5py.File(path, "r") as file:
            if missing := [name for name in REQUIRED if name not in file]:
                raise DatasetError(f"{path} lacks {', '.join(missing)}; wanted D4RL's {', '.join(REQUIRED)}")
            names = [name for name in (*REQUIRED, "timeouts", "next_observations") if name in file]
            return {name: _dataset(path, file[name]) for name in names}
    except (OSError, RuntimeError, KeyError) as error:
        raise DatasetError(f"{path} cannot be read as HDF5, it may be cut short ({error}); copy it again") from error


def _dataset(path: Path, item: object) -> np.ndarray:
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiub" or not item.shape:
        raise DatasetError(
            f"{path}: {getattr(item, 'name', item)} is not an array of numbers; wanted D4RL's layout: write it again"
        )
    return np.asarray(item[:])
