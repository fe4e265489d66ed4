"""Benchmark of large data: 20 million steps converted, opened and read as windows, in time and in memory.

    python scripts/benchmarks/larger_than_memory.py [--steps 20000000] [--keep FOLDER]

Memory is RssAnon, what a process owns itself: pages of a mapped file do not count, the system takes them back when it
wants. It is sampled every 5 ms in a process of its own for each row, above what it was after importing torch.
The peers index the same arrays in the ways named, written here in a few lines: a DataLoader over items; a table of
every window's bounds and its array in memory (Diffusion Policy's sampler); a lookup of each frame of each window in a
table of rows (LeRobot's). Results go to scripts/benchmarks/results/.
"""

import argparse
import bisect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from foundation import RESULTS
from torch.utils.data import DataLoader, Dataset

import diffpolicy as dp
from diffpolicy.data.episodes import split
from diffpolicy.data.order import Order
from diffpolicy.data.sources import convert
from diffpolicy.data.sources.reading import Wanted
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows

LENGTH, OBS, ACTION = 1000, 17, 6
TP, TO, TA = 16, 2, 8
BATCH, BATCHES, PEER_BATCHES = 256, 10_000, 100


def owned_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Give the seconds and the largest RssAnon, in MB above the start, of what happens within."""
    found, stop, before = {"mb": 0.0}, threading.Event(), owned_bytes()

    def watch() -> None:
        while not stop.wait(0.005):
            found["mb"] = max(found["mb"], (owned_bytes() - before) / 1e6)

    watcher, begin = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - begin
        stop.set()
        watcher.join()
        found["mb"] = max(found["mb"], (owned_bytes() - before) / 1e6)


def make_hdf5(path: Path, steps: int) -> None:
    """Write a file of D4RL's layout, random numbers, episodes of 1000 steps."""
    rng = np.random.default_rng(0)
    block = rng.normal(size=(100 * LENGTH, OBS + ACTION + 1)).astype(np.float32)
    parts = {"observations": slice(0, OBS), "actions": slice(OBS, OBS + ACTION), "rewards": -1}
    with h5py.File(path, "w") as file:
        arrays = {
            name: file.create_dataset(name, (steps, *block[0, part].shape), "f4", chunks=True, compression="lzf")
            for name, part in parts.items()
        }
        file["terminals"] = np.zeros(steps, bool)
        file["timeouts"] = np.arange(1, steps + 1) % LENGTH == 0
        for first in range(0, steps, len(block)):
            rows = slice(first, min(first + len(block), steps))
            for name, part in parts.items():
                arrays[name][rows] = block[: rows.stop - first, part]


def run_convert(folder: Path) -> dict[str, float]:
    """HDF5 to a store."""
    with watched() as found:
        convert(folder / "data.hdf5", folder / "store", Wanted())
    return found


def run_open(folder: Path) -> dict[str, float]:
    """Open the store."""
    with watched() as found:
        dp.load(folder / "store")
    return found


def read_batches(make: Callable[[], Callable[[], Any]], batches: int) -> dict[str, float]:
    """Batches a second, and the memory of all: what a way of indexing sets up, and what it reads."""
    with watched() as found:
        begin = time.perf_counter()
        draw = make()
        found["setup_s"] = time.perf_counter() - begin
        begin = time.perf_counter()
        for _ in range(batches):
            draw()
        found["batches_per_s"] = batches / (time.perf_counter() - begin)
    return found


def run_ours(folder: Path) -> dict[str, float]:
    """`Windows.gather` in the order that training uses."""

    def make() -> Callable[[], Any]:
        episodes = dp.load(folder / "store")
        kept, _ = split(episodes, 0.02, 0)
        windows = Windows(episodes, Spec.from_episodes(episodes, TP, TO, TA), only=kept)
        order, step = Order(len(windows), BATCH, 0), iter(range(BATCHES))
        return lambda: windows.gather(order(next(step)))

    return read_batches(make, BATCHES)


