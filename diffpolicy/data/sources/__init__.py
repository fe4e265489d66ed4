"""One way in: `load(path)` finds the format by content and returns `Episodes`."""

from pathlib import Path

from diffpolicy.data import store
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import d4rl, zarr
from diffpolicy.errors import DatasetError


def load(path: str | Path) -> Episodes:
    """Load offline data: our own store, a D4RL-style HDF5 file, or a Diffusion Policy zarr replay buffer.

    Raises:
        DatasetError: if there is nothing at `path`, its format is unknown, or its content cannot be right.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"there is no dataset at {path}; check the path")
    if store.is_store(path):
        return store.load(path)
    if zarr.is_zarr(path):
        return zarr.load(path)
    if d4rl.is_hdf5(path):
        return d4rl.load(path)
    raise DatasetError(
        f"{path} is no format this version knows; wanted a diffpolicy store (a folder with episodes.json), "
        "D4RL's HDF5 layout, or a zarr replay buffer (data/ and meta/episode_ends)"
    )
