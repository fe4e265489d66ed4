"""D4RL's HDF5 layout: flat `observations, actions, rewards, terminals, timeouts`, and `next_observations` if present.

An episode ends at a terminal or a timeout; a trailing part that ends at neither is dropped, as in
`d4rl.sequence_dataset`. The observation after the last action comes from `next_observations`; a file without them
has unknown last observations, which bootstrapping then leaves out, as `d4rl.qlearning_dataset` does at timeouts.
Without `timeouts` only terminals end an episode: D4RL's functions then count to the environment's time limit, which
no file holds.

Ends are what the file says they are. Kitchen's generator marks the last row of every demonstration terminal, whatever
happened there, and no timeouts: ends of recordings read as true ends. AntMaze v0 has timeouts out of step with the
ant's resets (Farama-Foundation/D4RL, issue 77, names umaze-diverse and medium-diverse), so that episodes go on across
jumps; D4RL made v2 to mend that. By their names (`d4rl:antmaze-...`) such datasets come with a warning.

Differences from `d4rl.qlearning_dataset`: a timeout whose next observation is known is kept; a row that is a terminal
and a timeout is kept, as a terminal; the last row of the file is kept; an unfinished last episode is not.
"""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.files import write_atomically
from diffpolicy.data.sources import hdf5
from diffpolicy.data.sources.reading import (
    Layout,
    Wanted,
    assemble,
    blocks,
    copy_observations,
    copy_rows,
    reading,
    row_bytes,
)
from diffpolicy.errors import DatasetError

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")
SCALARS = ("rewards", "terminals", "timeouts")
LAYOUT = f"D4RL's {', '.join(REQUIRED)}"


def recognises(path: Path) -> bool:
    """Whether the file has D4RL's names at its root."""
    return hdf5.is_hdf5(path) and any(name in hdf5.names(path) for name in REQUIRED)


def load(path: Path, wanted: Wanted) -> Episodes:
    """Read a D4RL-style file.

    Raises:
        DatasetError: if the file is cut short, lacks a key, or its arrays disagree.
    """
    wanted.refuse_part_and_task("D4RL's layout")
    wanted.choose({"obs": (1,)})
    with hdf5.opened(path) as file:
        return _read(path, _checked(path, file), wanted)


def _read(path: Path, data: dict[str, h5py.Dataset], wanted: Wanted) -> Episodes:
    terminal, timeout = _flags(data, "terminals"), _flags(data, "timeouts")
    ends = np.flatnonzero(terminal | timeout) + 1
    if len(ends) == 0:
        raise DatasetError(
            f"{path} has zero complete episodes: no row of terminals or timeouts is true; mark where each one ends"
        )
    n, obs, final = int(ends[-1]), data["observations"], data.get("next_observations")
    layout: Layout = {
        "obs/obs": ((n + len(ends), *obs.shape[1:]), obs.dtype),
        "action": ((n, *data["actions"].shape[1:]), data["actions"].dtype),
        "reward": ((n,), data["rewards"].dtype),
    }
    arrays = wanted.allocate(layout)
    read_next = None if final is None else hdf5.rows(final)
    copy_observations(arrays["obs/obs"], ends, hdf5.rows(obs), read_next, hdf5.chunk_rows(obs))
    copy_rows(arrays["action"], hdf5.rows(data["actions"]), hdf5.chunk_rows(data["actions"]))
    copy_rows(arrays["reward"], lambda rows: np.asarray(data["rewards"][rows]).reshape(-1))
    return assemble(
        arrays,
        length=np.diff(ends, prepend=0),
        terminated=terminal[ends - 1],
        truncated=timeout[ends - 1] & ~terminal[ends - 1],
        has_final=np.full(len(ends), final is not None),
        meta={**_provenance(path, data), "source": "d4rl-hdf5", "file": path.name, "dropped_steps": len(terminal) - n},
    )


def _provenance(path: Path, data: dict[str, h5py.Dataset]) -> dict[str, Any]:
    """Return what `save` wrote beside the arrays, nothing for files of others."""
    meta = data["actions"].file.attrs.get("meta")
    if meta is None:
        return {}
    with reading(path, "its attribute meta"):
        return dict(json.loads(meta))


def _flags(data: dict[str, h5py.Dataset], name: str) -> np.ndarray:
    n = len(data["observations"])
    return np.asarray(data[name][:]).astype(bool).reshape(n) if name in data else np.zeros(n, dtype=bool)


def _checked(path: Path, file: h5py.File) -> dict[str, h5py.Dataset]:
    if missing := [name for name in REQUIRED if name not in file]:
        raise DatasetError(f"{path} lacks {', '.join(missing)}; wanted {LAYOUT}")
    present = [name for name in (*REQUIRED, *OPTIONAL) if name in file]
    data = {name: hdf5.dataset(path, file, name, LAYOUT) for name in present}
    obs = data["observations"]
    for name, item in data.items():
        if len(item) != len(obs):
            raise DatasetError(
                f"{path}: {name} has {len(item)} rows and observations {len(obs)}; wanted as many: write it again"
            )
        if name in SCALARS and item.size != len(obs):
            raise DatasetError(f"{path}: {name} has shape {item.shape}; wanted one number a row: reshape it")
        if name.endswith("observations") and item.shape != (len(obs), obs.shape[-1]):
            raise DatasetError(f"{path}: {name} has shape {item.shape}; wanted flat rows of one size: reshape it")
    return data


def save(episodes: Episodes, path: Path) -> None:
    """Write a file in D4RL's layout, provenance in its attribute `meta`.

    `next_observations` are written where every episode has its last observation. D4RL marks an end that is no true
    one as a timeout.

    Raises:
        DatasetError: if there are several observations, or one that is not flat, or the disk is full.
    """
    shapes = {name: array.shape[1:] for name, array in episodes.obs.items()}
    if len(shapes) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise DatasetError(f"the observations are {shapes}; D4RL's layout has one flat array: write a store instead")
    write_atomically(path, lambda temporary: _write(episodes, temporary))


def _write(episodes: Episodes, path: Path) -> None:
    n = episodes.steps
    (obs,) = episodes.obs.values()
    ends = np.cumsum(episodes.length)
    terminals, timeouts = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    terminals[ends - 1] = episodes.terminated
    timeouts[ends - 1] = episodes.truncated | ~np.asarray(episodes.terminated)
    sources = {"observations": (obs, 0), "next_observations": (obs, 1), "actions": (episodes.action, None)}
    if not np.all(episodes.has_final):
        del sources["next_observations"]
    with h5py.File(path, "w") as file:
        file.attrs["meta"] = json.dumps(dict(episodes.meta))
        file.create_dataset("rewards", data=episodes.reward)
        file.create_dataset("terminals", data=terminals)
        file.create_dataset("timeouts", data=timeouts)
        for name, (array, ahead) in sources.items():
            item = file.create_dataset(name, (n, *array.shape[1:]), array.dtype)
            for rows in blocks(n, row_bytes(array)):
                numbers = np.arange(rows.start, rows.stop)
                # Each episode before has one observation more than it has steps.
                shift = 0 if ahead is None else np.searchsorted(ends, numbers, side="right") + ahead
                item[rows] = array[numbers + shift]
