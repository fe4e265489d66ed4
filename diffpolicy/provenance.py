"""What a result depends on besides the code: the dataset, by a digest, and the versions beneath."""

import hashlib
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import gymnasium
import numpy as np
import torch

from diffpolicy.data.episodes import Episodes
from diffpolicy.errors import DatasetError


def fingerprint(episodes: Episodes) -> str:
    """Return a short digest of the dataset: lengths, shapes, and rows spread over every array."""
    digest = hashlib.sha256(np.asarray(episodes.length, dtype=np.int64).tobytes())
    for name, array in sorted({**episodes.obs, "action": episodes.action, "reward": episodes.reward}.items()):
        rows = np.unique(np.linspace(0, len(array) - 1, 4096).astype(np.int64))
        digest.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array[rows]).tobytes())
    return digest.hexdigest()[:16]


def check_same_dataset(before: str, now: str) -> None:
    """Refuse to resume on other data.

    Raises:
        DatasetError: if the fingerprints differ.
    """
    if before != now:
        raise DatasetError(
            f"the dataset's fingerprint is {now}, the run began with {before}; resume with the same data"
        )


def versions() -> dict[str, str]:
    """Return what a result depends on besides the code; of MuJoCo only where it is installed."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "gymnasium": gymnasium.__version__,
    }
    with suppress(PackageNotFoundError):
        found["mujoco"] = version("mujoco")
    return found
