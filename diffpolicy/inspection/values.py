"""Checks of values: numbers that are missing, constant, far out, outside the action space, saturated."""

from collections.abc import Iterator

import numpy as np

from diffpolicy.inspection.findings import Evidence, Finding, Severity, counted, number, percent
from diffpolicy.inspection.ranges import Range, blocks, flat

TAIL_RATIO = 5.0
OTHER_SCALE = 2.0
NARROW = 0.05
SATURATED = 0.25
SWITCH = 0.95
EDGE = 1e-3


def not_finite(e: Evidence) -> Iterator[Finding]:
    """Values that are NaN or infinite."""
    for r in (*e.obs, e.action, e.reward):
        if r.first_bad is not None:
            dims = np.flatnonzero(r.bad)
            yield Finding(
                Severity.WRONG,
                r.where(dims),
                f"{counted(int(r.bad.sum()), 'value')} NaN or infinite, the first in {e.place(r, r.first_bad)}",
                "Remove those episodes or repair the values: a single one makes the whole loss NaN.",
            )


def constant(e: Evidence) -> Iterator[Finding]:
    """Dimensions that never change."""
    for r in e.obs:
        if len(dims := np.flatnonzero(r.constant & (r.bad < r.seen))):
            yield Finding(
                Severity.NOTE,
                r.where(dims),
                f"never changes: {_values(r.low[dims])} in every row",
                "Leave it out, or find out why it stands still: a sensor that is not connected looks like this. "
                "Training works: the normalizer maps it to 0.",
            )
    if len(dims := np.flatnonzero(e.action.constant & (e.action.bad < e.action.seen))):
        yield Finding(
            Severity.SUSPECT,
            e.action.where(dims),
            f"never changes: {_values(e.action.low[dims])} in every row",
            "Check the recording: no policy can learn to use this dimension, it will always output that value.",
        )


def nearly_constant(e: Evidence) -> Iterator[Finding]:
    """Dimensions that hold one value in 98 % of the rows or more."""
    for r in (*(r for r in e.obs if not r.images), e.action):
        if len(dims := np.flatnonzero(r.nearly_constant)):
            d = int(dims[0])
            yield Finding(
                Severity.SUSPECT if r is e.action else Severity.NOTE,
                r.where(dims),
                f"hardly ever changes: {number(r.percentiles[2, d])} in at least 98 % of the rows, yet "
                f"{number(r.low[d])} to {number(r.high[d])} in all",
                "Right for a rare event such as a contact or a switch. Otherwise look at the rows where it changes: "
                f"the first is {e.place(r, int(_rare_row(r, d)))}.",
            )


def _rare_row(r: Range, d: int) -> int:
    low_is_rare = r.percentiles[2, d] - r.low[d] > r.high[d] - r.percentiles[2, d]
    return int(r.low_row[d] if low_is_rare else r.high_row[d])


def _values(values: np.ndarray) -> str:
    return f"{number(values[0])}" if len(set(values.tolist())) == 1 else f"{number(values[0])}, ..."


def heavy_tails(e: Evidence) -> Iterator[Finding]:
    """A few far values stretch the range that `limits` maps to [-1, 1]; the rest shares what is left."""
    for r in (*(r for r in e.obs if not r.images), e.action):
        middle = r.percentiles[-1] - r.percentiles[0]
        ordinary = ~r.constant & ~r.nearly_constant
        ratio = np.where(ordinary, (r.high - r.low) / np.where(ordinary, middle, 1), 0)
        if len(dims := np.flatnonzero(ratio >= TAIL_RATIO)):
            d = int(dims[np.argmax(ratio[dims])])
            far = r.low_row[d] if r.percentiles[0, d] - r.low[d] > r.high[d] - r.percentiles[-1, d] else r.high_row[d]
            yield Finding(
                Severity.SUSPECT,
                r.where(dims),
                f"98 % of the values of [{d}] lie in {percent(1 / ratio[d])} of its range "
                f"{number(r.low[d])} to {number(r.high[d])}; the furthest is in {e.place(r, int(far))}",
                "Look at that episode and leave it out if it failed: normalised by limits, most values share a sliver "
                "of the unit box." + (" Or normalise this observation by standard." if r is not e.action else ""),
            )


