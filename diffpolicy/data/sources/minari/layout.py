"""What a Minari dataset's metadata declare, and how nested spaces become named arrays: `camera.pose`, `hand.0`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from diffpolicy.errors import DatasetError, MissingExtraError

METADATA = "metadata.json"
ONE = "obs"
NUMBERS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
PROVENANCE = "diffpolicy"
COPIED = ("algorithm_name", "author", "author_email", "code_permalink", "description", "requirements")


@dataclass(frozen=True)
class Dataset:
    """What a dataset's metadata declare."""

    folder: Path
    metadata: Mapping[str, Any]
    format: str
    episodes: int
    steps: int
    observation_space: spaces.Space
    action_space: spaces.Box
    observed: Mapping[str, spaces.Space]
    unknown_final: list[int]
    storage: Any


@dataclass(frozen=True)
class Declared:
    """What is known of the arrays before one is read: steps `(E,)`, types by name, infos as shape and type."""

    length: np.ndarray
    dtypes: Mapping[str, np.dtype]
    infos: Mapping[str, tuple[tuple[int, ...], np.dtype]]


def package(what: str) -> Any:
    """Return the package `minari`, which `what` needs."""
    try:
        import minari
    except ImportError as error:
        raise MissingExtraError(f"{what} needs the minari package; pip install 'diffpolicy[minari]'") from error
    return minari


def registered(name: str) -> Path:
    """Return where the registry keeps, or would keep, the dataset of an id."""
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage import get_dataset_path

    try:
        parse_dataset_id(name)
    except (ValueError, TypeError) as error:  # without a version it is a TypeError
        raise DatasetError(f"{name!r} is no id of Minari; wanted one such as D4RL/door/human-v2") from error
    return get_dataset_path(name)


def count(metadata: Mapping[str, Any], name: str) -> int:
    """Return a number of at least 1 from the metadata."""
    value = metadata.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DatasetError(f"its metadata say {name} is {value!r}; wanted a whole number of at least 1")
    return value


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Name what hangs in nested mappings and tuples, of spaces or of values, by their keys joined with dots."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, (tuple, spaces.Tuple)):
        items = list(enumerate(tree))
    else:
        return {prefix or ONE: tree}
    found: dict[str, Any] = {}
    for key, part in items:
        inner = flat(part, f"{prefix}.{key}" if prefix else str(key))
        if twice := set(inner) & set(found):
            raise DatasetError(f"two of its arrays would both be called {twice.pop()!r}; rename one")
        found |= inner
    return found


def parts_of(space: spaces.Dict | spaces.Tuple) -> list[tuple[str, str, spaces.Space]]:
    """Key in the file, name shown, and space of each part."""
    if isinstance(space, spaces.Dict):
        return [(key, key, part) for key, part in space.items()]
    return [(f"_index_{i}", str(i), part) for i, part in enumerate(space)]


def is_jpeg(dataset: Dataset, space: spaces.Space) -> bool:
    """Whether images of this space are packed in the file."""
    from minari.dataset.minari_storage import is_image_space

    return dataset.storage.jpeg_encoding and is_image_space(space)
