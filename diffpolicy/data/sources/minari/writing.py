"""Episodes into Minari's registry, whole or not at all."""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from diffpolicy.data.environments import make, register
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources.minari.layout import COPIED, NUMBERS, ONE, PROVENANCE, flat, package, parts_of, registered
from diffpolicy.errors import DatasetError


def save(episodes: Episodes, name: str) -> None:
    """Write a dataset into minari's registry, whole or not at all, with our provenance in its metadata.

    Environment and spaces are those that `meta["env_id"]` makes here and now, where they hold the episodes' names and
    sizes; else there is no environment in the dataset, and the spaces are Boxes of the arrays' types: unbounded
    observations, and actions within the data's own range. Images are not packed. Where the observation after the last
    action is unknown, the one before stands in for it; our own reader knows, others do not.

    Raises:
        DatasetError: if the id is malformed or taken, or an array's name cannot stand in a file.
        MissingExtraError: if the `minari` package is not installed.
    """
    minari, path = package(f"minari:{name}"), registered(name)
    if path.exists():
        raise DatasetError(f"minari:{name} exists at {path}; give it another version, or minari delete {name}")
    if bad := [array for array in (*episodes.obs, *episodes.info) if "/" in array or array in ("", ".")]:
        raise DatasetError(f"the array name {bad[0]!r} cannot stand in a file of Minari; rename it without '/'")
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces

    spec, observation, action = _surroundings(episodes)
    temporary = path.parents[name.count("/")] / f".{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        storage = MinariStorage.new(temporary / "data", observation, action, spec, jpeg_encoding=False)
        storage.update_metadata(_written(episodes, name, minari.__version__))
        storage.update_episodes(_buffers(episodes, observation, action))
        namespace = name.rpartition("/")[0]
        if namespace and namespace not in list_local_namespaces():
            create_namespace(namespace)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _surroundings(episodes: Episodes) -> tuple[Any, spaces.Space, spaces.Space]:
    """Return the environment's spec, observation and action space; without the first where it does not fit."""
    env_id, kwargs = episodes.meta.get("env_id"), episodes.meta.get("env_kwargs") or {}
    if isinstance(env_id, str) and ":" not in env_id:  # what stands before a colon would be imported
        try:
            spec, observation, action = _make(env_id, kwargs)
            if _holds(observation, episodes.obs) and _holds(action, {ONE: episodes.action}):
                return spec, observation, action
        except Exception:  # environments fail to be made in many ways: their packages, versions, arguments
            pass
    boxes = {name: _box(array) for name, array in episodes.obs.items()}
    low, high = episodes.action.min(0), episodes.action.max(0)
    observation = boxes[ONE] if set(boxes) == {ONE} else spaces.Dict(boxes)
    return None, observation, spaces.Box(low, high, dtype=episodes.action.dtype.type)


def _make(env_id: str, kwargs: Mapping[str, Any]) -> tuple[Any, spaces.Space, spaces.Space]:
    register(env_id)
    spec = deepcopy(gymnasium.spec(env_id))
    spec.kwargs.update(kwargs)
    spec.to_json()  # raises where it cannot be written
    env = make(spec)
    env.close()
    return spec, env.observation_space, env.action_space


def _holds(space: spaces.Space, arrays: Mapping[str, np.ndarray]) -> bool:
    leaves = flat(space)
    return set(leaves) == set(arrays) and all(
        isinstance(leaf, NUMBERS)
        and math.prod(leaf.shape or ()) == math.prod(arrays[name].shape[1:])
        and np.can_cast(arrays[name].dtype, leaf.dtype)
        for name, leaf in leaves.items()
    )


def _box(array: np.ndarray) -> spaces.Space:
    shape, kind = array.shape[1:], array.dtype.kind
    if kind == "b":
        return spaces.MultiBinary(shape)
    limits = (-np.inf, np.inf) if kind == "f" else (np.iinfo(array.dtype).min, np.iinfo(array.dtype).max)
    return spaces.Box(*limits, shape, array.dtype.type)


def _written(episodes: Episodes, name: str, version: str) -> dict[str, Any]:
    """Return metadata as minari names them, and all that we know under a name of ours."""
    meta = dict(episodes.meta)
    known = {key: meta[key] for key in (*COPIED, "ref_min_score", "ref_max_score") if key in meta}
    authors = {key: set(known[key]) for key in ("author", "author_email") if isinstance(known.get(key), list)}
    unknown = np.flatnonzero(~np.asarray(episodes.has_final)).tolist()
    ours = {**meta, "unknown_final": unknown}
    return {**known, **authors, "dataset_id": name, "minari_version": version, PROVENANCE: ours}


def _buffers(episodes: Episodes, observation: spaces.Space, action: spaces.Space) -> Iterator[Any]:
    from minari.data_collector import EpisodeBuffer

    for i in range(len(episodes)):
        episode = episodes[i]
        ending = np.arange(len(episode)) == len(episode) - 1
        yield EpisodeBuffer(
            observations=_nested(observation, episode.obs),
            actions=_nested(action, {ONE: episode.action}),
            rewards=episode.reward,  # pyright: ignore[reportArgumentType]  # arrays are lists to its writer
            terminations=(ending & episode.terminated).tolist(),
            truncations=(ending & episode.truncated).tolist(),
            infos=dict(episode.info),
        )


def _nested(space: spaces.Space, arrays: Mapping[str, np.ndarray], name: str = "") -> Any:
    """Hang arrays into the structure of a space: the inverse of `flat`."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        array = arrays[name or ONE]
        return array.reshape(len(array), *(space.shape or ()))
    parts = {key: _nested(part, arrays, f"{name}.{shown}" if name else shown) for key, shown, part in parts_of(space)}
    return parts if isinstance(space, spaces.Dict) else tuple(parts.values())