class Items(Dataset):
    """One window an item, from the mapped arrays of the store."""

    def __init__(self, folder: Path) -> None:
        episodes = dp.load(folder / "store")
        self.obs, self.action = episodes.obs["obs"], episodes.action
        self.ends = np.cumsum(episodes.length)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.action)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Return one window."""
        e = bisect.bisect_right(self.ends, i)
        first, end = (self.ends[e - 1] if e else 0), self.ends[e]
        history = np.clip(np.arange(i - TO + 1, i + 1), first, None) + e
        chunk = np.clip(np.arange(i - TO + 1, i - TO + 1 + TP), first, end - 1)
        return {"obs": self.obs[history], "action": self.action[chunk]}


def run_items(folder: Path) -> dict[str, float]:
    """A DataLoader over items."""
    return read_batches(lambda: iter(DataLoader(Items(folder), batch_size=BATCH, shuffle=True)).__next__, PEER_BATCHES)


def run_table_of_bounds(folder: Path) -> dict[str, float]:
    """A table of the bounds of every window, the arrays in memory; one slice and pad a window."""

    def make() -> Callable[[], Any]:
        episodes = dp.load(folder / "store")
        obs, action = np.array(episodes.obs["obs"]), np.array(episodes.action)
        ends = np.cumsum(episodes.length)
        step = np.arange(len(action))
        e = np.searchsorted(ends, step, side="right")
        first, end = step - TO + 1, step - TO + 1 + TP
        begin = np.maximum(first, ends[e] - episodes.length[e])
        stop = np.minimum(end, ends[e])
        table = np.stack([begin, stop, begin - first, TP - (end - stop)], axis=1)
        rng = np.random.default_rng(0)

        def one(i: int) -> tuple[np.ndarray, np.ndarray]:
            begin, stop, left, right = table[i]
            window = []
            for array in (obs, action):
                out = np.zeros((TP, array.shape[1]), array.dtype)
                rows = array[begin:stop]
                out[left:right] = rows
                out[:left], out[right:] = rows[0], rows[-1]
                window.append(out)
            return window[0], window[1]

        def draw() -> list[torch.Tensor]:
            drawn = [one(i) for i in rng.integers(len(table), size=BATCH)]
            return [torch.from_numpy(np.stack(arrays)) for arrays in zip(*drawn, strict=True)]

        return draw

    return read_batches(make, PEER_BATCHES)


def run_lookup_of_frames(folder: Path) -> dict[str, float]:
    """Each frame of each window looked up by its row, clamped to its episode, then stacked."""

    def make() -> Callable[[], Any]:
        items = Items(folder)
        rng = np.random.default_rng(0)

        def one(i: int) -> tuple[torch.Tensor, torch.Tensor]:
            e = bisect.bisect_right(items.ends, i)
            first, end = (items.ends[e - 1] if e else 0), items.ends[e]
            rows = [max(first, min(end - 1, i + d)) for d in range(1 - TO, 1 - TO + TP)]
            obs = torch.stack([torch.tensor(items.obs[r + e]) for r in rows[:TO]])
            return obs, torch.stack([torch.tensor(items.action[r]) for r in rows])

        def draw() -> list[torch.Tensor]:
            drawn = [one(int(i)) for i in rng.integers(len(items), size=BATCH)]
            return [torch.stack(parts) for parts in zip(*drawn, strict=True)]

        return draw

    return read_batches(make, PEER_BATCHES)


ACTIVITIES = {
    "convert": run_convert,
    "open": run_open,
    "ours": run_ours,
    "items": run_items,
    "bounds": run_table_of_bounds,
    "frames": run_lookup_of_frames,
}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Run one activity in a process of its own."""
    command = [sys.executable, __file__, "--activity", name, "--keep", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name:<8}", "  ".join(f"{key} {value:.4g}" for key, value in found.items()))
    return found


def main() -> None:
    """Make the data once, measure, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000_000)
    parser.add_argument("--keep", type=Path, help="folder of the data, kept; a temporary one if not given")
    parser.add_argument("--activity", choices=ACTIVITIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.activity:
        print(json.dumps(ACTIVITIES[args.activity](args.keep)))
        return
    folder = args.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "data.hdf5").exists():
            make_hdf5(folder / "data.hdf5", args.steps)
        found = {name: measure(name, folder) for name in ACTIVITIES}
    finally:
        if args.keep is None:
            shutil.rmtree(folder)
    RESULTS.mkdir(exist_ok=True)
    versions = {"torch": str(torch.__version__), "numpy": np.__version__}
    rows = {"steps": args.steps, "window": [TP, TO, TA], "batch": BATCH, "versions": versions, "measured": found}
    (RESULTS / "larger-than-memory-cpu.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
