"""Minari's datasets, in its local registry or by the path of a dataset's folder; written as well as read.

    door/human-v2/data/
      metadata.json      sizes, spaces, the environment's spec, authors, reference scores
      main_data.hdf5     episode_<i>/  observations (T+1 rows), actions, rewards, terminations, truncations (T), infos
      <i>/*.arrow        instead of it, where data_format is arrow or parquet

Nested observations get names joined by dots (`camera.pose`, `hand.0`), a single one is `obs`. Of `infos`, numbers that
every episode has are kept; where they have T+1 rows the first, of the reset, is left out: row i is what step i told.
An episode that ends with neither flag counts as truncated, its recording stopped. Episodes are decoded by minari, one
at a time, after the file was looked at. The environment that a file names is never made to read it: without spaces in
its metadata minari would do that, and here such a dataset is refused.

Actions that are a Dict or a Tuple are refused: flattened, a policy's actions would fit no environment.
"""

import json
import math
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources.minari.checks import declared_arrow, declared_hdf5
from diffpolicy.data.sources.minari.layout import (
    COPIED,
    METADATA,
    NUMBERS,
    PROVENANCE,
    Dataset,
    Declared,
    count,
    flat,
    package,
    registered,
)
from diffpolicy.data.sources.minari.writing import save
from diffpolicy.data.sources.reading import IMAGE_AXES, Layout, Wanted, assemble, reading
from diffpolicy.errors import DatasetError, MissingExtraError, first_line

METADATA_BYTES = 64 << 20

__all__ = ["load", "load_registered", "recognises", "save"]


def recognises(path: Path) -> bool:
    """Whether the path is the folder of a Minari dataset, or its `data`."""
    metadata = _folder(path) / METADATA
    if not metadata.is_file():
        return False
    with metadata.open("rb") as file:
        return b'"data_format"' in file.read(METADATA_BYTES)


def load_registered(name: str, wanted: Wanted) -> Episodes:
    """Read a dataset by its id, downloaded by minari where it is not on this machine.

    Raises:
        DatasetError: as `load`, or if it is not there and cannot be downloaded.
        MissingExtraError: if the `minari` package is not installed.
    """
    minari, path = package(f"minari:{name}"), registered(name)
    if not recognises(path):
        try:
            with redirect_stdout(sys.stderr):
                minari.download_dataset(name)
        except Exception as error:  # of the network, its client or minari
            raise DatasetError(
                f"the dataset {name} is not on this machine and could not be downloaded ({first_line(error)}); check "
                f"its id, or run minari download {name} where there is a network"
            ) from error
    if not recognises(path):
        raise DatasetError(f"{path} holds no dataset; remove that folder and run minari download {name}")
    return load(path, wanted)


def load(path: Path, wanted: Wanted) -> Episodes:
    """Read the folder of a dataset.

    Raises:
        DatasetError: if its metadata lack the spaces, its actions are not continuous, or its arrays do not fit both.
        MissingExtraError: if the `minari` package is not installed, or one that the data's format needs.
    """
    wanted.refuse_part_and_task("a Minari dataset")
    package(str(path))
    dataset = _open(_folder(path))
    names = wanted.choose({name: _shown(space) for name, space in dataset.observed.items()})
    declared = declared_hdf5(dataset) if dataset.format == "hdf5" else declared_arrow(dataset)
    if (steps := int(declared.length.sum())) != dataset.steps:
        raise DatasetError(
            f"its episodes have {steps} steps and its metadata say {dataset.steps}; wanted as many: copy it again"
        )
    arrays = wanted.allocate(_layout(dataset, declared, names))
    terminated, truncated = _fill(dataset, declared, arrays, names)
    has_final = np.ones(dataset.episodes, dtype=bool)
    has_final[dataset.unknown_final] = False
    return assemble(arrays, declared.length, terminated, truncated, has_final, _meta(path, dataset.metadata))


def _folder(path: Path) -> Path:
    return path / "data" if (path / "data" / METADATA).is_file() else path


