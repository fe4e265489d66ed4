"""The zarr replay buffer: the real Push-T demonstrations, both zarr formats, and what is refused."""

import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpolicy.data.sources import load
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows
from diffpolicy.errors import DatasetError, MissingExtraError

zarr = pytest.importorskip("zarr", reason="the package zarr is not installed; pip install 'diffpolicy[zarr]'")

ENDS = np.array([3, 7])


def make_buffer(folder: Path, ends: np.ndarray | None = ENDS, version: int = 2, **arrays: np.ndarray | None) -> Path:
    """Two episodes of 3 and 4 rows; row i of the state is i + 1."""
    rows = np.arange(1, 8, dtype=np.float32)
    arrays = {"action": np.stack([10 * rows, -rows], axis=1), "state": rows[:, None], **arrays}
    root = zarr.open_group(str(folder), mode="w", zarr_format=version)
    for name, array in arrays.items():
        if array is not None:
            root.create_array(f"data/{name}", data=array)
    if ends is not None:
        root.create_array("meta/episode_ends", data=ends)
    return folder


def test_push_t_has_25650_steps_in_206_episodes_equal_to_zarrs_own_reading(shared_data):
    path = shared_data / "pusht_cchi_v7_replay.zarr"
    data, root = load(path), zarr.open_group(str(path), mode="r")
    ends = root["meta/episode_ends"][:]
    assert (data.steps, len(data)) == (25650, 206)
    np.testing.assert_array_equal(np.cumsum(data.length), ends)
    np.testing.assert_array_equal(data.action, root["data/action"][:])
    assert {name: array.shape for name, array in data.obs.items()} == {
        "keypoint": (25856, 18),
        "n_contacts": (25856, 1),
        "state": (25856, 5),
    }
    state = root["data/state"][:]
    np.testing.assert_array_equal(data.obs["state"][0], state[0])
    np.testing.assert_array_equal(data.obs["state"][-1], state[-1])
    is_final = np.isin(np.arange(25856), ends + np.arange(206))
    for name, array in data.obs.items():
        whole = root[f"data/{name}"][:].reshape(25650, -1)
        np.testing.assert_array_equal(array[~is_final], whole)
        np.testing.assert_array_equal(array[is_final], whole[ends - 1])
    assert data.action.min() >= 0
    assert data.action.max() <= 512


@pytest.mark.parametrize("version", [2, 3])
def test_both_zarr_formats_give_episodes_of_3_and_4_steps_by_hand(tmp_path, version):
    data = load(make_buffer(tmp_path / "buffer", version=version, grid=np.arange(42.0).reshape(7, 3, 2)))
    assert data.length.tolist() == [3, 4]
    assert data.obs["state"].ravel().tolist() == [1, 2, 3, 3, 4, 5, 6, 7, 7]
    assert data.action[:, 0].tolist() == [10, 20, 30, 40, 50, 60, 70]
    assert data.obs["grid"][4].tolist() == [18, 19, 20, 21, 22, 23]  # further axes are flattened
    assert not data.reward.any()
    assert not data.terminated.any()
    assert data.truncated.all()
    assert data.has_final is not None
    assert not data.has_final.any()
    assert data.meta == {"source": "zarr", "file": "buffer", "rewards": "none recorded"}


def test_the_last_step_of_an_episode_is_imitated_but_not_bootstrapped_from(tmp_path):
    data = load(make_buffer(tmp_path / "buffer"))
    spec = Spec({"state": (1,)}, 2, 1, 1, 1)
    assert len(Windows(data, spec)) == 7
    assert len(Windows(data, spec, require_next=True)) == 5


