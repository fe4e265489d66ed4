"""PyTorch's helper threads: those that wait are ended before another thread plans, and come back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import os
import torch
from diffpolicy.control.clock import ThreadWorker
from diffpolicy.control.threads import release_helpers

torch.set_num_threads(4)
count = lambda: len(os.listdir("/proc/self/task"))
alone = count()
x = torch.arange(1_000_000.0)
total = x.sin().sum()
helped = count()
release_helpers()
released = count()
assert torch.equal(x.sin().sum(), total)
back = count()
worker = ThreadWorker()
print(helped - alone, released - alone, back - alone, count() - 1 - alone)
worker.close()
"""


@pytest.mark.skipif(
    not Path("/proc/self/task").exists() or not list((Path(torch.__file__).parent / "lib").glob("libgomp*")),
    reason="counts the threads of libgomp as Linux tells them",
)
def test_three_waiting_helpers_end_come_back_and_end_for_the_thread_that_plans():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    told = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    assert told.stdout.split() == ["3", "0", "3", "0"]
