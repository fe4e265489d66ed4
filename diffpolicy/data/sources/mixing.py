"""Mixtures: several datasets as one, each with its share of the training windows.

a.hdf5+b.hdf5              every window alike
a.hdf5@0.8+b.hdf5@0.2      eight windows in ten from the first, whatever their sizes
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffpolicy.data.episodes import Episodes, concatenate
from diffpolicy.errors import DatasetError


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture, and its share if one was given."""

    dataset: str
    share: float | None = None


def split_mixture(text: str) -> list[Part]:
    """Split `a@0.8+b@0.2`; a name that is a path as it stands is one dataset, with any `+` or `@` in it.

    Raises:
        DatasetError: if a share is no number above 0, or some have one and others not.
    """
    if Path(text).exists():
        return [Part(text)]
    parts = [_part(name) for name in text.split("+")]
    if len({part.share is None for part in parts}) > 1:
        raise DatasetError(f"{text!r} gives some of its datasets a share and others none; give one to each, or to none")
    return parts


def _part(text: str) -> Part:
    name, at, share = text.rpartition("@")
    if not at or Path(text).exists():
        return Part(text)
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise DatasetError(f"the share of {name!r} is {share!r}; wanted a number above 0, as in {name}@0.5")
    return Part(name, value)


def mix(parts: Sequence[tuple[Episodes, Part]]) -> Episodes:
    """Join datasets; the windows of each together have its share.

    Raises:
        DatasetError: if their observations or actions differ in names or sizes.
    """
    first, (_, named) = parts[0][0], parts[0]
    for episodes, part in parts[1:]:
        for what, a, b in (("observations", _sizes(first), _sizes(episodes)), ("actions", *_actions(first, episodes))):
            if a != b:
                raise DatasetError(f"{named.dataset} has {what} {a} and {part.dataset} {b}; mix datasets of one kind")
    joined = concatenate([episodes for episodes, _ in parts])
    meta = {"mixture": [{"dataset": p.dataset, "share": p.share, "meta": dict(e.meta)} for e, p in parts]}
    common = {k: v for k, v in first.meta.items() if all(e.meta.get(k) == v for e, _ in parts)}
    weight = None
    if parts[0][1].share is not None:
        weight = np.concatenate([np.full(len(e), (p.share or 1.0) / e.steps) for e, p in parts])
    return replace(joined, weight=weight, meta={**common, **meta})


def _sizes(episodes: Episodes) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in sorted(episodes.obs.items())}


def _actions(a: Episodes, b: Episodes) -> tuple[int, int]:
    return a.action.shape[1], b.action.shape[1]
