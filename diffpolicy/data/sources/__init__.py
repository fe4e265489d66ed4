"""One way in: `load(path)` finds the format by content and returns `Episodes`."""

from collections.abc import Callable
from pathlib import Path

from diffpolicy.data import store
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import d4rl, zarr
from diffpolicy.errors import DatasetError

READERS = ((store.is_store, store.load), (zarr.is_zarr, zarr.load), (d4rl.is_hdf5, d4rl.load))


def load(path: str | Path) -> Episodes:
    """Load offline data: our own store, a D4RL-style HDF5 file, or a Diffusion Policy zarr replay buffer.

    Raises:
        DatasetError: if there is nothing at `path`, its format is unknown, or its content cannot be right.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"there is no dataset at {path}; check the path")
    for recognises, read in READERS:
        if recognises(path):
            return _naming(path, read)
    raise DatasetError(
        f"{path} is no format this version knows; wanted a diffpolicy store (a folder with episodes.json), "
        "D4RL's HDF5 layout, or a zarr replay buffer (data/ and meta/episode_ends)"
    )


def _naming(path: Path, read: Callable[[Path], Episodes]) -> Episodes:
    """Read, with the path in every error: `Episodes` refuses content without knowing where it came from."""
    try:
        return read(path)
    except DatasetError as error:
        if str(path) in str(error):
            raise
        raise DatasetError(f"{path}: {error}") from error
