"""What every reader shares: what is wanted, where the arrays go, and how rows become episodes.

    declared sizes --check--> layout --allocate--> empty arrays --fill, block by block--> Episodes

A reader works out the shape of everything from the file's declarations, and checks them against the episodes' ends,
before anything is allocated. Where the arrays then live is the caller's choice: memory, within a limit, or the files
of a new store, so that conversion never holds a dataset in memory.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.errors import DatasetError, MissingExtraError, first_line

BLOCK_BYTES = 16 << 20
IMAGE_AXES = 3

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and type by name: `obs/<name>`, `action`, `reward`, `info/<name>`."""

Allocate = Callable[[Layout], dict[str, np.ndarray]]


def free_memory() -> int:
    """Bytes that can be taken without swapping; 8 GiB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 8 << 30


def size_of(layout: Layout) -> int:
    """Bytes of the arrays of a layout."""
    return sum(int(np.prod(shape, dtype=object)) * dtype.itemsize for shape, dtype in layout.values())


def in_memory(max_bytes: int | None = None) -> Allocate:
    """Return an `Allocate` that makes arrays in memory, at most `max_bytes` of them (half of the free memory)."""

    def allocate(layout: Layout) -> dict[str, np.ndarray]:
        limit, total = free_memory() // 2 if max_bytes is None else max_bytes, size_of(layout)
        if total > limit:
            largest = max(layout, key=lambda name: size_of({name: layout[name]}))
            raise DatasetError(
                f"the dataset declares {total / 1e9:.3g} GB, most of it in {largest}, and {limit / 1e9:.3g} GB may be "
                "taken; convert it to a store with diffpolicy convert, read fewer observations, or raise max_bytes"
            )
        return {name: np.empty(shape, dtype) for name, (shape, dtype) in layout.items()}

    return allocate


@dataclass(frozen=True)
class Wanted:
    """What to read of a dataset.

    Args:
        obs: names of the observations; all but images if None.
        part: a named part of the dataset (robomimic's filter keys such as `train`), all of it if None.
        task: the task whose rewards are asked for, of datasets without rewards of their own (OGBench).
        allocate: where the arrays go.
    """

    obs: Sequence[str] | None = None
    part: str | None = None
    task: str | None = None
    allocate: Allocate = field(default_factory=in_memory)

    def choose(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Names of the observations to read, of those there are `{name: shape of one}`.

        Raises:
            DatasetError: if one is not there, or there are none but images and none was asked for.
        """
        if self.obs is not None:
            if missing := [name for name in self.obs if name not in shapes]:
                raise DatasetError(f"there is no observation {missing[0]!r}; the dataset has {sorted(shapes)}")
            return list(self.obs)
        names = sorted(name for name, shape in shapes.items() if len(shape) < IMAGE_AXES)
        if not shapes:
            raise DatasetError("the dataset has no observations; wanted at least one named array beside the actions")
        if not names:
            raise DatasetError(f"the dataset has no observations but images {sorted(shapes)}; name those wanted")
        return names

    def refuse_part_and_task(self, what: str) -> None:
        """Refuse what a format does not have."""
        if self.part is not None:
            raise DatasetError(f"part {self.part!r} was asked for; {what} has no named parts: leave it out")
        if self.task is not None:
            raise DatasetError(f"task {self.task!r} was asked for; {what} has its own rewards or none: leave it out")


def blocks(rows: int, row_bytes: int, multiple_of: int = 1) -> Iterator[slice]:
    """Split rows into slices of about 16 MiB, of whole chunks of the file where it has chunks."""
    size = max(BLOCK_BYTES // max(row_bytes, 1), 1)
    size = max(size // multiple_of, 1) * multiple_of
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def row_bytes(array: Any) -> int:
    """Bytes of one row of anything with `shape` and `dtype`."""
    return int(np.prod(array.shape[1:])) * np.dtype(array.dtype).itemsize


def copy_rows(out: np.ndarray, read: Callable[[slice], np.ndarray], multiple_of: int = 1) -> None:
    """Copy rows block by block."""
    for rows in blocks(len(out), row_bytes(out), multiple_of):
        out[rows] = read(rows)


def copy_observations(
    out: np.ndarray,
    ends: np.ndarray,
    read: Callable[[slice], np.ndarray],
    read_next: Callable[[slice], np.ndarray] | None = None,
    multiple_of: int = 1,
) -> None:
    """Copy N rows of E episodes into `out`, N+E rows, each episode followed by what came after its last action.

    Args:
        out: `(N+E, ...)`.
        ends: row after the last one of each episode, `(E,)`.
        read: rows of a slice.
        read_next: rows of a slice of what followed each row; None repeats the last observation of an episode.
        multiple_of: rows of one chunk of the file.
    """
    total, last = int(ends[-1]), ends - 1
    for rows in blocks(total, row_bytes(out), multiple_of):
        block, numbers = read(rows), np.arange(rows.start, rows.stop)
        out[numbers + np.searchsorted(ends, numbers, side="right")] = block
        ending = np.flatnonzero((last >= rows.start) & (last < rows.stop))
        followed = block if read_next is None or len(ending) == 0 else read_next(rows)
        out[ends[ending] + ending] = followed[last[ending] - rows.start]


def assemble(
    arrays: Mapping[str, np.ndarray],
    length: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    has_final: np.ndarray,
    meta: Mapping[str, Any],
) -> Episodes:
    """Return the filled arrays of a layout as episodes."""
    groups: dict[str, dict[str, np.ndarray]] = {"obs": {}, "info": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        if rest:
            groups[group][rest] = array
    return Episodes(
        obs=groups["obs"],
        action=arrays["action"],
        reward=arrays["reward"],
        length=length,
        terminated=terminated,
        truncated=truncated,
        info=groups["info"],
        has_final=has_final,
        meta=meta,
    )


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a foreign reader raises for a damaged file into one sentence."""
    try:
        yield
    except (DatasetError, MissingExtraError):
        raise
    except Exception as error:  # readers of foreign formats raise many kinds
        raise DatasetError(f"{path}: {what} cannot be read ({first_line(error)}); copy the dataset again") from error
