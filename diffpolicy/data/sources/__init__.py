"""One way in: `load` finds the format by content and returns `Episodes`; and one way out, `save`.

demos/                     our store              demos.hdf5     D4RL's layout, or robomimic's
pusht.zarr, pusht.zarr.zip a replay buffer        data.npz       OGBench
a LeRobot dataset's folder, v2.1 or v3.0          a Minari dataset's folder
minari:D4RL/door/human-v2, d4rl:hopper-medium-v2, ogbench:cube-single-play-v0      through their packages
a.hdf5+b.hdf5, a.hdf5@0.8+b.hdf5@0.2              several as one, with their shares of the training windows
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from diffpolicy.data import store
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import d4rl, d4rl_registry, lerobot, minari, ogbench, robomimic, zarr
from diffpolicy.data.sources.mixing import mix, split_mixture
from diffpolicy.data.sources.reading import Wanted, in_memory
from diffpolicy.errors import DatasetError

MINARI = "minari:"
HDF5 = (".hdf5", ".h5")

Read = Callable[[Path, Wanted], Episodes]

FORMATS: tuple[tuple[Callable[[Path], bool], Read], ...] = (
    (store.is_store, lambda path, wanted: store.load(path, wanted.obs)),
    (zarr.recognises, zarr.load),
    (d4rl.recognises, d4rl.load),
    (robomimic.recognises, robomimic.load),
    (ogbench.recognises, ogbench.load),
    (lerobot.recognises, lerobot.load),
    (minari.recognises, minari.load),
)
REGISTRIES: dict[str, Callable[[str, Wanted], Episodes]] = {
    "d4rl": d4rl_registry.load,
    "minari": minari.load_registered,
    "ogbench": ogbench.load_named,
}


def load(
    dataset: str | Path,
    obs: Sequence[str] | None = None,
    part: str | None = None,
    task: str | None = None,
    max_bytes: int | None = None,
) -> Episodes:
    """Load offline data of any format that this module names.

    Args:
        dataset: path, `minari:`, `d4rl:` or `ogbench:` name, or several joined by `+`.
        obs: names of the observations to read; all but images if None.
        part: a named part of the dataset, such as robomimic's `train`.
        task: the task whose rewards are asked for, of datasets without rewards of their own (OGBench).
        max_bytes: largest dataset to hold in memory, half of the free memory if None. Stores of ours stay on disk.

    Raises:
        DatasetError: if there is nothing of that name, its format is unknown, or its content cannot be right.
        MissingExtraError: if reading the format needs a package that is not installed.
    """
    wanted = Wanted(obs, part, task, in_memory(max_bytes))
    parts = split_mixture(str(dataset))
    if len(parts) == 1:
        return read(parts[0].dataset, wanted)
    return mix([(read(p.dataset, wanted), p) for p in parts])


def read(dataset: str, wanted: Wanted) -> Episodes:
    """Read one dataset, with its name in every error: `Episodes` refuses content without knowing where it came from."""
    registry, _, name = dataset.partition(":")
    try:
        if registry in REGISTRIES:
            return REGISTRIES[registry](name, wanted)
        return _format_of(Path(dataset))(Path(dataset), wanted)
    except DatasetError as error:
        if dataset in str(error):
            raise
        raise DatasetError(f"{dataset}: {error}") from error


def _format_of(path: Path) -> Read:
    if not path.exists():
        raise DatasetError(f"there is no dataset at {path}; check the path")
    for recognises, read_format in FORMATS:
        if recognises(path):
            return read_format
    raise DatasetError(
        f"{path} is no format this version knows; wanted a diffpolicy store (a folder with episodes.json), an HDF5 "
        "file of D4RL's or robomimic's layout, a zarr replay buffer (data/ and meta/episode_ends), OGBench's npz, or "
        "the folder of a LeRobot or Minari dataset"
    )


def is_hdf5(out: str | Path) -> bool:
    """Whether `save` writes D4RL's layout under this name."""
    return str(out).endswith(HDF5)


def save(episodes: Episodes, out: str | Path) -> None:
    """Write a dataset: D4RL's layout where the name ends in `.hdf5`, through Minari for `minari:<id>`, else a store.

    Raises:
        DatasetError: if the format cannot hold these episodes, or the disk is full.
        MissingExtraError: if writing the format needs a package that is not installed.
    """
    try:
        if str(out).startswith(MINARI):
            minari.save(episodes, str(out).removeprefix(MINARI))
        elif is_hdf5(out):
            d4rl.save(episodes, Path(out))
        else:
            store.save(episodes, out)
    except OSError as error:
        raise DatasetError(f"{out} could not be written ({error}); free some space, or give another path") from error


def check_writable(out: str | Path) -> None:
    """Refuse a name that `save` would refuse, before anything takes time.

    Raises:
        DatasetError: if something else than a dataset of that format stands there.
    """
    if str(out).startswith(MINARI):
        return
    path, file = Path(out), is_hdf5(out)
    if path.exists() and not (path.is_file() if file else store.is_store(path)):
        raise DatasetError(f"{out} exists and is not a dataset of ours; give another path or remove it")


def convert(dataset: str | Path, out: str | Path, wanted: Wanted) -> Episodes:
    """Write a dataset in another format; into a store, block by block, without holding it in memory.

    Raises:
        DatasetError: as `load` and `save`.
    """
    if str(out).startswith(MINARI) or is_hdf5(out):
        episodes = read(str(dataset), wanted)
        save(episodes, out)
        return episodes
    with store.writing(out) as folder:
        folder.finish(read(str(dataset), replace(wanted, allocate=folder.allocate)))
    return store.load(out)