def _open(folder: Path) -> Dataset:
    from minari.dataset._storages import get_minari_storage, get_storage_keys

    metadata = _metadata(folder)
    kind = metadata.get("data_format")
    if kind not in get_storage_keys():
        raise DatasetError(f"its data_format is {kind!r}; wanted one of {', '.join(get_storage_keys())}")
    observation, action = (_space(metadata, f"{name}_space") for name in ("observation", "action"))
    jpeg = bool(metadata.get("jpeg_encoding", True))
    try:
        with reading(folder, "its storage"):
            storage = get_minari_storage(kind)(folder, observation, action, jpeg_encoding=jpeg)
    except DatasetError as error:
        if isinstance(error.__cause__, ImportError):
            raise MissingExtraError(f"{folder} is stored as {kind}; pip install 'minari[{kind}]'") from error
        raise
    return Dataset(
        folder=folder,
        metadata=metadata,
        format=kind,
        episodes=count(metadata, "total_episodes"),
        steps=count(metadata, "total_steps"),
        observation_space=observation,
        action_space=_continuous(action),
        observed={name: space for name, space in flat(observation).items() if isinstance(space, NUMBERS)},
        unknown_final=_unknown_final(metadata),
        storage=storage,
    )


def _metadata(folder: Path) -> dict[str, Any]:
    from minari import supported_dataset_versions

    file = folder / METADATA
    if file.stat().st_size > METADATA_BYTES:
        raise DatasetError(f"{file} has {file.stat().st_size} bytes, which no metadata have; do not trust it")
    with reading(file, "the metadata"):
        metadata = dict(json.loads(file.read_text()))
    if (written_by := metadata.get("minari_version")) not in supported_dataset_versions:
        raise DatasetError(
            f"it was written by minari {written_by}; the one installed reads {min(supported_dataset_versions)} to "
            f"{max(supported_dataset_versions)}: update minari, or download the dataset again"
        )
    return metadata


