"""d3rlpy's IQL for `offline_rl.py`: told a number of steps on a line, it takes them and prints how many seconds.

Run by the Python of a side environment, with the number of threads as its argument.
"""

# pyright: reportMissingImports=false
import sys
import time

import d3rlpy
import numpy as np
import torch
from d3rlpy.algos import IQLConfig
from d3rlpy.dataset import MDPDataset

STEPS, OBS, ACTION, BATCH = 100_000, 11, 3, 256  # as in offline_rl.py


def main() -> None:
    """Serve until the input ends; a step is drawing a batch and updating critics, value and actor on it."""
    torch.set_num_threads(int(sys.argv[1]))
    rng = np.random.default_rng(0)
    ends = np.zeros(STEPS, dtype=np.float32)
    ends[999::1000] = 1
    obs, action = rng.normal(size=(STEPS, OBS)), rng.uniform(-1, 1, (STEPS, ACTION))
    reward = rng.normal(size=STEPS)
    arrays = [x.astype(np.float32) for x in (obs, action, reward)]
    dataset = MDPDataset(*arrays, np.zeros_like(ends), ends)
    agent = IQLConfig(batch_size=BATCH).create(device="cpu:0")
    agent.build_with_dataset(dataset)
    print("ready", d3rlpy.__version__, flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            agent.update(dataset.sample_transition_batch(BATCH))
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
