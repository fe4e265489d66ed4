"""How long a call takes here."""

import time
from collections.abc import Callable

import numpy as np

WARM_UP = 3
SAMPLES = 20


def median_ms(run: Callable[[], object]) -> float:
    """Median milliseconds of `run`, after warming up."""
    seconds = []
    for _ in range(WARM_UP + SAMPLES):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(seconds[WARM_UP:]))
