"""Pictures: matplotlib figures of chunks, evaluations and comparisons; nothing here decides anything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffpolicy.data.episodes import Episodes
from diffpolicy.errors import MissingExtraError

COLUMNS, ROWS = 4, 2


def chunks(sampled: np.ndarray, true: np.ndarray) -> Figure:
    """Draw sampled chunks over the data's, `(B, Tp, Da)`: the first dimensions of eight windows."""
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(3 * COLUMNS, 2.2 * ROWS), sharex=True, layout="constrained")
    shown = np.linspace(0, len(sampled) - 1, ROWS * COLUMNS).astype(int)
    for axis, i in zip(axes.flat, shown, strict=True):
        for d in range(min(sampled.shape[-1], 3)):
            axis.plot(true[i, :, d], color=f"C{d}", linewidth=1, label=f"data, dim {d}")
            axis.plot(sampled[i, :, d], color=f"C{d}", linestyle="--", label=f"sampled, dim {d}")
    axes.flat[0].legend(fontsize=6)
    figure.supxlabel("index in the chunk")
    figure.supylabel("action")
    plt.close(figure)
    return figure


def evaluation(report: dict[str, Any], episodes: Episodes) -> Figure:
    """Draw an evaluation: returns, lengths, and paths of the first two observed numbers, failures on top."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    values, name = (report["by_episode"]["score"], "score") if "score" in report["by_episode"] else (None, "return")
    axes[0].hist(report["by_episode"]["return"] if values is None else values, bins=25, color="C0")
    axes[0].set(xlabel=name, ylabel="episodes", title=f"{name} of {report['episodes']} episodes")
    axes[1].hist(episodes.length, bins=25, color="C1")
    axes[1].set(xlabel="steps", title="length")
    success = report["by_episode"].get("success")
    _paths(axes[2], episodes, np.ones(len(episodes)) if success is None else np.asarray(success))
    figure.suptitle(f"{report['env_id']}, {report['sampler']}, seeds {report['seeds'][0]} to {report['seeds'][1]}")
    plt.close(figure)
    return figure


def _paths(axis: Axes, episodes: Episodes, success: np.ndarray) -> None:
    """Draw each episode's path in the first two dimensions of its first observation."""
    name = next((n for n in ("observation", "obs") if n in episodes.obs), next(iter(episodes.obs)))
    for i in np.argsort(-success, kind="stable"):
        path = episodes[int(i)].obs[name].reshape(int(episodes.length[i]) + 1, -1)[:, :2]
        colour = "C2" if success[i] else "C3"
        axis.plot(*path.T, color=colour, alpha=0.35 if success[i] else 0.9, linewidth=0.8)
        axis.plot(*path[0], ".", color="black", markersize=2)
    axis.set(title="paths: green success, red failure", xlabel=f"{name}[0], dots are starts", ylabel=f"{name}[1]")
    axis.set_aspect("equal", adjustable="datalim")


def comparison(rows: Sequence[Any], names: tuple[str, str]) -> Figure:
    """Draw paired differences with their intervals."""
    figure, axis = plt.subplots(figsize=(7, 1 + 0.6 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        d = row.difference
        axis.errorbar(d.value, i, xerr=[[d.value - d.low], [d.high - d.value]], fmt="o", capsize=4)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set(yticks=range(len(rows)), yticklabels=[row.name for row in rows], xlabel=f"{names[1]} minus {names[0]}")
    plt.close(figure)
    return figure


def save_video(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    """Write RGB frames `(H, W, 3)` as MP4.

    Raises:
        MissingExtraError: if imageio is not installed.
    """
    try:
        import imageio.v3 as imageio
    except ImportError as error:
        raise MissingExtraError("writing a video needs imageio; pip install 'diffpolicy[video]'") from error
    imageio.imwrite(path, np.stack(frames), fps=fps, codec="libx264", macro_block_size=2)