def test_images_are_left_out_unless_asked_for(tmp_path):
    image = np.arange(7 * 2 * 2 * 3, dtype=np.uint8).reshape(7, 2, 2, 3)
    path = make_buffer(tmp_path / "buffer", img=image)
    assert list(load(path).obs) == ["state"]
    asked = load(path, obs=["img", "state"])
    assert list(asked.obs) == ["img", "state"]
    np.testing.assert_array_equal(asked.obs["img"], image[[0, 1, 2, 2, 3, 4, 5, 6, 6]])
    with pytest.raises(DatasetError, match=r"there is no observation 'image'; the dataset has \['img', 'state'\]"):
        load(path, obs=["image"])


def test_the_timestamp_and_stage_of_a_real_robots_recorder_are_info_unless_asked_for(tmp_path):
    """real_env.py adds them to its episodes: seconds since 1970 in float64, and a whole number."""
    time, stage = 1.7e9 + np.arange(7) / 10, np.array([0, 0, 1, 0, 1, 1, 2])
    path = make_buffer(tmp_path / "buffer", timestamp=time, stage=stage)
    data = load(path)
    assert list(data.obs) == ["state"]
    assert list(data.info) == ["timestamp", "stage"]
    np.testing.assert_array_equal(data.info["timestamp"], time)
    np.testing.assert_array_equal(data.info["stage"], stage)
    assert (data.info["timestamp"].dtype, data.info["stage"].dtype) == (np.float64, np.int64)
    np.testing.assert_array_equal(data[1].info["timestamp"], time[3:])
    asked = load(path, obs=["state", "stage"])
    assert (list(asked.obs), list(asked.info)) == (["state", "stage"], ["timestamp"])
    assert asked.obs["stage"].ravel().tolist() == [0, 0, 1, 1, 0, 1, 1, 2, 2]


def test_a_buffer_with_nothing_but_timestamps_beside_its_actions_has_no_observations(tmp_path):
    with pytest.raises(DatasetError, match="no observations; wanted at least one"):
        load(make_buffer(tmp_path / "buffer", state=None, timestamp=np.arange(7.0)))


def test_a_timestamp_of_other_rows_than_the_episodes_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="data/timestamp has 6 rows, the episodes end at 7"):
        load(make_buffer(tmp_path / "buffer", timestamp=np.arange(6.0)))


