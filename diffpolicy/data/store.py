"""Our own format: a folder with one `.npy` file an array, memory-mapped when read, and `episodes.json` beside them.

    demos/
      episodes.json       format number, names, provenance
      action.npy          (N, Da)      reward.npy (N,)     length.npy terminated.npy truncated.npy has_final.npy (E,)
      obs/<name>.npy      (N+E, ...)   info/<name>.npy (N, ...)

A store is written beside its place and moved there whole, so a half-written one never stands under its name.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from diffpolicy.data.episodes import Episodes
from diffpolicy.errors import DatasetError

FORMAT = 1
FLAT = ("action", "reward", "length", "terminated", "truncated", "has_final")


def save(episodes: Episodes, path: str | Path) -> Path:
    """Write a store; an existing one at `path` is replaced.

    Raises:
        DatasetError: if `path` exists and is not a store, a name cannot be a file name, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not is_store(path):
        raise DatasetError(f"{path} exists and is not a dataset of ours; give another path or remove it")
    temporary, former = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(episodes, temporary)
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
    return path


def _write(episodes: Episodes, path: Path) -> None:
    (path / "obs").mkdir(parents=True)
    (path / "info").mkdir()
    for name in FLAT:
        np.save(path / f"{name}.npy", getattr(episodes, name), allow_pickle=False)
    for group, arrays in (("obs", episodes.obs), ("info", episodes.info)):
        for name, array in arrays.items():
            np.save(path / group / _file_name(name), array, allow_pickle=False)
    header = {"format": FORMAT, "obs": list(episodes.obs), "info": list(episodes.info), "meta": dict(episodes.meta)}
    (path / "episodes.json").write_text(json.dumps(header, indent=1))


def _file_name(name: str) -> str:
    if not name or "/" in name or name.startswith("."):
        raise DatasetError(f"the array name {name!r} cannot be a file name; rename it without '/' or leading '.'")
    return f"{name}.npy"


def is_store(path: Path) -> bool:
    """Whether `path` is a store."""
    return (path / "episodes.json").is_file()


def load(path: str | Path) -> Episodes:
    """Open a store, memory-mapped (copy on write: nothing is ever written back).

    Raises:
        DatasetError: if a file is missing, cut short, newer than this version, or not a plain array.
    """
    path = Path(path)
    header = _header(path)
    flat: dict[str, Any] = {name: _array(path / f"{name}.npy") for name in FLAT}
    obs, info = ({name: _array(path / group / _file_name(name)) for name in header[group]} for group in ("obs", "info"))
    return Episodes(obs=obs, info=info, meta=header["meta"], **flat)


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
        first = (str(error) or repr(error)).splitlines()[0]
        reason = "it is missing" if isinstance(error, FileNotFoundError) else first
        raise DatasetError(f"{path} cannot be read: {reason}; copy or write the dataset again") from error
