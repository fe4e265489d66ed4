"""`d4rl:hopper-medium-v2`: D4RL's datasets by name, through its own package: its table, its download, its cache folder.

    name --d4rl.infos.DATASET_URLS--> address --d4rl.offline_env--> ~/.d4rl/datasets/<file>.hdf5 --d4rl.py--> Episodes

The package's `__init__` imports every simulator that D4RL ever used, the dead `mujoco_py` among them, and each may
fail. Only two of its modules are needed, and neither imports another: they are executed by themselves. A D4RL that the
caller has imported is used as it is, with the folder of its `d4rl.set_dataset_path`.

A file of these datasets that is on the disk already is read by its path, without the package.

AntMaze's ends are held against D4RL's own test of them (`scripts/check_antmaze_datasets.py`), which v0 fails: no ant
moves by more than 5 between two steps of an episode.
"""

import difflib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from io import StringIO
from pathlib import Path
from types import ModuleType

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import d4rl
from diffpolicy.data.sources.reading import Wanted
from diffpolicy.errors import DatasetError, MissingExtraError, first_line

NEAREST = 3
ANTMAZE = "antmaze"
JUMP = 5.0


def load(name: str, wanted: Wanted) -> Episodes:
    """Read one of D4RL's datasets, downloading it where its cache folder does not have it.

    `meta` gets the name as `dataset`, and as `reference` where D4RL has reference scores of it.

    Raises:
        DatasetError: if D4RL knows no such dataset, it cannot be downloaded, or is refused by our reader.
        MissingExtraError: if the package, or what those two modules import, is not installed.
    """
    with _quiet():
        infos, offline_env = _module("infos"), _module("offline_env")
    address = _address(infos.DATASET_URLS, name)
    path = Path(offline_env.filepath_from_url(address))
    with _whole(path, address), redirect_stdout(sys.stderr):
        offline_env.download_dataset_from_url(address)
    episodes = d4rl.load(path, wanted)
    if name.startswith(ANTMAZE):
        _warn_of_jumps(name, episodes)
    reference = {"reference": name} if name in infos.REF_MIN_SCORE else {}
    return replace(episodes, meta={**episodes.meta, "source": "d4rl", "dataset": name, **reference})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the old gym prints about itself from the screen."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


def _module(name: str) -> ModuleType:
    try:
        if sys.modules.get("d4rl") is not None:
            return import_module(f"d4rl.{name}")
        package = find_spec("d4rl")
        spec = package and PathFinder.find_spec(f"d4rl.{name}", package.submodule_search_locations)
        if spec is None or spec.loader is None:
            raise ImportError(f"no module d4rl.{name}")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise MissingExtraError(
            f"datasets by D4RL's names need the d4rl package ({first_line(error)}); pip install 'diffpolicy[d4rl]', or "
            "give the path of a downloaded HDF5 file, which is read without it"
        ) from error


def _warn_of_jumps(name: str, episodes: Episodes) -> None:
    """Say so where an ant is elsewhere within an episode, since its start anew is not marked."""
    moved = np.linalg.norm(np.diff(episodes.obs["obs"][:, :2], axis=0), axis=1)
    moved[episodes.start[1:] + np.arange(len(episodes) - 1)] = 0  # from one episode to the next
    if jumps := np.count_nonzero(moved > JUMP):
        warnings.warn(
            f"{name}: in {jumps} of {episodes.steps} steps the ant jumps within its episode: its timeouts are out of "
            "step, as D4RL's issue 77 tells of v0; take v2",
            stacklevel=5,
        )


def _address(addresses: Mapping[str, str], name: str) -> str:
    if name not in addresses:
        near = difflib.get_close_matches(name, addresses, NEAREST, cutoff=0.0)
        raise DatasetError(f"D4RL has no dataset {name!r}; the nearest names are {', '.join(near)}")
    return addresses[name]


@contextmanager
def _whole(path: Path, address: str) -> Iterator[None]:
    """Leave no part of a file behind where a download fails: D4RL would take it for the whole next time."""
    cached = path.exists()
    try:
        yield
    except BaseException as error:
        if not cached:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DatasetError(
                f"{address} could not be downloaded ({first_line(error)}); try again, or place the file at {path}"
            ) from error
        raise