def test_images_of_floats_from_0_to_255_become_uint8_and_others_are_refused(tmp_path):
    image = np.arange(7 * 2 * 2 * 3, dtype=np.float32).reshape(7, 2, 2, 3)
    data = load(make_buffer(tmp_path / "buffer", img=image), obs=["img"])
    assert data.obs["img"].dtype == np.uint8
    np.testing.assert_array_equal(data.obs["img"][[0, 8]], image[[0, 6]])
    for name, bad in {"unit": image / 84, "negative": image - 1, "nan": np.where(image == 5, np.nan, image)}.items():
        with pytest.raises(DatasetError, match=r"images in data/img range from .* wanted 0 to 255, uint8 or float"):
            load(make_buffer(tmp_path / name, img=bad), obs=["img"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ends": None}, "lacks meta/episode_ends; wanted data/action"),
        ({"action": None}, "lacks data/action; wanted data/action"),
        ({"state": None}, "no observations; wanted at least one"),
        ({"ends": np.array([7, 3])}, r"meta/episode_ends is \[7, 3\]...; wanted rising row numbers"),
        ({"ends": np.array([3, 3, 7])}, "wanted rising row numbers"),
        ({"ends": np.array([0, 7])}, "wanted rising row numbers"),
        ({"ends": np.array([], dtype=np.int64)}, r"is \[\]...; wanted rising row numbers"),
        ({"ends": np.array([3.5, 7.0])}, "wanted rising row numbers"),
        ({"ends": np.array([[3, 7]])}, "wanted rising row numbers"),
        ({"ends": np.array([3, 8])}, "data/action has 7 rows, the episodes end at 8; wanted as many"),
        ({"ends": np.array([3, 6])}, "data/action has 7 rows, the episodes end at 6; wanted as many"),
        ({"state": np.ones((6, 1))}, "data/state has 6 rows, the episodes end at 7"),
        ({"state": np.full((7, 1), np.inf)}, "obs 'state' holds inf in row 0; wanted finite numbers"),
        ({"state": np.array(["a"] * 7)}, "data/state has type <U1; wanted numbers"),
        ({"action": np.ones((7, 2), np.int64)}, "discrete action spaces are not supported"),
        ({"other": np.float32(3)}, "data/other has type float32; wanted numbers"),
    ],
)
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore:The data type")  # zarr's own, about text
def test_buffers_that_cannot_be_right_are_refused_in_one_line_with_their_path(tmp_path, changes, message, version):
    path = make_buffer(tmp_path / "buffer", version=version, **changes)
    with pytest.raises(DatasetError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_array_in_place_of_the_group_data_and_the_reverse_are_refused(tmp_path):
    root = zarr.open_group(str(tmp_path / "array"), mode="w", zarr_format=2)
    root.create_array("data", data=np.ones(3))
    root.create_array("meta/episode_ends", data=np.array([3]))
    with pytest.raises(DatasetError, match="data cannot be read"):
        load(tmp_path / "array")
    root = zarr.open_group(str(tmp_path / "group"), mode="w", zarr_format=2)
    root.create_array("data/action", data=np.ones((3, 1)))
    root.create_group("meta/episode_ends")
    with pytest.raises(DatasetError, match="meta/episode_ends cannot be read"):
        load(tmp_path / "group")


@pytest.mark.parametrize("damage", [b"", b"\x02\x01\x94\x04", "first 100 bytes", "noise"])
def test_a_damaged_chunk_of_push_t_is_refused_by_the_name_of_its_array(tmp_path, shared_data, damage):
    path = tmp_path / "pusht.zarr"
    original = shared_data / "pusht_cchi_v7_replay.zarr"
    shutil.copytree(
        original, path, ignore=shutil.ignore_patterns("img", "keypoint", "n_contacts"), copy_function=shutil.copyfile
    )
    chunk = path / "data" / "state" / "10.0"
    whole = chunk.read_bytes()
    noise = whole[:16] + np.random.default_rng(0).bytes(len(whole) - 16)
    chunk.write_bytes({"first 100 bytes": whole[:100], "noise": noise}.get(str(damage), damage))
    with pytest.raises(
        DatasetError, match=r"pusht\.zarr: data/state cannot be read .*; copy the dataset again"
    ) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["zarr.json", "data/state/zarr.json", "meta/episode_ends/zarr.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '{"zarr_format": 9, "node_type": "array"}'])
def test_damaged_metadata_is_refused_in_one_line(tmp_path, name, text):
    path = make_buffer(tmp_path / "buffer", version=3)
    (path / name).write_text(text)
    with pytest.raises(DatasetError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["filters", "compressor"])
@pytest.mark.parametrize("dtype", ["<f4", "|O"])
def test_a_chunk_that_asks_to_be_unpickled_is_refused_and_not_executed(tmp_path, bomb, place, dtype):
    path = make_buffer(tmp_path / "buffer")
    metadata = path / "data" / "state" / ".zarray"
    codec = {"id": "pickle", "protocol": 4}
    changes = {"filters": [codec], "compressor": None} if place == "filters" else {"compressor": codec}
    header = json.loads(metadata.read_text()) | changes | {"dtype": dtype, "fill_value": None}
    metadata.write_text(json.dumps(header))
    (path / "data" / "state" / "0.0").write_bytes(pickle.dumps(bomb))
    with pytest.raises(DatasetError, match="cannot be read"):
        load(path)
    assert not bomb.mark.exists()


def test_without_the_package_zarr_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = make_buffer(tmp_path / "buffer")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(MissingExtraError, match=r"needs the zarr package; pip install 'diffpolicy\[zarr\]'"):
        load(path)


def test_a_missing_chunk_is_refused_and_not_read_as_zeros(tmp_path):
    path = make_buffer(tmp_path / "buffer")
    (path / "data" / "state" / "0.0").unlink()
    with pytest.raises(DatasetError, match=r"the chunk data/state/0\.0 is missing and would read as zeros"):
        load(path)


def zeros_packed_by(codec: str, size: int) -> bytes:
    from numcodecs import blosc, gzip, lz4, zlib, zstd

    packers = {"gzip": gzip.GZip(), "zlib": zlib.Zlib(), "zstd": zstd.Zstd(), "lz4": lz4.LZ4()}
    return bytes({**packers, "blosc": blosc.Blosc()}[codec].encode(np.zeros(size, np.uint8)))


@pytest.mark.parametrize("codec", ["gzip", "zlib", "zstd", "lz4", "blosc"])
def test_a_chunk_of_28_bytes_that_unpacks_to_50_million_is_refused_and_one_that_does_not_is_read(tmp_path, codec):
    path = make_buffer(tmp_path / "buffer")
    metadata = path / "data" / "state" / ".zarray"
    extra = {"blosc": {"cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}, "lz4": {"acceleration": 1}}
    compressor = {"id": codec, **extra.get(codec, {"level": 5})}
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"compressor": compressor, "filters": None}))
    chunk = path / "data" / "state" / "0.0"
    chunk.write_bytes(zeros_packed_by(codec, 28))
    assert not load(path).obs["state"].any()
    chunk.write_bytes(zeros_packed_by(codec, 50_000_000))
    with pytest.raises(
        DatasetError, match=r"the chunk data/state/0\.0 unpacks to more than its 28 bytes; do not trust"
    ):
        load(path)


@pytest.mark.parametrize("version", [2, 3])
def test_a_zip_of_a_replay_buffer_reads_as_its_folder_does(tmp_path, version):
    folder = make_buffer(tmp_path / "buffer", version=version)
    archive = Path(shutil.make_archive(str(tmp_path / "buffer.zarr"), "zip", folder))
    for name, array in load(archive).arrays().items():
        np.testing.assert_array_equal(array, load(folder).arrays()[name])


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "data/../../outside"])
def test_a_zip_with_a_member_outside_of_it_is_refused(tmp_path, name):
    archive = Path(shutil.make_archive(str(tmp_path / "buffer.zarr"), "zip", make_buffer(tmp_path / "buffer")))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, b"")
    with pytest.raises(DatasetError, match=r"has a member .* outside of it; do not trust this file"):
        load(archive)


