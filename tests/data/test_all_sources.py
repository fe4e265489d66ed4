"""One content in every format: each reads as the same episodes, and trains the same windows."""

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.sources import load, save
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows

LENGTHS = (4, 2, 5)


def content() -> Episodes:
    rng = np.random.default_rng(3)
    return from_list(
        [
            Episode(
                {"obs": rng.normal(size=(n + 1, 3)).astype("f4")},
                rng.uniform(-1, 1, size=(n, 2)).astype("f4"),
                rng.normal(size=n).astype("f4"),
                terminated=n == 2,
                truncated=n != 2,
            )
            for n in LENGTHS
        ]
    )


def starts(data: Episodes) -> np.ndarray:
    """Rows of the observations that an action followed."""
    return data.obs["obs"][np.delete(np.arange(data.steps + len(data)), np.cumsum(data.length) + np.arange(len(data)))]


def write_store(data: Episodes, folder: Path) -> str:
    save(data, folder / "store")
    return str(folder / "store")


def write_d4rl(data: Episodes, folder: Path) -> str:
    save(data, folder / "data.hdf5")
    return str(folder / "data.hdf5")


def write_minari(data: Episodes, folder: Path) -> str:
    pytest.importorskip("minari")
    save(data, "minari:made/here-v0")
    return "minari:made/here-v0"


def write_zarr(data: Episodes, folder: Path) -> str:
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(str(folder / "buffer.zarr"), mode="w")
    root.create_array("data/obs", data=starts(data))
    root.create_array("data/action", data=data.action)
    root.create_array("meta/episode_ends", data=np.cumsum(data.length))
    return str(folder / "buffer.zarr")


def write_robomimic(data: Episodes, folder: Path) -> str:
    with h5py.File(folder / "robomimic.hdf5", "w") as file:
        group = file.create_group("data")
        group.attrs["total"] = data.steps
        for i in range(len(data)):
            episode, demo = data[i], group.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = len(episode)
            demo["actions"], demo["rewards"] = episode.action, episode.reward
            demo["dones"] = (np.arange(len(episode)) == len(episode) - 1) & episode.terminated
            demo["obs/obs"], demo["next_obs/obs"] = episode.obs["obs"][:-1], episode.obs["obs"][1:]
    return str(folder / "robomimic.hdf5")


def write_ogbench(data: Episodes, folder: Path) -> str:
    """Rows of observations, the last one of each trajectory with a dummy action; rewards and masks as relabelled."""
    ends = np.cumsum(data.length) + np.arange(len(data))
    at = np.cumsum(data.length)
    terminals = np.isin(np.arange(data.steps + len(data)), ends)
    np.savez(
        folder / "play.npz",
        observations=data.obs["obs"],
        actions=np.insert(data.action, at, 0, axis=0),
        terminals=terminals.astype("f4"),
        rewards=np.insert(data.reward, at, 0),
        masks=np.insert(~(np.isin(np.arange(data.steps), at - 1) & np.repeat(data.terminated, data.length)), at, True),
    )
    return str(folder / "play.npz")


def write_lerobot(data: Episodes, folder: Path) -> str:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = folder / "lerobot"
    (path / "meta").mkdir(parents=True)
    (path / "data" / "chunk-000").mkdir(parents=True)
    features = {"obs": (3, starts(data)), "action": (2, data.action)}
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "total_episodes": len(data),
        "total_frames": data.steps,
        "features": {
            **{name: {"dtype": "float32", "shape": [size]} for name, (size, _) in features.items()},
            "next.reward": {"dtype": "float32", "shape": [1]},
            **{name: {"dtype": "int64", "shape": [1]} for name in ("episode_index", "frame_index")},
        },
    }
    (path / "meta" / "info.json").write_text(json.dumps(info))
    lines = [json.dumps({"episode_index": i, "length": int(n), "tasks": []}) for i, n in enumerate(data.length)]
    (path / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    (path / "meta" / "tasks.jsonl").write_text("")
    for i, (first, n) in enumerate(zip(data.start, data.length, strict=True)):
        rows = slice(int(first), int(first + n))
        columns = {
            name: pa.array(list(array[rows]), pa.list_(pa.float32(), size)) for name, (size, array) in features.items()
        }
        columns |= {"next.reward": data.reward[rows], "episode_index": np.full(n, i), "frame_index": np.arange(n)}
        pq.write_table(pa.table(columns), path / "data" / "chunk-000" / f"episode_{i:06d}.parquet")
    return str(path)


WRITERS: dict[str, tuple[Callable[[Episodes, Path], str], frozenset[str]]] = {
    # What the format cannot hold: the last observations, the rewards, the true ends.
    "store": (write_store, frozenset()),
    "d4rl": (write_d4rl, frozenset()),
    "minari": (write_minari, frozenset()),
    "robomimic": (write_robomimic, frozenset()),
    "ogbench": (write_ogbench, frozenset()),
    "zarr": (write_zarr, frozenset({"final", "reward", "ends"})),
    "lerobot": (write_lerobot, frozenset({"final", "ends"})),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_content_reads_as_the_same_episodes_and_windows_from_every_format(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    wanted, (write, lost) = content(), WRITERS[kind]
    found = load(write(wanted, tmp_path))
    assert list(found.obs) == ["obs"]
    np.testing.assert_array_equal(found.length, wanted.length)
    np.testing.assert_array_equal(found.action, wanted.action)
    np.testing.assert_array_equal(starts(found), starts(wanted))
    np.testing.assert_array_equal(found.reward, 0 * wanted.reward if "reward" in lost else wanted.reward)
    ends = [False] * 3 if "ends" in lost else [False, True, False]
    assert (found.terminated.tolist(), found.truncated.tolist()) == (ends, [not end for end in ends])
    assert found.has_final.tolist() == ["final" not in lost] * 3
    if "final" not in lost:
        np.testing.assert_array_equal(found.obs["obs"], wanted.obs["obs"])
    spec, index = Spec({"obs": (3,)}, 2, 6, 2, 3), torch.arange(found.steps)
    ours, theirs = (Windows(data, spec).gather(index) for data in (found, wanted))
    torch.testing.assert_close(ours.obs["obs"], theirs.obs["obs"], rtol=0, atol=0)
    torch.testing.assert_close(ours.action, theirs.action, rtol=0, atol=0)
    assert torch.equal(ours.valid, theirs.valid)
    if not lost:
        torch.testing.assert_close(ours.reward, theirs.reward, rtol=0, atol=0)
        torch.testing.assert_close(ours.discount, theirs.discount, rtol=0, atol=0)
        torch.testing.assert_close(ours.next_obs["obs"], theirs.next_obs["obs"], rtol=0, atol=0)
