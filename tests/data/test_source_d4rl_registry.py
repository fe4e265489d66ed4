"""D4RL's datasets by name, through the real package: its table, its download, its cache folder. No network."""

import importlib.util
import sys
import urllib.request
import warnings
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest

from diffpolicy.data.scores import reference_scores
from diffpolicy.data.sources import load
from diffpolicy.errors import DatasetError, MissingExtraError

FOUND = importlib.util.find_spec("d4rl")
if FOUND is None or importlib.util.find_spec("gym") is None:
    pytest.skip("the package d4rl is not there; pip install --no-deps d4rl==1.1", allow_module_level=True)


@pytest.fixture(autouse=True)
def not_imported(monkeypatch, tmp_path) -> None:
    """As in a program that has not imported d4rl; its cache folder is empty, and there is no network."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("d4rl", "mujoco_py")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlretrieve", no_network)


def no_network(address: str, path: str) -> None:
    Path(path).write_bytes(b"half a file")
    raise OSError(f"no way to {address.partition('//')[2].partition('/')[0]}")


def write(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file["observations"], file["actions"] = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32)
        file["rewards"], file["terminals"] = np.arange(4.0), np.array([0, 1, 0, 0], bool)
        file["timeouts"] = np.array([0, 0, 0, 1], bool)
    return path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hopper-medium-v2", "hopper_medium-v2.hdf5"),
        ("halfcheetah-medium-replay-v0", "halfcheetah_mixed.hdf5"),
        ("door-human-v1", "door-human-v1.hdf5"),
        ("kitchen-mixed-v0", "kitchen_microwave_kettle_bottomburner_light-v0.hdf5"),
    ],
)
def test_a_name_finds_its_file_in_d4rls_cache_folder_and_its_reference_scores(tmp_path, name, file):
    path = write(tmp_path / "cache" / file)
    cached = [p for p in path.parent.iterdir()]
    data = load(f"d4rl:{name}")
    assert data.length.tolist() == [2, 2]
    assert data.meta == {"source": "d4rl", "file": file, "dropped_steps": 0, "dataset": name, "reference": name}
    assert name in reference_scores()
    assert [p for p in path.parent.iterdir()] == cached


ANTMAZE = "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse"


def write_walk(path: Path, ends: list[int]) -> Path:
    """Six steps of an ant that is put elsewhere after the third; `ends` are the rows marked as timeouts."""
    path.parent.mkdir()
    place = np.array([[0, 0], [0.5, 0], [1, 0], [20, 20], [20, 20.5], [20, 21]], dtype=np.float32)
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([place, 100 * np.random.default_rng(0).normal(size=(6, 3))], axis=1)
        file["actions"], file["rewards"] = np.zeros((6, 2), np.float32), np.zeros(6)
        file["terminals"], file["timeouts"] = np.zeros(6, bool), np.isin(np.arange(6), ends)
    return path


def test_an_antmaze_with_a_jump_within_an_episode_warns_of_timeouts_out_of_step(tmp_path):
    write_walk(tmp_path / "cache" / f"{ANTMAZE}.hdf5", ends=[3, 5])  # one row late
    with pytest.warns(UserWarning, match=r"diverse-v0: in 1 of 6 steps the ant jumps .*issue 77 .*; take v2"):
        assert load("d4rl:antmaze-medium-diverse-v0").length.tolist() == [4, 2]


def test_an_antmaze_whose_ends_are_where_the_ant_jumps_comes_without_a_warning(tmp_path):
    write_walk(tmp_path / "cache" / f"{ANTMAZE}_fixed.hdf5", ends=[2, 5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("d4rl:antmaze-medium-diverse-v2").length.tolist() == [3, 3]


def test_a_dataset_without_reference_scores_says_nothing_of_them(tmp_path):
    write(tmp_path / "cache" / "maze2d-eval-umaze-sparse-v1.hdf5")
    assert "reference" not in load("d4rl:maze2d-eval-umaze-v1").meta


def test_neither_the_package_itself_nor_mujoco_py_is_imported(tmp_path):
    write(tmp_path / "cache" / "hopper_medium-v2.hdf5")
    load("d4rl:hopper-medium-v2")
    assert not {"d4rl", "mujoco_py"} & set(sys.modules)


def test_the_folder_of_set_dataset_path_is_used_where_d4rl_is_imported(tmp_path, monkeypatch):
    imported = ModuleType("d4rl")  # its own __init__ would import every simulator
    assert FOUND is not None
    imported.__path__ = list(FOUND.submodule_search_locations or ())
    monkeypatch.setitem(sys.modules, "d4rl", imported)
    importlib.import_module("d4rl.offline_env").set_dataset_path(str(tmp_path / "elsewhere"))
    write(tmp_path / "elsewhere" / "hopper_medium-v2.hdf5")
    assert load("d4rl:hopper-medium-v2").steps == 4
    for name in ("d4rl.infos", "d4rl.offline_env"):
        monkeypatch.delitem(sys.modules, name)


def test_what_is_downloaded_is_read_and_kept(tmp_path, monkeypatch):
    asked = []

    def download(address: str, path: str) -> None:
        asked.append(address)
        write(Path(path))

    monkeypatch.setattr(urllib.request, "urlretrieve", download)
    for _ in range(2):
        assert load("d4rl:hopper-medium-v2").steps == 4
    assert [address.rpartition("/")[2] for address in asked] == ["hopper_medium-v2.hdf5"]


def test_a_failed_download_leaves_no_half_a_file_behind(tmp_path):
    with pytest.raises(DatasetError, match=r"could not be downloaded \(no way to rail") as caught:
        load("d4rl:hopper-medium-v2")
    assert str(caught.value).endswith(f"or place the file at {tmp_path / 'cache' / 'hopper_medium-v2.hdf5'}")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_refused_with_its_path_and_kept(tmp_path):
    path = write(tmp_path / "cache" / "hopper_medium-v2.hdf5")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DatasetError, match="cannot be read as HDF5") as caught:
        load("d4rl:hopper-medium-v2")
    assert str(path) in str(caught.value)
    assert path.exists()


@pytest.mark.parametrize(
    ("name", "nearest"), [("hoper-medium-v2", "hopper-medium-v2"), ("hopper-medium", "hopper-medium-v"), ("", "-v")]
)
def test_an_unknown_name_is_refused_with_the_3_nearest(name, nearest):
    with pytest.raises(DatasetError, match=f"D4RL has no dataset '{name}'; the nearest names are") as caught:
        load(f"d4rl:{name}")
    near = str(caught.value).partition("names are ")[2].split(", ")
    assert len(near) == 3
    assert nearest in near[0]


def test_parts_and_tasks_are_refused(tmp_path):
    write(tmp_path / "cache" / "hopper_medium-v2.hdf5")
    with pytest.raises(DatasetError, match="part 'train' was asked for; D4RL's layout has no named parts"):
        load("d4rl:hopper-medium-v2", part="train")


@pytest.mark.parametrize("missing", ["d4rl", "gym", "tqdm"])
def test_without_the_package_or_what_it_needs_the_error_names_the_extra_and_the_way_without(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diffpolicy\[d4rl\]', or give the path of") as caught:
        load("d4rl:hopper-medium-v2")
    assert missing in str(caught.value)
    assert "\n" not in str(caught.value)
