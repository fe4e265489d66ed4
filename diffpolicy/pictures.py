"""Pictures: matplotlib figures of chunks, evaluations and comparisons; nothing here decides anything."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

COLUMNS, ROWS = 4, 2


def chunks(sampled: np.ndarray, true: np.ndarray) -> Figure:
    """Draw sampled chunks over the data's, `(B, Tp, Da)`: the first dimensions of eight windows over the chunk index."""
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
