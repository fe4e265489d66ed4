"""Drawings of a page: matplotlib figures as inline SVG, and the strips of the tables.

Figures are drawn in placeholder colours that become CSS variables, so they follow the page into light and dark. Names
that come from the dataset pass through `readable` and matplotlib's escaping, with its mathematics switched off.
"""

import base64
import re
import warnings
from io import BytesIO, StringIO
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator

from diffpolicy.data.episodes import Episodes
from diffpolicy.inspection.ranges import Range, channel_axis, evenly, is_image, readable

INK, LINE, ONE, TWO, BOX = "#010203", "#010204", "#010205", "#010206", "#010207"
VARIABLES = {INK: "var(--ink)", LINE: "var(--line)", ONE: "var(--one)", TWO: "var(--two)", BOX: "var(--box)"}
CYCLE = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6", "#ec4899", "#84cc16")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffpolicy",  # the same data give the same page
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "font.size": 9,
    "axes.titlesize": 10,
}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
SHOWN_EPISODES, SHOWN_POINTS, SHOWN_ACTIONS, SHOWN_DIMS, SHOWN_FRAMES = 8, 400, 6, 64, 8


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element for an HTML page, without any reference to elsewhere."""
    out = StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that its fonts lack: the browser has its own
        figure.savefig(out, format="svg", transparent=True, metadata=NO_METADATA)
    text = out.getvalue()
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :], count=2)
    text = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", text, count=2)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def histograms(lengths: np.ndarray, returns: np.ndarray) -> str:
    """Draw how long the episodes are and what they earned."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.4), layout="constrained")
        axes = figure.subplots(1, 2)
        _histogram(axes[0], lengths, "steps of an episode", ONE)
        _histogram(axes[1], returns[np.isfinite(returns)], "return of an episode", TWO)
    return svg(figure)


def _histogram(axis: Axes, values: np.ndarray, label: str, colour: str) -> None:
    if len(values) and np.ptp(values) > 0:
        axis.hist(values, bins=int(np.clip(2 * np.sqrt(len(values)), 8, 40)), color=colour)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(xlabel=label, ylabel="episodes")
        return
    alike = f"{label}: {float(values[0]):.4g}, in all of them" if len(values) else f"{label}: not one finite number"
    axis.text(0.5, 0.5, alike, ha="center", va="center", transform=axis.transAxes)
    axis.set_axis_off()


def paths(episodes: Episodes) -> str | None:
    """Draw the first two observed numbers of a few episodes; None where there are no two numbers."""
    name = next((n for n, a in episodes.obs.items() if not is_image(a) and np.prod(a.shape[1:]) >= 2), None)
    if name is None:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.4), layout="constrained")
        axis = figure.subplots()
        for k, i in enumerate(evenly(len(episodes), SHOWN_EPISODES)):
            path = _thinned(episodes[int(i)].obs[name])[:, :2]
            axis.plot(*path.T, color=CYCLE[k], linewidth=1)
            axis.plot(*path[0], "o", color=CYCLE[k], markersize=4)
        axis.set(xlabel=f"{readable(name)}[0]", ylabel=f"{readable(name)}[1]")
    return svg(figure)


