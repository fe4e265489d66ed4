"""Every array of a Minari dataset is looked at before minari decodes it: links, types, sizes, packed images."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
from gymnasium import spaces

from diffpolicy.data.sources import hdf5
from diffpolicy.data.sources.minari.layout import (
    METADATA,
    NUMBERS,
    ONE,
    Dataset,
    Declared,
    count,
    flat,
    is_jpeg,
    parts_of,
)
from diffpolicy.data.sources.reading import reading
from diffpolicy.errors import DatasetError

MAIN = "main_data.hdf5"
LAYOUT = "Minari's layout"

Look = dict[str, tuple[tuple[int, ...], np.dtype]]


def declared_hdf5(dataset: Dataset) -> Declared:
    """Look at every array that minari will decode, and at their links, before it does."""
    path, looks = dataset.folder / MAIN, []
    with hdf5.opened(path) as file:
        for i in range(dataset.episodes):
            looks.append(_look(path, hdf5.group(path, file, f"episode_{i}", LAYOUT), dataset))
    infos = [{name: array for name, array in look.items() if name.startswith("info/")} for look in looks]
    shared = {
        name.partition("/")[2]: (shape, np.result_type(*(episode[name][1] for episode in infos)))
        for name, (shape, _) in infos[0].items()
        if all(name in episode and episode[name][0] == shape for episode in infos)
    }
    return Declared(
        length=np.array([look["reward"][0][0] for look in looks], dtype=np.int64),
        dtypes={name: np.result_type(*{look[name][1] for look in looks}) for name in looks[0] if name not in infos[0]},
        infos=shared,
    )


def _look(path: Path, episode: h5py.Group, dataset: Dataset) -> Look:
    """Return shape and type of an episode's arrays; of infos, the shape of one row."""
    rewards = hdf5.dataset(path, episode, "rewards", LAYOUT)
    if rewards.size != len(rewards):
        raise DatasetError(f"{path}: {rewards.name} has shape {rewards.shape}; wanted one number a step")
    steps = len(rewards)
    flags = [hdf5.dataset(path, episode, name, LAYOUT) for name in ("terminations", "truncations")]
    hdf5.check_rows(path, flags, steps, "as many as rewards")
    found: Look = {"reward": (rewards.shape, rewards.dtype)}
    for name, item in _look_at_space(path, episode, "observations", dataset.observation_space, steps + 1, dataset):
        found[f"obs/{name or ONE}"] = (item.shape, np.dtype(np.uint8) if item.dtype.kind == "O" else item.dtype)
    ((_, actions),) = _look_at_space(path, episode, "actions", dataset.action_space, steps, dataset)
    found["action"] = (actions.shape, actions.dtype)
    if "infos" in episode:
        for name, item in _look_at_infos(path, hdf5.group(path, episode, "infos", LAYOUT), steps):
            found[f"info/{name}"] = (item.shape[1:], item.dtype)
    return found


def _look_at_space(
    path: Path, parent: h5py.Group, key: str, space: spaces.Space, rows: int, dataset: Dataset, name: str = ""
) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield the arrays of a space by their dotted names, after checking that they are what it says."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        group = hdf5.group(path, parent, key, LAYOUT)
        parts = parts_of(space)
        if set(group) != {inner for inner, _, _ in parts}:
            raise DatasetError(f"{path}: {group.name} has {sorted(group)} and its space {sorted(p[0] for p in parts)}")
        for inner, shown, part in parts:
            yield from _look_at_space(
                path, group, inner, part, rows, dataset, f"{name}.{shown}" if name else str(shown)
            )
        return
    if isinstance(space, NUMBERS) and not is_jpeg(dataset, space):
        item = hdf5.dataset(path, parent, key, LAYOUT)
        if item.shape[1:] != space.shape:
            raise DatasetError(f"{path}: {item.name} has rows of {item.shape[1:]} and its space says {space.shape}")
    else:
        item = _packed(path, parent, key)
        if isinstance(space, NUMBERS) and len(item):
            _check_size(path, item, space)
    hdf5.check_rows(path, [item], rows, "as its rewards ask for")
    yield name, item