def _space(metadata: Mapping[str, Any], name: str) -> spaces.Space:
    """Return a declared space; its bounds must stand in the metadata, so they take no more memory than those."""
    from minari.serialization import deserialize_space

    text = metadata.get(name)
    if not isinstance(text, str):
        raise DatasetError(
            f"its metadata hold no {name}, and the environment that a file names is not executed to ask; write the "
            "dataset again with its spaces"
        )
    with reading(Path(METADATA), name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bounds that float32 rounds
        _check_bounds(json.loads(text), len(text))
        return deserialize_space(text)


def _check_bounds(declared: Any, characters: int) -> None:
    parts = declared.get("subspaces", ())
    for part in parts.values() if isinstance(parts, dict) else parts:
        _check_bounds(part, characters)
    if (declared["type"] == "Box") and math.prod(declared["shape"]) > characters:
        raise DatasetError(f"its metadata declare a space of shape {declared['shape']} without its bounds")


def _continuous(space: spaces.Space) -> spaces.Box:
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        raise DatasetError(
            f"its actions are a {type(space).__name__} of {len(space.spaces)} parts; wanted one Box: flattened, a "
            "policy's actions would fit no environment, so record it with the actions flat"
        )
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise DatasetError(f"its actions are {space}; wanted continuous ones: discrete actions are not supported")
    return space


def _unknown_final(metadata: Mapping[str, Any]) -> list[int]:
    """Episodes without a recorded last observation: `save` notes them, Minari itself has none."""
    numbers = (metadata.get(PROVENANCE) or {}).get("unknown_final", [])
    if not all(isinstance(i, int) and 0 <= i < metadata["total_episodes"] for i in numbers):
        raise DatasetError(f"its metadata name episodes {numbers[:5]}... without a last observation; there are none")
    return numbers


def _shown(space: spaces.Space) -> tuple[int, ...]:
    """Shape of one observation; grey images get an axis, which tells them from tables of numbers."""
    from minari.dataset.minari_storage import is_image_space

    shape = _shape(space)
    return (*shape, 1) if len(shape) == 2 and is_image_space(space) else shape


def _shape(space: spaces.Space) -> tuple[int, ...]:
    """Shape of one row: images keep theirs, all else is flat."""
    from minari.dataset.minari_storage import is_image_space

    shape = tuple(space.shape or ())
    return shape if len(shape) >= IMAGE_AXES or is_image_space(space) else (math.prod(shape),)


def _layout(dataset: Dataset, declared: Declared, names: list[str]) -> Layout:
    n, reward = int(declared.length.sum()), declared.dtypes["reward"]
    layout = {}
    for name in names:
        shape, dtype = _shape(dataset.observed[name]), declared.dtypes[f"obs/{name}"]
        if len(shape) >= IMAGE_AXES and dtype != np.uint8:
            raise DatasetError(f"the images {name!r} have type {dtype}; wanted uint8, 0 to 255: rescale them")
        layout[f"obs/{name}"] = ((n + dataset.episodes, *shape), dtype)
    layout["action"] = ((n, math.prod(dataset.action_space.shape)), declared.dtypes["action"])
    layout["reward"] = ((n,), reward if reward.kind == "f" else np.result_type(reward, np.float32))
    return layout | {f"info/{name}": ((n, *shape), dtype) for name, (shape, dtype) in declared.infos.items()}


def _fill(
    dataset: Dataset, declared: Declared, arrays: dict[str, np.ndarray], names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Copy one episode after another as minari decodes them; return who was terminated, and who truncated."""
    ends = np.cumsum(declared.length)
    terminated, truncated = np.zeros((2, dataset.episodes), dtype=bool)
    decoded = dataset.storage.get_episodes(range(dataset.episodes))
    for i in range(dataset.episodes):
        with reading(dataset.folder, f"episode {i}"):
            episode = next(decoded)
            rows = slice(int(ends[i] - declared.length[i]), int(ends[i]))
            terminated[i], truncated[i] = _ends(i, episode, rows.stop - rows.start)
            observed, infos = flat(episode["observations"]), flat(episode["infos"] or {})
            for name in names:
                _put(arrays[f"obs/{name}"][rows.start + i : rows.stop + i + 1], observed[name])
            _put(arrays["action"][rows], episode["actions"])
            _put(arrays["reward"][rows], episode["rewards"])
            for name in declared.infos:
                _put(arrays[f"info/{name}"][rows], infos[name][-(rows.stop - rows.start) :])
    return terminated, truncated


def _put(out: np.ndarray, values: Any) -> None:
    out[...] = np.asarray(values).reshape(out.shape)


def _ends(i: int, episode: Mapping[str, Any], steps: int) -> tuple[bool, bool]:
    terminations, truncations = (np.asarray(episode[name]).astype(bool) for name in ("terminations", "truncations"))
    if terminations.shape != (steps,) or truncations.shape != (steps,):
        raise DatasetError(f"episode {i} has {len(terminations)} steps and declares {steps}; copy the dataset again")
    if terminations[:-1].any():
        first = int(np.argmax(terminations))
        raise DatasetError(f"episode {i} is terminated at step {first} of {steps} and goes on; split it there")
    return bool(terminations[-1]), bool(truncations[-1] or not terminations[-1])


def _meta(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    provenance = {k: v for k, v in (metadata.get(PROVENANCE) or {}).items() if k != "unknown_final"}
    told = {name: metadata.get(name) for name in ("dataset_id", "minari_version", "combined_datasets", *COPIED)}
    scores = {name: _number(metadata.get(name)) for name in ("ref_min_score", "ref_max_score")}
    made = _spec(metadata, "env_spec", "env_id", "env_kwargs") | _spec(
        metadata, "eval_env_spec", "eval_env_id", "eval_env_kwargs"
    )
    known = {name: value for name, value in (told | scores | made).items() if value is not None}
    return {**provenance, **known, "source": "minari", "file": path.name}


def _spec(metadata: Mapping[str, Any], name: str, env_id: str, env_kwargs: str) -> dict[str, Any]:
    """Return id and arguments of a declared environment; it is read as text, and nothing it names is imported."""
    if not isinstance(metadata.get(name), str):
        return {}
    with reading(Path(METADATA), name):
        spec = json.loads(metadata[name])
        return {env_id: str(spec["id"]), env_kwargs: dict(spec.get("kwargs") or {})}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
