"""The zarr replay buffer of Diffusion Policy (Chi et al. 2023): arrays under `data/`, row ends in `meta/episode_ends`.

    data/action (N, Da)   data/state (N, ...)   data/<any other>        meta/episode_ends (E,)  rows, cumulative

Every array but `action` becomes an observation; images are left out unless asked for. There are no rewards (zeros),
no ends of the task, and the observation after the last action is unknown.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.errors import DatasetError, MissingExtraError


def is_zarr(path: Path) -> bool:
    """Whether the folder is a zarr group."""
    return path.is_dir() and any((path / name).exists() for name in (".zgroup", "zarr.json", "meta/episode_ends"))


def load(path: Path, names: Sequence[str] | None = None) -> Episodes:
    """Read a replay buffer; `names` picks the observations, all but images (4 axes) if None.

    Raises:
        DatasetError: if an array is missing or its rows disagree with the episodes' ends.
        MissingExtraError: if the `zarr` package is not installed.
    """
    root = _open(path)
    ends = np.asarray(_get(path, root, "meta/episode_ends"), dtype=np.int64)
    if len(ends) == 0 or np.any(np.diff(ends, prepend=0) < 1):
        raise DatasetError(f"{path}: meta/episode_ends is {ends[:5]}...; wanted rising row numbers, one an episode")
    present = sorted(name for name, array in root["data"].arrays() if name != "action" and array.ndim < 4)
    arrays = {name: _get(path, root, f"data/{name}") for name in ("action", *(present if names is None else names))}
    for name, array in arrays.items():
        if len(array) != ends[-1]:
            raise DatasetError(f"{path}: data/{name} has {len(array)} rows, the episodes end at {ends[-1]}")
    action = arrays.pop("action")
    last = ends - 1
    return Episodes(
        obs={name: np.insert(array.reshape(len(array), -1), ends, array.reshape(len(array), -1)[last], axis=0)
             for name, array in arrays.items()},
        action=action,
        reward=np.zeros(len(action), dtype=np.float32),
        length=np.diff(ends, prepend=0),
        terminated=np.zeros(len(ends), dtype=bool),
        truncated=np.ones(len(ends), dtype=bool),
        has_final=np.zeros(len(ends), dtype=bool),
        meta={"source": "zarr", "file": path.name, "rewards": "none recorded"},
    )  # fmt: skip


def _open(path: Path) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise MissingExtraError(f"reading {path} needs the zarr package; pip install 'diffpolicy[zarr]'") from error
    try:
        root = zarr.open_group(str(path), mode="r")
        root["data"]
        return root
    except Exception as error:  # zarr raises many kinds, all of which mean this
        raise DatasetError(f"{path} cannot be opened as a zarr replay buffer ({error}); copy it again") from error


def _get(path: Path, root: Any, name: str) -> np.ndarray:
    if name not in root:
        raise DatasetError(f"{path} lacks {name}; wanted data/action, observations beside it and meta/episode_ends")
    try:
        return np.asarray(root[name][:])
    except Exception as error:
        raise DatasetError(f"{path}: {name} cannot be read ({error}); copy the dataset again") from error