def _plain(path: Path, parent: h5py.Group, key: str) -> h5py.Dataset:
    """Return an array of any type that lies in this file."""
    item = parent[key] if isinstance(parent.get(key, getlink=True), h5py.HardLink) else None
    if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
        raise DatasetError(f"{path}: {parent.name}/{key} is no array of this file; wanted one whole file: repack it")
    return item


def _packed(path: Path, parent: h5py.Group, key: str) -> h5py.Dataset:
    """Return texts or packed images: rows of bytes, of one length or each of its own."""
    item = _plain(path, parent, key)
    if item.dtype.kind == "u":
        return hdf5.dataset(path, parent, key, LAYOUT)
    text = h5py.check_string_dtype(item.dtype) or h5py.check_vlen_dtype(item.dtype) == np.uint8
    if not text or len(item.shape) != 1:
        raise DatasetError(f"{path}: {item.name} holds neither numbers nor text; wanted {LAYOUT}: write it again")
    return item


def _check_size(path: Path, item: h5py.Dataset, space: spaces.Space) -> None:
    """Refuse packed images of another size than their space's, before they are unpacked."""
    from PIL import Image

    width, height = Image.open(BytesIO(np.asarray(item[0]).tobytes())).size
    if (height, width) != tuple(space.shape or ())[:2]:
        raise DatasetError(f"{path}: {item.name} has images of {height} x {width} and its space says {space.shape}")


def _look_at_infos(path: Path, group: h5py.Group, steps: int, name: str = "") -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield the numbers of T or T+1 rows; minari decodes all infos, so each of them is looked at."""
    for key in map(str, group):
        shown = f"{name}.{key}" if name else key
        plain = isinstance(group.get(key, getlink=True), h5py.HardLink)
        if plain and group.get(key, getclass=True) is h5py.Group:
            yield from _look_at_infos(path, hdf5.group(path, group, key, LAYOUT), steps, shown)
            continue
        item = _plain(path, group, key)
        if item.dtype.kind in "fiub" and item.shape:
            if len(hdf5.dataset(path, group, key, LAYOUT)) in (steps, steps + 1):
                yield shown, item
        elif item.shape and len(_packed(path, group, key)) > steps + 1:
            raise DatasetError(f"{path}: {item.name} has {len(item)} texts for {steps} steps; write it again")


def declared_arrow(dataset: Dataset) -> Declared:
    """Count the rows that the files of each episode declare; infos are those of the first one."""
    import pyarrow.dataset

    hidden, length = ["_", ".", METADATA], []
    with reading(dataset.folder, "its episodes"):
        for i, told in enumerate(dataset.storage.get_episode_metadata(range(dataset.episodes))):
            files = pyarrow.dataset.dataset(str(dataset.folder / str(i)), format=dataset.format, ignore_prefixes=hidden)
            length.append(count(told, "total_steps"))
            if (rows := files.count_rows()) != length[-1] + 1:
                raise DatasetError(f"episode {i} has {rows} rows of observations and {length[-1]} steps; copy it again")
        first = flat(next(iter(dataset.storage.get_episodes([0])))["infos"] or {})
    arrays = {name: np.asarray(values) for name, values in first.items()}
    rows = (length[0], length[0] + 1)
    return Declared(
        length=np.array(length, dtype=np.int64),
        dtypes={
            "reward": np.dtype(np.float64),
            "action": np.dtype(dataset.action_space.dtype),
            **{f"obs/{name}": np.dtype(space.dtype) for name, space in dataset.observed.items()},
        },
        infos={
            name: (array.shape[1:], array.dtype)
            for name, array in arrays.items()
            if array.dtype.kind in "fiub" and array.shape[:1] and len(array) in rows
        },
    )
