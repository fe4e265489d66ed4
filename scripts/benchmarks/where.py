"""What a figure was measured on."""

import platform
import subprocess
from typing import Any

import torch


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
