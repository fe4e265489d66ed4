"""The zarr replay buffer of Diffusion Policy (Chi et al. 2023): arrays under `data/`, row ends in `meta/episode_ends`.

    data/action (N, Da)   data/state (N, ...)   data/<any other>        meta/episode_ends (E,)  rows, cumulative

Every array but `action` becomes an observation; images are left out unless asked for. There are no rewards (zeros),
no ends of the task, and the observation after the last action is unknown.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    ends = _ends(path, root)
    names = _all_but_images(path, root) if names is None else names
    arrays = {name: _get(path, root, f"data/{name}") for name in ("action", *names)}
    for name, array in arrays.items():
        if len(array) != ends[-1]:
            raise DatasetError(
                f"{path}: data/{name} has {len(array)} rows, the episodes end at {ends[-1]}; wanted as many: copy the "
                "dataset again"
            )
    action = arrays.pop("action")
    flat = {name: array.reshape(len(array), -1) for name, array in arrays.items()}
    return Episodes(
        obs={name: np.insert(array, ends, array[ends - 1], axis=0) for name, array in flat.items()},
        action=action,
        reward=np.zeros(len(action), dtype=np.float32),
        length=np.diff(ends, prepend=0),
        terminated=np.zeros(len(ends), dtype=bool),
        truncated=np.ones(len(ends), dtype=bool),
        has_final=np.zeros(len(ends), dtype=bool),
        meta={"source": "zarr", "file": path.name, "rewards": "none recorded"},
    )


def _open(path: Path) -> Any:
    try:
        import zarr
    except ImportError as error:
        raise MissingExtraError(f"reading {path} needs the zarr package; pip install 'diffpolicy[zarr]'") from error
    with _reading(path, "the group"):
        return zarr.open_group(str(path), mode="r")


def _ends(path: Path, root: Any) -> np.ndarray:
    ends = _get(path, root, "meta/episode_ends")
    row_numbers = ends.ndim == 1 and ends.dtype.kind in "iu" and len(ends) > 0
    if not row_numbers or np.any(np.diff(ends.astype(np.int64), prepend=0) < 1):
        raise DatasetError(
            f"{path}: meta/episode_ends is {ends.ravel()[:5].tolist()}...; wanted rising row numbers, one an episode"
        )
    return ends.astype(np.int64)


def _all_but_images(path: Path, root: Any) -> list[str]:
    with _reading(path, "data"):
        return sorted(name for name, array in root["data"].arrays() if name != "action" and array.ndim < 4)


def _get(path: Path, root: Any, name: str) -> np.ndarray:
    with _reading(path, name):
        if name not in root:
            raise DatasetError(f"{path} lacks {name}; wanted data/action, observations beside it and meta/episode_ends")
        array = np.asarray(root[name][:])
    if array.dtype.kind not in "fiub":
        raise DatasetError(f"{path}: {name} has type {array.dtype}; wanted numbers: convert it or leave it out")
    return array


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:  # zarr raises many kinds for a damaged or foreign folder
        first = (str(error) or repr(error)).splitlines()[0]
        raise DatasetError(f"{path}: {what} cannot be read ({first}); copy the dataset again") from error
