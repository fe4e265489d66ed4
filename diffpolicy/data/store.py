"""Our own format: a folder with one `.npy` file an array, memory-mapped when read, and `episodes.json` beside them.

    demos/
      episodes.json       format number, names, provenance
      action.npy          (N, Da)      reward.npy (N,)     length.npy terminated.npy truncated.npy has_final.npy (E,)
      weight.npy          (E,), of mixtures with shares
      obs/<name>.npy      (N+E, ...)   info/<name>.npy (N, ...)

A store is written beside its place and moved there whole, so a half-written one never stands under its name. It may be
larger than memory, to write as to read: `writing` gives the arrays as files to fill.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from diffpolicy.data.episodes import Episodes, check_finite
from diffpolicy.errors import DatasetError, first_line

FORMAT = 1
FLAT = ("action", "reward", "length", "terminated", "truncated", "has_final")
GROUPS = ("obs", "info")


class Writing:
    """A store in the making: `allocate` its large arrays, fill them, `finish` with the episodes made of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.allocated: dict[str, np.memmap] = {}
        for group in GROUPS:
            (path / group).mkdir(parents=True)

    def allocate(self, layout: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.ndarray]:
        """Return memory-mapped arrays to fill, by `obs/<name>`, `action`, `reward`, `info/<name>`.

        Raises:
            DatasetError: if the disk has no room for them, or a name cannot be a file name.
        """
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        free = shutil.disk_usage(self.path).free
        if total > free:
            raise DatasetError(
                f"the dataset declares {total / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB free; free some space"
            )
        for name, (shape, dtype) in layout.items():
            self.allocated[name] = open_memmap(self._file(name), "w+", dtype, shape)
        return dict(self.allocated)

    def finish(self, episodes: Episodes) -> None:
        """Write all that is not in its file already.

        Raises:
            DatasetError: if an array holds anything but finite numbers.
        """
        for name, array in episodes.arrays().items():
            check_finite(name, array)
        arrays = {name: getattr(episodes, name) for name in (*FLAT, "weight")}
        for group in GROUPS:
            arrays |= {f"{group}/{name}": array for name, array in getattr(episodes, group).items()}
        for name, array in arrays.items():
            if name in self.allocated and array is self.allocated[name]:
                self.allocated[name].flush()
            elif array is not None:
                np.save(self._file(name), array, allow_pickle=False)
        header = {"format": FORMAT, "obs": list(episodes.obs), "info": list(episodes.info), "meta": dict(episodes.meta)}
        (self.path / "episodes.json").write_text(json.dumps(header, indent=1))

    def _file(self, name: str) -> Path:
        group, slash, rest = name.partition("/")
        return self.path / group / _file_name(rest) if slash else self.path / _file_name(name)


@contextmanager
def writing(path: str | Path) -> Iterator[Writing]:
    """Give a store to fill; at the end it is moved to `path`, where it replaces an existing one.

    Raises:
        DatasetError: if `path` exists and is not a store, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not is_store(path):
        raise DatasetError(f"{path} exists and is not a dataset of ours; give another path or remove it")
    temporary, former = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield Writing(temporary)
        if path.exists():
            path.rename(former)
        temporary.rename(path)
    except OSError as error:
        raise DatasetError(f"{path} could not be written ({error}); free some space, or give another path") from error
    finally:
        if former.exists() and not path.exists():
            former.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def save(episodes: Episodes, path: str | Path) -> Path:
    """Write a store; an existing one at `path` is replaced.

    Raises:
        DatasetError: if `path` exists and is not a store, a name cannot be a file name, or the disk is full.
    """
    with writing(path) as store:
        store.finish(episodes)
    return Path(path)


def _file_name(name: str) -> str:
    if not name or "/" in name or name.startswith("."):
        raise DatasetError(f"the array name {name!r} cannot be a file name; rename it without '/' or leading '.'")
    return f"{name}.npy"


def is_store(path: Path) -> bool:
    """Whether `path` is a store."""
    return (path / "episodes.json").is_file()


def load(path: str | Path, obs: Sequence[str] | None = None) -> Episodes:
    """Open a store, memory-mapped (copy on write: nothing is ever written back), all its observations or those named.

    Raises:
        DatasetError: if a file is missing, cut short, newer than this version, or not a plain array.
    """
    path = Path(path)
    header = _header(path)
    if missing := [name for name in obs or () if name not in header["obs"]]:
        raise DatasetError(f"there is no observation {missing[0]!r} in {path}; it has {header['obs']}")
    flat: dict[str, Any] = {name: _array(path / f"{name}.npy") for name in FLAT}
    if (path / "weight.npy").exists():
        flat["weight"] = _array(path / "weight.npy")
    named = {"obs": header["obs"] if obs is None else obs, "info": header["info"]}
    groups = {group: {name: _array(path / group / _file_name(name)) for name in named[group]} for group in GROUPS}
    return Episodes(**groups, **flat, meta=header["meta"])


def _header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads((path / "episodes.json").read_text())
        version, obs, info = int(header["format"]), list(header["obs"]), list(header["info"])
        if not all(isinstance(name, str) for name in obs + info) or not isinstance(header["meta"], dict):
            raise TypeError("names or meta of another kind")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path / 'episodes.json'} cannot be read ({error}); write the dataset again") from error
    if version > FORMAT:
        raise DatasetError(f"{path} has format {version}, this version reads up to {FORMAT}; update diffpolicy")
    return header


def _array(path: Path) -> np.ndarray:
    try:
        return open_memmap(path, mode="c")
    except Exception as error:  # numpy raises many kinds for a damaged header
        reason = "it is missing" if isinstance(error, FileNotFoundError) else first_line(error)
        raise DatasetError(f"{path} cannot be read: {reason}; copy or write the dataset again") from error
