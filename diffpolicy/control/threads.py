"""PyTorch's threads on a CPU, and a policy that plans in a thread of its own.

Every thread that computes gets helpers of its own from OpenMP, and they stay. Once all of them are more than the cores,
libgomp puts them to sleep after every operation: with the helpers of the thread that loaded the policy still waiting, a
plan of 26 ms took 78 in another thread (quickstart's policy, 2 cores).
"""

import ctypes
from pathlib import Path

import torch

SOFT = 1  # `omp_pause_soft`: helpers end, settings stay


def release_helpers() -> None:
    """End the OpenMP helpers that wait for the calling thread; they come back with its next large operation."""
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        ctypes.CDLL(str(library)).omp_pause_resource_all(SOFT)
