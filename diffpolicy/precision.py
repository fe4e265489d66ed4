"""float32 that is float32: cuDNN rounds what a GPU convolves to 10 bits (TF32) unless it is told not to.

A noise prediction is divided by the signal that is left, 5e-4 at `t = 1`, and with it its rounding, which would be 2^13
times that of float32, and another in another batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch.backends import cudnn

_lock, _inside, _before = Lock(), 0, True


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Convolve in float32 on a GPU, in all threads, until the last that asked for it is through.

    Whoever has chosen a precision through `torch.backends.cudnn.conv.fp32_precision` keeps it.
    """
    global _inside, _before
    if device.type != "cuda":
        yield
        return
    with _lock:
        if _inside == 0:
            _before = _switched(False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _switched(_before)


def _switched(allowed: bool) -> bool:
    """Allow TF32 in convolutions or not; return what was before."""
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # set through PyTorch's newer names, which do not go together with this one
        return allowed
    cudnn.allow_tf32 = allowed
    return before