def actions(episodes: Episodes) -> str:
    """Draw the first action dimensions of a few episodes over time."""
    shown = min(episodes.action.shape[1], SHOWN_ACTIONS)
    columns = 2 if shown > 3 else 1
    rows = -(-shown // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, max(1.15 * rows, 1.7)), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for k, i in enumerate(evenly(len(episodes), SHOWN_EPISODES // 2)):
            action = _thinned(episodes[int(i)].action)
            step = np.linspace(0, episodes.length[i] - 1, len(action))
            for d in range(shown):
                axes.flat[d].plot(step, action[:, d], color=CYCLE[k], linewidth=0.9)
                axes.flat[d].set_title(f"action[{d}]", fontsize=8, loc="left", pad=2)
        for axis in axes.flat[shown:]:
            axis.set_axis_off()
        figure.supxlabel("step", fontsize=9, color=INK)
    return svg(figure)


def _thinned(array: np.ndarray) -> np.ndarray:
    """At most `SHOWN_POINTS` rows of numbers; what is not finite leaves a gap."""
    rows = np.asarray(array[evenly(len(array), SHOWN_POINTS)], dtype=np.float64).reshape(-1, int(array[0].size))
    return np.where(np.isfinite(rows), rows, np.nan)


def boxes(r: Range, low: np.ndarray, high: np.ndarray) -> str:
    """Draw all dimensions side by side, each on its own axis from `low` to `high`."""
    shown = min(r.dims, SHOWN_DIMS)
    at = [_position(v[:shown], low[:shown], high[:shown]) for v in (r.low, *r.percentiles, r.high)]
    x = np.arange(shown)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.9), layout="constrained")
        axis = figure.subplots()
        axis.axhspan(0, 1, color=BOX, zorder=0)
        axis.vlines(x, at[0], at[6], color=LINE, linewidth=1)
        axis.bar(x, at[5] - at[1], bottom=at[1], width=0.5, color=ONE, alpha=0.35)
        axis.bar(x, at[4] - at[2], bottom=at[2], width=0.5, color=ONE)
        axis.hlines(at[3], x - 0.36, x + 0.36, color=INK, linewidth=1.4)
        axis.set(yticks=[0, 1], yticklabels=["low", "high"], xlim=(-0.8, shown - 0.2), xlabel="dimension")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return svg(figure)


def _position(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where values lie between `low` (0) and `high` (1); the middle where these are one."""
    span = np.where(high > low, high - low, 1)
    return np.where(high > low, np.clip((values - low) / span, -0.35, 1.35), 0.5)


def strip(r: Range, d: int, low: float, high: float) -> str:
    """Draw one dimension as a strip from `low` to `high`: range, 98 %, half of the values, and the median."""
    outer = min(low, float(r.low[d])), max(high, float(r.high[d]))
    values = np.array([low, high, r.low[d], *r.percentiles[:, d], r.high[d]])
    at = (100 * _position(values, np.full(9, outer[0]), np.full(9, outer[1]))).round(2)
    bars = ((0, 1, 0, 14, "box"), (2, 8, 6, 2, "line"), (3, 7, 3.5, 7, "soft"), (4, 6, 3.5, 7, "one"))
    drawn = "".join(
        f'<rect x="{at[a]}" y="{y}" width="{max(at[b] - at[a], 0.6):.2f}" height="{h}" class="{kind}"/>'
        for a, b, y, h, kind in bars
    )
    median = f'<rect x="{at[5] - 0.5:.2f}" y="1" width="1" height="12" class="ink"/>'
    return f'<svg class="strip" viewBox="0 0 100 14" preserveAspectRatio="none">{drawn}{median}</svg>'


def frames(array: np.ndarray) -> list[str]:
    """Return a few frames of an image array as data URIs (PNG)."""
    return [_png(np.asarray(array[int(i)])) for i in evenly(len(array), SHOWN_FRAMES)]


def _png(frame: np.ndarray) -> str:
    frame = np.moveaxis(frame, channel_axis((1, *frame.shape)) - 1, -1)
    frame = frame.reshape(*frame.shape[:2], -1) if frame.ndim == 3 else frame.reshape(-1, *frame.shape[-2:])
    colours = frame[..., :3] if frame.shape[-1] >= 3 else np.repeat(frame[..., :1], 3, axis=-1)
    if colours.dtype != np.uint8:
        top = 1.0 if np.nanmax(colours) <= 1 else 255.0
        colours = (255 * np.clip(np.nan_to_num(colours / top), 0, 1)).astype(np.uint8)
    out = BytesIO()
    imsave(out, np.ascontiguousarray(colours), format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