def outside_space(e: Evidence) -> Iterator[Finding]:
    """Actions that the environment does not allow, so that others were executed than recorded."""
    if e.space is None:
        return
    low, high = e.space.low, e.space.high
    slack = np.where(np.isfinite(high - low), 1e-5 * (high - low), 0)
    any_out, out = 0, np.zeros(e.action.dims, dtype=np.int64)
    for _, raw in blocks(e.episodes.action):
        block = flat(raw)
        outside = np.isfinite(block) & ((block < low - slack) | (block > high + slack))
        out += outside.sum(0)
        any_out += int(outside.any(1).sum())
    if not any_out:
        return
    dims, share = np.flatnonzero(out), any_out / e.action.rows
    excess = np.maximum(low - e.action.low, e.action.high - high)
    d = int(np.argmax(excess))
    below = low[d] - e.action.low[d] > e.action.high[d] - high[d]
    value, row = (e.action.low[d], e.action.low_row[d]) if below else (e.action.high[d], e.action.high_row[d])
    other_scale = (e.action.percentiles[-1] - e.action.percentiles[0] > OTHER_SCALE * (high - low)).any()
    yield Finding(
        Severity.WRONG if other_scale else Severity.SUSPECT,
        e.action.where(dims),
        f"{percent(share)} of the steps lie outside the action space of {e.space.env_id}; the furthest is "
        f"{number(value)} where {number(low[d])} to {number(high[d])} is allowed ({e.place(e.action, int(row))})",
        "The scale or the unit differs: convert the actions."
        if other_scale
        else "Clip the recorded actions as the environment does: a policy that imitates the excess gains nothing.",
    )


def narrow(e: Evidence) -> Iterator[Finding]:
    """Actions that use a sliver of the action space in every dimension: perhaps another scale or unit."""
    if e.space is None:
        return
    span = e.space.high - e.space.low
    moving = np.isfinite(span) & ~e.action.constant
    if not moving.any():
        return
    used = (e.action.high - e.action.low)[moving] / span[moving]
    if used.max() < NARROW:
        yield Finding(
            Severity.SUSPECT,
            "action",
            f"no dimension uses more than {percent(float(used.max()))} of the action space of {e.space.env_id}",
            "Check the scale: actions in other units, or not yet multiplied by the controller's gain, look like this.",
        )


def saturated(e: Evidence) -> Iterator[Finding]:
    """Actions at their bounds in a large share of the steps."""
    low, high = _bounds(e)
    edge = EDGE * (e.action.high - e.action.low)
    at = np.zeros(e.action.dims, dtype=np.int64)
    for _, raw in blocks(e.episodes.action):
        block = flat(raw)
        at += ((abs(block - low) <= edge) | (abs(block - high) <= edge)).sum(0)
    share = np.where(e.action.constant, 0, at / e.action.rows)
    if len(dims := np.flatnonzero((share >= SATURATED) & (share < SWITCH))):
        d = int(dims[np.argmax(share[dims])])
        yield Finding(
            Severity.NOTE,
            e.action.where(dims),
            f"[{d}] is at its bound ({number(low[d])} or {number(high[d])}) in {percent(share[d])} of the steps"
            + (f", at least {percent(share[dims].min())} in each of these" if len(dims) > 1 else ""),
            "Right for an agent with clipped or bang-bang actions. For demonstrations, check the scale: whatever was "
            "commanded beyond the bound is lost.",
        )
    if len(dims := np.flatnonzero(share >= SWITCH)):
        d = int(dims[0])
        yield Finding(
            Severity.NOTE,
            e.action.where(dims),
            f"is a switch: {number(low[d])} or {number(high[d])} in at least {percent(share[dims].min())} of the steps",
            "Right for a gripper. A diffusion policy puts values in between at times: round them before execution.",
        )


def _bounds(e: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Return the action space's bounds where it has them, else the data's own."""
    if e.space is None:
        return e.action.low, e.action.high
    low = np.where(np.isfinite(e.space.low), e.space.low, e.action.low)
    return low, np.where(np.isfinite(e.space.high), e.space.high, e.action.high)


def blank_images(e: Evidence) -> Iterator[Finding]:
    """Frames of one single colour."""
    for r in e.obs:
        if r.blank:
            yield Finding(
                Severity.SUSPECT,
                r.name,
                f"{r.blank} of {r.seen} sampled frames are of one single colour",
                "Look at them: a camera that was not ready records black frames.",
            )


CHECKS = (
    not_finite, constant, nearly_constant, heavy_tails, outside_space, narrow, saturated, blank_images,
)  # fmt: skip
