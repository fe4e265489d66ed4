"""Ranges: what every check and picture starts from, read block by block, so that memory-mapped data stay on the disk.

one pass over all rows          low, high, mean, std, the rows of low and high, values that are not finite
at most SAMPLE_ROWS rows        percentiles, from rows evenly spaced over the whole array
at most SAMPLE_FRAMES frames    everything about images, by channel
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from diffpolicy.data.episodes import CHECK_ROWS, Episodes
from diffpolicy.data.normalizer import rounding

SAMPLE_ROWS = 200_000
SAMPLE_FRAMES = 256
BLOCK_VALUES = 1 << 22
PERCENTS = (1, 25, 50, 75, 99)
IMAGE_AXES = 4
NAMED_DIMS = 4


def readable(text: str, most: int = 60) -> str:
    """Return untrusted text without control characters, and short enough for one line."""
    kept = "".join(c if c.isprintable() else "?" for c in text)
    return kept if len(kept) <= most else kept[: most - 3] + "..."


def is_image(array: np.ndarray) -> bool:
    """Whether the rows are pictures, `(rows, H, W, C)` or more."""
    return array.ndim >= IMAGE_AXES


def flat(block: np.ndarray) -> np.ndarray:
    """Return a copy as rows of numbers, `(rows, D)`, float64."""
    return np.array(block, dtype=np.float64).reshape(len(block), -1)


def blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, block) over all rows, small enough for memory whatever a row's size."""
    width = max(1, int(np.prod(array.shape[1:])))
    rows = max(1, min(CHECK_ROWS, BLOCK_VALUES // width))
    for row in range(0, len(array), rows):
        yield row, array[row : row + rows]


def evenly(rows: int, limit: int) -> np.ndarray:
    """Return at most `limit` row numbers, evenly spaced from the first to the last."""
    return np.arange(rows) if rows <= limit else np.linspace(0, rows - 1, limit).astype(np.int64)


@dataclass(frozen=True)
class Range:
    """What one array holds, by dimension.

    Args:
        name: as a reader sees it, for example `obs 'state'`.
        shape: of one row.
        rows: of the array.
        seen: rows that `low` to `bad` come from: all of them, or a sample of an image's frames.
        sampled: rows that the percentiles come from.
        low, high, mean, std: `(D,)`, of the finite values.
        low_row, high_row: rows where the smallest and largest value first stand, `(D,)`.
        percentiles: `PERCENTS`, `(5, D)`.
        bad: values that are NaN or infinite, `(D,)`.
        first_bad: first row that holds one, or None.
        blank: sampled frames of one single colour, for images.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    seen: int
    sampled: int
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    low_row: np.ndarray
    high_row: np.ndarray
    percentiles: np.ndarray
    bad: np.ndarray
    first_bad: int | None
    blank: int = 0

    @property
    def dims(self) -> int:
        """Number of dimensions, of channels for images."""
        return len(self.low)

    @property
    def images(self) -> bool:
        """Whether the array holds images."""
        return len(self.shape) + 1 >= IMAGE_AXES

    @cached_property
    def constant(self) -> np.ndarray:
        """Dimensions that never change up to rounding, `(D,)`; the border is the Normalizer's."""
        return self.high - self.low <= rounding(self.low, self.high)

    @cached_property
    def nearly_constant(self) -> np.ndarray:
        """Dimensions that change, but not from the 1st to the 99th percentile, `(D,)`."""
        return ~self.constant & (self.percentiles[-1] - self.percentiles[0] <= rounding(self.low, self.high))

    def where(self, dims: np.ndarray) -> str:
        """Name some dimensions: `action[0], [3] and 5 more`; the bare name where the array has only one."""
        if self.dims == 1:
            return self.name
        shown = ", ".join(f"[{d}]" for d in dims[:NAMED_DIMS])
        return self.name + shown + (f" and {len(dims) - NAMED_DIMS} more" if len(dims) > NAMED_DIMS else "")


def measure(name: str, array: np.ndarray) -> Range:
    """Measure one array of numbers, `(rows, ...)`."""
    if is_image(array):
        return _measure_images(name, array)
    index = evenly(len(array), SAMPLE_ROWS)
    return Range(
        name=name,
        shape=array.shape[1:],
        rows=len(array),
        seen=len(array),
        sampled=len(index),
        percentiles=_percentiles(flat(array if len(index) == len(array) else array[index])),
        **_moments(array),
    )


def _measure_images(name: str, array: np.ndarray) -> Range:
    index = evenly(len(array), SAMPLE_FRAMES)
    frames = np.asarray(array[index])
    pixels = np.moveaxis(frames, channel_axis(frames.shape), -1)
    pixels = pixels.reshape(-1, pixels.shape[-1])
    found = _moments(pixels)
    per_frame = frames[0].size // pixels.shape[-1]
    for key in ("low_row", "high_row"):
        found[key] = index[found[key] // per_frame]
    if found["first_bad"] is not None:
        found["first_bad"] = int(index[found["first_bad"] // per_frame])
    picked = pixels[evenly(len(pixels), SAMPLE_ROWS)]
    blank = int(sum(np.ptp(frame.reshape(-1, pixels.shape[-1]), axis=0).max() == 0 for frame in _channels_last(frames)))
    return Range(
        name=name,
        shape=array.shape[1:],
        rows=len(array),
        seen=len(index),
        sampled=len(index),
        percentiles=_percentiles(flat(picked)),
        blank=blank,
        **found,
    )


def channel_axis(shape: tuple[int, ...]) -> int:
    """Return the axis of the colours of `(rows, H, W, C)` or `(rows, C, H, W)`."""
    return 1 if shape[-1] > 4 and shape[1] <= 4 else len(shape) - 1


def _channels_last(frames: np.ndarray) -> np.ndarray:
    return np.moveaxis(frames, channel_axis(frames.shape), -1)


def _percentiles(sample: np.ndarray) -> np.ndarray:
    if np.isfinite(sample).all():
        return np.percentile(sample, PERCENTS, axis=0)
    finite = np.where(np.isfinite(sample), sample, np.nan)
    finite[0] = np.where(np.isfinite(finite).any(0), finite[0], 0)  # a dimension without one finite value
    return np.nanpercentile(finite, PERCENTS, axis=0)


def _moments(array: np.ndarray) -> dict:
    """One pass in float64; sums are shifted by the first row, so large offsets cost no digits."""
    first = flat(array[:1])[0]
    shift = np.where(np.isfinite(first), first, 0)
    low, high = np.full_like(shift, np.inf), np.full_like(shift, -np.inf)
    total, square = np.zeros_like(shift), np.zeros_like(shift)
    bad, low_row, high_row = (np.zeros(len(shift), dtype=np.int64) for _ in range(3))
    first_bad = None
    for row, raw in blocks(array):
        block = flat(raw)
        if (wrong := ~np.isfinite(block)).any():
            first_bad = row + int(np.argmax(wrong.any(1))) if first_bad is None else first_bad
            bad += wrong.sum(0)
            block[wrong] = np.nan
        low_row, low = _extreme(np.fmin, block, row, low_row, low)
        high_row, high = _extreme(np.fmax, block, row, high_row, high)
        block -= shift
        total += np.nansum(block, 0) if wrong.any() else block.sum(0)
        square += np.nansum(block**2, 0) if wrong.any() else np.einsum("ij,ij->j", block, block)
    count = np.maximum(len(array) - bad, 1)
    nothing = bad == len(array)
    mean = total / count
    return {
        "low": np.where(nothing, 0, low),
        "high": np.where(nothing, 0, high),
        "mean": mean + shift,
        "std": np.sqrt(np.maximum(square / count - mean**2, 0)),
        "low_row": low_row,
        "high_row": high_row,
        "bad": bad,
        "first_bad": first_bad,
    }


def _extreme(
    better: np.ufunc, block: np.ndarray, row: int, best_row: np.ndarray, best: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Update the smallest (fmin) or largest (fmax) value of each dimension, NaN aside, and its first row."""
    found = better(better.reduce(block, axis=0), best)
    changed = found != best
    if changed.any():
        best_row = best_row.copy()
        best_row[changed] = row + (block[:, changed] == found[changed]).argmax(0)
    return best_row, found


def episode_of_step(episodes: Episodes, step: int) -> tuple[int, int]:
    """Return (episode, step within it) of a row of `action`."""
    i = int(np.searchsorted(episodes.start, step, side="right")) - 1
    return i, step - int(episodes.start[i])


def episode_of_obs(episodes: Episodes, row: int) -> tuple[int, int]:
    """Return (episode, step within it) of a row of the observations."""
    first = episodes.start + np.arange(len(episodes))
    i = int(np.searchsorted(first, row, side="right")) - 1
    return i, row - int(first[i])
