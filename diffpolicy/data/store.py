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

from diffpolicy.data.episodes import Episodes
from diffpolicy.errors import DatasetError

FORMAT = 1
FLAT = ("action", "reward", "length", "terminated", "truncated", "has_final")


def save(episodes: Episodes, path: str | Path) -> Path:
    """Write a store; an existing one at `path` is replaced.

    Raises:
        DatasetError: if `path` exists and is not a store, or a name cannot be a file name.
    """
    path = Path(path)
    if path.exists() and not is_store(path):
        raise DatasetError(f"{path} exists and is not a dataset of ours; give another path or remove it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(episodes, temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _write(episodes: Episodes, path: Path) -> None:
    (path / "obs").mkdir(parents=True)
    (path / "info").mkdir()
    for name in FLAT:
        np.save(path / f"{name}.npy", getattr(episodes, name), allow_pickle=False)
    for group, arrays in (("obs", episodes.obs), ("info", episodes.info)):
        for name, array in arrays.items():
            if "/" in name or name.startswith("."):
                raise DatasetError(f"{group} name {name!r} cannot be a file name; rename it without '/' or leading '.'")
            np.save(path / group / f"{name}.npy", array, allow_pickle=False)
    header = {"format": FORMAT, "obs": list(episodes.obs), "info": list(episodes.info), "meta": dict(episodes.meta)}
    (path / "episodes.json").write_text(json.dumps(header, indent=1))


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
    obs = {name: _array(path / "obs" / f"{name}.npy") for name in header["obs"]}
    info = {name: _array(path / "info" / f"{name}.npy") for name in header["info"]}
    return Episodes(obs=obs, info=info, meta=header["meta"], **flat)


def _header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads((path / "episodes.json").read_text())
        version, _ = header["format"], (header["obs"], header["info"], header["meta"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path / 'episodes.json'} cannot be read ({error}); write the dataset again") from error
    if version > FORMAT:
        raise DatasetError(f"{path} has format {version}, this version reads up to {FORMAT}; update diffpolicy")
    return header


def _array(path: Path) -> np.ndarray:
    if ".." in path.parts[-3:]:
        raise DatasetError(f"{path} leaves its folder; wanted a plain name")
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise DatasetError(f"{path} cannot be read: {reason}; copy or write the dataset again") from error