def test_a_zip_with_a_gigabyte_of_metadata_is_refused_before_it_is_unpacked(tmp_path):
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(".zgroup", b" " * (17 << 20))
    with pytest.raises(DatasetError, match=r"\.zgroup unpacks to 17825792 bytes; do not trust it"):
        load(archive)


def test_96_by_96_images_of_the_real_push_t_and_its_state_come_as_windows(shared_data):
    path = shared_data / "pusht_cchi_v7_replay.zarr"
    data = load(path, obs=["img", "state"])
    root = zarr.open_group(str(path), mode="r")
    spec = Spec.from_episodes(data, horizon=16, n_obs_steps=2, n_action_steps=8)
    # Row 5000 lies within an episode, and in another chunk of the file than row 4999 need not.
    batch = Windows(data, spec).gather(torch.tensor([5000, 0]))
    assert batch.obs["img"].shape == (2, 2, 96, 96, 3)
    assert batch.obs["img"].dtype == torch.uint8
    images, state = root["data/img"][4999:5001], root["data/state"][4999:5001]
    np.testing.assert_array_equal(batch.obs["img"][0].numpy(), np.rint(images))
    np.testing.assert_array_equal(batch.obs["state"][0].numpy(), state)
    np.testing.assert_array_equal(batch.obs["img"][1, 0], batch.obs["img"][1, 1])
