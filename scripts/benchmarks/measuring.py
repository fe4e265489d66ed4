"""How a figure is measured, and what it was measured on."""

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


def medians(runs: Sequence[Callable[[], Any]], rounds: int, device: torch.device, block: int = 1) -> list[float]:
    """Time all in turn, `block` times each a round, one unmeasured round first; return the median seconds of each."""
    times: list[list[float]] = [[] for _ in runs]
    for k in range(rounds + 1):
        for which, run in enumerate(runs):
            for _ in range(block):
                begin = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if k:
                    times[which].append(time.perf_counter() - begin)
    return [float(np.median(t)) for t in times]


def where(device: torch.device | None = None, **versions: str) -> dict[str, Any]:
    """Return `machine`, `versions` and `commit` of a result; `+` after a commit: with changes since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True, check=False
    )
    cuda = device is not None and device.type == "cuda"
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "machine": torch.cuda.get_device_name(device) if cuda else cpu,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version(), **versions},
        "commit": described.stdout.strip(),
    }
