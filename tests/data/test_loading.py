"""The one way in and out: limits, mixtures, conversion, and the writers."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from diffpolicy.data import store
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.order import WeightedOrder
from diffpolicy.data.sources import convert, load, save
from diffpolicy.data.sources.mixing import Part, split_mixture
from diffpolicy.data.sources.reading import Wanted
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows
from diffpolicy.errors import DatasetError


def make_episodes(lengths: tuple[int, ...] = (3, 1, 4), seed: int = 0, obs_dim: int = 2) -> Episodes:
    rng = np.random.default_rng(seed)
    return from_list(
        [
            Episode(
                obs={"obs": rng.normal(size=(n + 1, obs_dim)).astype(np.float32)},
                action=rng.normal(size=(n, 1)).astype(np.float32),
                reward=rng.normal(size=n).astype(np.float32),
                terminated=i % 2 == 0,
                truncated=i % 2 == 1,
            )
            for i, n in enumerate(lengths)
        ],
        meta={"env_id": "Made-v0"},
    )


def assert_equal(a: Episodes, b: Episodes) -> None:
    assert a.arrays().keys() == b.arrays().keys()
    for name, array in a.arrays().items():
        np.testing.assert_array_equal(array, b.arrays()[name])
    for name in ("length", "terminated", "truncated", "has_final"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("name", ["demos", "demos.hdf5"])
def test_what_is_written_is_read_back_equal_in_either_format(tmp_path, name):
    episodes = make_episodes()
    save(episodes, tmp_path / name)
    again = load(tmp_path / name)
    assert_equal(again, episodes)
    assert again.meta["env_id"] == "Made-v0"


def test_d4rls_layout_refuses_two_observations_and_leaves_nothing_behind(tmp_path):
    episodes = make_episodes()
    two = replace(episodes, obs={**episodes.obs, "goal": episodes.obs["obs"]})
    with pytest.raises(DatasetError, match="D4RL's layout has one flat array: write a store instead"):
        save(two, tmp_path / "d.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_unknown_last_observations_stay_unknown_through_d4rls_layout(tmp_path):
    episodes = replace(make_episodes(), has_final=np.array([True, False, True]))
    save(episodes, tmp_path / "d.hdf5")
    assert load(tmp_path / "d.hdf5").has_final.tolist() == [False, False, False]


@pytest.mark.parametrize("name", ["door-human.hdf5", "d4rl_style/hopper-mixed.hdf5", "pusht_cchi_v7_replay.zarr"])
def test_conversion_to_a_store_equals_loading_and_stays_on_disk(tmp_path, shared_data, name):
    converted = convert(shared_data / name, tmp_path / "store", Wanted())
    assert isinstance(converted.action, np.memmap)
    assert_equal(converted, load(shared_data / name))


def test_conversion_of_what_cannot_be_right_leaves_nothing_behind(tmp_path):
    episodes = make_episodes()
    save(episodes, tmp_path / "d.hdf5")
    with h5py.File(tmp_path / "d.hdf5", "a") as file:
        file["observations"][3] = np.nan
    with pytest.raises(DatasetError, match="obs 'obs' holds nan in row 4"):
        convert(tmp_path / "d.hdf5", tmp_path / "store", Wanted())
    assert [path.name for path in tmp_path.iterdir()] == ["d.hdf5"]


def test_a_nan_in_a_store_is_refused_by_the_normalizer_which_reads_it_whole(tmp_path):
    from diffpolicy.data.normalizer import Normalizer

    for name in ("action", "obs/obs", "reward"):
        save(make_episodes(), tmp_path / "store")
        array = np.lib.format.open_memmap(tmp_path / "store" / f"{name}.npy", "r+")
        array[2] = np.nan
        array.flush()
        with pytest.raises(DatasetError, match="holds nan in row 2"):
            Normalizer.fit(load(tmp_path / "store"))


def test_a_dataset_of_100_gigabytes_in_a_file_of_kilobytes_is_refused_before_it_is_allocated(tmp_path):
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for name, columns in (("observations", 1000), ("actions", 2)):
            file.create_dataset(name, (25_000_000, columns), "f4", chunks=(25_000_000, columns), compression="gzip")
        file.create_dataset("rewards", (25_000_000,), "f4")
        file.create_dataset("terminals", (25_000_000,), bool)
    with pytest.raises(DatasetError, match=r"(never written|has 0 of its 1 chunks)"):
        load(tmp_path / "d.hdf5")


def test_a_limit_of_100_bytes_is_kept_and_says_what_takes_the_most(tmp_path):
    save(make_episodes(), tmp_path / "d.hdf5")
    with pytest.raises(DatasetError, match=r"declares 1.52e-07 GB, most of it in obs/obs, and 1e-07 GB may be taken"):
        load(tmp_path / "d.hdf5", max_bytes=100)
    assert load(tmp_path / "d.hdf5", max_bytes=152).steps == 8


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.hdf5", [Part("a.hdf5")]),
        ("a.hdf5+b", [Part("a.hdf5"), Part("b")]),
        ("a@0.8+minari:D4RL/door/human-v2@0.2", [Part("a", 0.8), Part("minari:D4RL/door/human-v2", 0.2)]),
    ],
)
def test_a_mixture_is_split_into_datasets_and_shares(text, parts):
    assert split_mixture(text) == parts


def test_a_folder_with_a_plus_in_its_name_is_one_dataset(tmp_path):
    save(make_episodes(), tmp_path / "a+b@2")
    assert load(tmp_path / "a+b@2").steps == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a@0+b@1", "share of 'a' is '0'"),
        ("a@x+b@1", "'x'; wanted a number"),
        ("a@0.5+b", "some of its datasets a share"),
        ("a@nan+b@1", "'nan'"),
    ],
)
def test_shares_that_mean_nothing_are_refused(text, words):
    with pytest.raises(DatasetError, match=words):
        load(text)


def test_a_mixture_without_shares_has_every_episode_in_order(tmp_path):
    a, b = make_episodes((3, 2)), make_episodes((4,), seed=1)
    save(a, tmp_path / "a")
    save(b, tmp_path / "b.hdf5")
    both = load(f"{tmp_path / 'a'}+{tmp_path / 'b.hdf5'}")
    assert both.length.tolist() == [3, 2, 4]
    np.testing.assert_array_equal(both.action, np.concatenate([a.action, b.action]))
    assert both.weight is None
    assert both.meta["env_id"] == "Made-v0"


def test_datasets_of_other_sizes_do_not_mix(tmp_path):
    save(make_episodes(), tmp_path / "a")
    save(make_episodes(obs_dim=3), tmp_path / "b")
    with pytest.raises(DatasetError, match=r"has observations .*\(2,\).* and .*\(3,\).*; mix datasets of one kind"):
        load(f"{tmp_path / 'a'}+{tmp_path / 'b'}")


def test_shares_of_0_8_and_0_2_are_those_of_the_windows_drawn_whatever_the_sizes(tmp_path):
    save(make_episodes((2, 3)), tmp_path / "a")
    save(make_episodes((40, 55)), tmp_path / "b")
    both = load(f"{tmp_path / 'a'}@0.8+{tmp_path / 'b'}@0.2")
    windows = Windows(both, Spec.from_episodes(both, 4, 1, 1))
    order = WeightedOrder(windows, 1000, seed=0)
    drawn = np.concatenate([order(step).numpy() for step in range(40)])
    # 40,000 draws: the standard deviation of the share is 0.002.
    assert abs((drawn < 5).mean() - 0.8) < 0.01
    assert set(drawn) == set(range(100))
    np.testing.assert_array_equal(order(7), WeightedOrder(windows, 1000, seed=0)(7))
    only = Windows(both, Spec.from_episodes(both, 4, 1, 1), only=np.array([1, 2]))
    assert only.weight.tolist() == pytest.approx([0.8 / 5, 0.2 / 95])
    assert only.count.tolist() == [3, 40]


def test_weights_survive_the_store_selection_and_renaming(tmp_path):
    weighted = replace(make_episodes(), weight=np.array([1.0, 0.0, 2.5]))
    save(weighted, tmp_path / "w")
    again = load(tmp_path / "w")
    assert again.weight.tolist() == [1.0, 0.0, 2.5]
    assert again.select([2, 0]).weight.tolist() == [2.5, 1.0]
    assert again.rename({"x": "obs"}).weight.tolist() == [1.0, 0.0, 2.5]
    for bad in ([1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [np.nan, 1.0, 1.0]):
        with pytest.raises(DatasetError, match="weights of the episodes"):
            replace(weighted, weight=np.array(bad))


def test_a_store_reads_the_observations_that_are_named(tmp_path):
    episodes = make_episodes()
    two = replace(episodes, obs={**episodes.obs, "goal": 2 * episodes.obs["obs"]})
    save(two, tmp_path / "two")
    assert list(load(tmp_path / "two", obs=["goal"]).obs) == ["goal"]
    with pytest.raises(DatasetError, match="there is no observation 'target'"):
        load(tmp_path / "two", obs=["target"])


def test_a_full_disk_is_one_sentence_and_the_former_dataset_stays(tmp_path, monkeypatch):
    save(make_episodes(), tmp_path / "demos")
    before = load(tmp_path / "demos").action.copy()
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DatasetError, match="the disk has 1e-08 GB free"):
        convert(make_d4rl(tmp_path), tmp_path / "demos", Wanted())
    np.testing.assert_array_equal(load(tmp_path / "demos").action, before)


def make_d4rl(folder: Path) -> Path:
    save(make_episodes(seed=5), folder / "d.hdf5")
    return folder / "d.hdf5"
