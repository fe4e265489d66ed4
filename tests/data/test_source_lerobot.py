"""LeRobot's datasets: a fixture of lerobot's own writing, a real one, and what is refused."""

import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.make_lerobot_v3 import FOLDER, LENGTHS, TASKS, content

from diffpolicy.data import store
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import lerobot as source
from diffpolicy.data.sources.reading import Wanted, in_memory
from diffpolicy.errors import DatasetError, MissingExtraError

pa = pytest.importorskip("pyarrow", reason="the package pyarrow is not installed; pip install 'diffpolicy[lerobot]'")
pq = pytest.importorskip("pyarrow.parquet")

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
N, E = sum(LENGTHS), len(LENGTHS)


def read(path: Path, **wanted: Any) -> Episodes:
    assert source.recognises(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return source.load(path, Wanted(**wanted))


def refused(path: Path, **wanted: Any) -> str:
    """The one line with which reading is refused, without the path that it must contain."""
    with pytest.raises(DatasetError) as caught:
        source.load(path, Wanted(**wanted))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "PATH")


def copy(folder: Path) -> Path:
    return Path(shutil.copytree(FOLDER, folder, copy_function=shutil.copyfile))


def change_info(folder: Path, **changes: Any) -> Path:
    """Replace entries of info.json; a feature's entry of None takes the feature out."""
    file = folder / "meta" / "info.json"
    info = json.loads(file.read_text())
    features = info["features"] | changes.pop("features", {})
    info = info | {"features": {name: value for name, value in features.items() if value is not None}} | changes
    file.write_text(json.dumps(info))
    return folder


def change_rows(folder: Path, change: Callable[[Any], Any], file: str = DATA) -> Path:
    table = change(pq.read_table(folder / file, partitioning=None))
    pq.write_table(table, folder / file)
    return folder


def set_column(name: str, values: Any) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        if name not in table.column_names:
            return table.append_column(name, pa.array(values))
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    return change


def add_column(folder: Path, name: str, dtype: str, shape: list[int], values: Any) -> Path:
    change_info(folder, features={name: {"dtype": dtype, "shape": shape}})
    return change_rows(folder, set_column(name, values))


def make_v21(folder: Path, version: str = "v2.1") -> Path:
    """The fixture's content in the older layout, by hand: a file an episode, lists without a fixed size."""
    info = json.loads((FOLDER / "meta" / "info.json").read_text()) | {"codebase_version": version}
    (folder / "meta").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    tasks = list(dict.fromkeys(TASKS))
    lines = {
        "tasks": [{"task_index": i, "task": task} for i, task in enumerate(tasks)],
        "episodes": [{"episode_index": e, "tasks": [TASKS[e]], "length": LENGTHS[e]} for e in range(E)],
    }
    for name, rows in lines.items():
        (folder / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for e, length in enumerate(LENGTHS):
        columns = {name: values.tolist() for name, values in content(e).items()}
        columns["next.reward"] = [value for (value,) in columns["next.reward"]]
        table = pa.table(
            {
                **{name: pa.array(values, _kind(values)) for name, values in columns.items()},
                "timestamp": pa.array(np.arange(length) / 10, pa.float32()),
                "frame_index": np.arange(length),
                "episode_index": np.full(length, e),
                "task_index": np.full(length, tasks.index(TASKS[e])),
            }
        )
        pq.write_table(table, folder / "data" / "chunk-000" / f"episode_{e:06d}.parquet")
    return folder


def _kind(values: list[Any]) -> Any:
    return pa.list_(pa.float32()) if isinstance(values[0], list) else pa.float32()


def make_two_files(folder: Path) -> Path:
    """The fixture with its last episode in further files, the table of episodes in reverse."""
    copy(folder)
    for file, first in ((DATA, N - LENGTHS[-1]), (EPISODES, E - 1)):
        table = pq.read_table(folder / file, partitioning=None)
        pq.write_table(table.slice(0, first), folder / file.replace("file-000", "file-001"))
        pq.write_table(table.slice(first), folder / file)
    first, second = folder / DATA, folder / DATA.replace("file-000", "file-001")
    swapped = first.with_name("swap")
    first.rename(swapped), second.rename(first), swapped.rename(second)
    return folder


def assert_equal(one: Episodes, other: Episodes) -> None:
    for name in ("action", "reward", "length", "terminated", "truncated", "has_final"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for group in ("obs", "info"):
        ones, others = getattr(one, group), getattr(other, group)
        assert sorted(ones) == sorted(others)
        for name in ones:
            assert ones[name].dtype == others[name].dtype
            np.testing.assert_array_equal(ones[name], others[name])


def test_three_episodes_written_by_lerobot_0_4_4_equal_the_formula_that_they_were_written_from():
    data = read(FOLDER)
    assert data.length.tolist() == [4, 7, 5]
    assert sorted(data.obs) == ["observation.environment_state", "observation.state"]
    for e in range(E):
        wanted, got = content(e), data[e]
        for name, array in got.obs.items():
            np.testing.assert_array_equal(array[:-1], wanted[name])
            np.testing.assert_array_equal(array[-1], wanted[name][-1])
        np.testing.assert_array_equal(got.action, wanted["action"])
        np.testing.assert_array_equal(got.reward, wanted["next.reward"][:, 0])
        np.testing.assert_array_equal(got.info["timestamp"], np.arange(LENGTHS[e], dtype=np.float32) / np.float32(10))
        assert (got.terminated, got.truncated, got.has_final) == (False, True, False)
    assert data.info["task_index"].tolist() == [0] * 11 + [1] * 5
    assert data.meta == {
        "source": "lerobot",
        "file": "lerobot_v3",
        "codebase_version": "v3.0",
        "control_period": 0.1,
        "robot_type": "block",
        "tasks": {"0": "push the block", "1": "pull it back"},
    }
    assert {array.dtype for array in (*data.obs.values(), data.action, data.reward)} == {np.dtype(np.float32)}


@pytest.mark.filterwarnings("ignore:.*left out")
def test_35965_frames_of_100_real_episodes_equal_pyarrows_own_reading_in_under_5_seconds(shared_data):
    path = shared_data / "lerobot_v21"
    start = time.perf_counter()
    data = source.load(path, Wanted())
    assert time.perf_counter() - start < 5
    info = json.loads((path / "meta" / "info.json").read_text())
    assert (len(data), data.steps) == (info["total_episodes"], info["total_frames"]) == (100, 35965)
    assert data.action.shape == (35965, 26)
    assert {name: array.shape for name, array in data.obs.items()} == {"observation.state": (36065, 26)}
    for e, file in enumerate(sorted(path.glob("data/chunk-*/*.parquet"))):
        table, got = pq.read_table(file, partitioning=None), data[e]
        for name, array in (("action", got.action), ("observation.state", got.obs["observation.state"][:-1])):
            np.testing.assert_array_equal(array, np.reshape(table[name].combine_chunks().flatten(), (-1, 26)))
        np.testing.assert_array_equal(got.info["timestamp"], table["timestamp"])
        np.testing.assert_array_equal(got.obs["observation.state"][-1], got.obs["observation.state"][-2])
    assert not data.reward.any()
    assert data.meta["rewards"] == "none recorded"
    assert data.meta["control_period"] == 1 / 30
    assert data.meta["tasks"] == {"0": "Pick up the yellow bottle on the table."}


def test_one_warning_names_the_video_of_the_real_dataset(shared_data):
    with pytest.warns(UserWarning) as caught:
        source.load(shared_data / "lerobot_v21", Wanted())
    assert [str(warning.message) for warning in caught] == [
        f"{shared_data / 'lerobot_v21'}: left out observation.images.cam_high (video); this version reads numbers only"
    ]


@pytest.mark.parametrize(
    "make",
    [make_v21, lambda folder: make_v21(folder, "v2.0"), make_two_files],
    ids=["v2.1", "v2.0", "v3.0 in two files"],
)
def test_the_same_16_steps_in_another_layout_give_equal_episodes(tmp_path, make):
    data, wanted = read(make(tmp_path / "data")), read(FOLDER)
    assert_equal(data, wanted)
    assert data.meta["tasks"] == wanted.meta["tasks"]


@pytest.mark.parametrize("block_bytes", [1, 100, 300])
def test_batches_that_end_anywhere_in_an_episode_give_equal_episodes(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(source, "BLOCK_BYTES", block_bytes)
    assert_equal(read(make_v21(tmp_path / "data")), read(FOLDER))


def test_a_store_filled_in_place_equals_what_is_read_into_memory(tmp_path):
    with store.writing(tmp_path / "store") as folder:
        folder.finish(read(FOLDER, allocate=folder.allocate))
    assert_equal(store.load(tmp_path / "store"), read(FOLDER))


@pytest.mark.parametrize(("split", "episodes"), [("0:1", [0]), ("1:3", [1, 2]), ("1:2", [1]), ("0:3", [0, 1, 2])])
@pytest.mark.parametrize("make", [copy, make_v21])
def test_a_part_is_a_split_of_info_json(tmp_path, make, split, episodes):
    path = change_info(make(tmp_path / "data"), splits={"train": split})
    data = read(path, part="train")
    assert_equal(data, read(FOLDER).select(episodes))
    assert data.meta["part"] == "train"


def test_a_part_or_task_that_is_not_there_is_refused(tmp_path):
    path = copy(tmp_path / "data")
    assert refused(path, part="val") == (
        "PATH: meta/info.json has no split 'val'; it has ['train']: choose one, or leave the part out"
    )
    assert "a LeRobot dataset has its own rewards" in source_error(task="push")


def source_error(**wanted: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        source.load(FOLDER, Wanted(**wanted))
    return str(caught.value)


@pytest.mark.parametrize("split", ["0:4", "2:2", "-1:2", "all", "0:1:2", 3, ["0:1"], None])
def test_a_split_that_is_no_range_of_episodes_is_refused(tmp_path, split):
    message = refused(change_info(copy(tmp_path / "data"), splits={"train": split}), part="train")
    assert message == (
        f"PATH: meta/info.json has the split 'train' {split!r}; wanted 'first:stop' within the 3 episodes: correct it"
    )


def test_done_and_success_go_to_info_and_terminate_nothing(tmp_path):
    path = copy(tmp_path / "data")
    done = np.isin(np.arange(N), np.cumsum(LENGTHS) - 1)
    add_column(path, "next.done", "bool", [1], done)
    add_column(path, "next.success", "bool", [1], done)
    data = read(path)
    np.testing.assert_array_equal(data.info["next.done"], done)
    np.testing.assert_array_equal(data.info["next.success"], done)
    assert not data.terminated.any()
    assert sorted(data.obs) == ["observation.environment_state", "observation.state"]


def test_without_next_reward_the_rewards_are_zero_and_meta_says_so(tmp_path):
    data = read(change_info(copy(tmp_path / "data"), features={"next.reward": None}))
    assert not data.reward.any()
    assert data.meta["rewards"] == "none recorded"


def test_further_actions_and_the_future_are_no_observations(tmp_path):
    path = copy(tmp_path / "data")
    add_column(path, "action.gripper", "float32", [1], np.ones(N, np.float32))
    add_column(path, "next.state", "float32", [1], np.ones(N, np.float32))
    add_column(path, "observation.state.left", "float32", [1], np.arange(N, dtype=np.float32))
    data = read(path)
    assert sorted(data.obs) == ["observation.environment_state", "observation.state", "observation.state.left"]
    assert data[1].obs["observation.state.left"].ravel().tolist() == [4, 5, 6, 7, 8, 9, 10, 10]


def test_only_features_called_observation_are_observed_as_lerobots_policies_have_it(tmp_path):
    path = copy(tmp_path / "data")
    add_column(path, "is_episode_successful", "bool", [1], np.ones(N, bool))
    add_column(path, "force", "float32", [1], np.arange(N, dtype=np.float32))
    with pytest.warns(UserWarning, match="left out is_episode_successful, force, by their names no observations"):
        assert sorted(source.load(path, Wanted()).obs) == ["observation.environment_state", "observation.state"]
    assert read(path, obs=["force"])[1].obs["force"].ravel().tolist() == [4, 5, 6, 7, 8, 9, 10, 10]


OUTCOMES = ("perfect_action", "action_dict.position", "actions.raw", "is_first", "is_terminal", "discount", "success")
OUTCOMES += ("is_episode_successful", "complementary_info.discrete_penalty", "gripper.is_done", "next.state")


@pytest.mark.parametrize("name", OUTCOMES)
def test_without_such_names_what_was_done_and_how_it_went_is_not_observed(tmp_path, name):
    plain = {"observation.state": "state", "observation.environment_state": "interaction"}
    path = rename(copy(tmp_path / "data"), plain)
    add_column(path, name, "float32", [1], np.ones(N, np.float32))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert sorted(source.load(path, Wanted()).obs) == ["interaction", "state"]
    assert [name in str(warning.message) for warning in caught] == ([] if name == "next.state" else [True])


def test_state_actions_and_reward_as_other_converters_name_them_read_the_same(tmp_path):
    """openpi's conversion of LIBERO writes `state` and `actions`, LeRobot's of DROID `reward`."""
    whole = {"action": "actions", "next.reward": "reward", "observation.state": "state"}
    path = rename(copy(tmp_path / "data"), whole | {"observation.environment_state": "environment"})
    data, usual = read(path), read(FOLDER)
    assert data.reward.any()
    np.testing.assert_array_equal(data.action, usual.action)
    np.testing.assert_array_equal(data.reward, usual.reward)
    np.testing.assert_array_equal(data.obs["state"], usual.obs["observation.state"])
    assert sorted(data.obs) == ["environment", "state"]


def rename(folder: Path, names: dict[str, str]) -> Path:
    """Rename features in info.json and in the rows."""
    features = json.loads((folder / "meta" / "info.json").read_text())["features"]
    change_info(folder, features={old: None for old in names} | {new: features[old] for old, new in names.items()})
    return change_rows(folder, lambda table: table.rename_columns([names.get(n, n) for n in table.column_names]))


def test_a_table_a_row_is_flattened_and_an_image_of_numbers_read_only_when_asked_for(tmp_path):
    path, image = copy(tmp_path / "data"), np.arange(N * 8, dtype=np.uint8).reshape(N, 2, 2, 2)
    add_column(path, "observation.grid", "uint8", [2, 4], [row.reshape(2, 4).tolist() for row in image])
    add_column(path, "observation.image", "uint8", [2, 2, 2], image.tolist())
    change_rows(path, set_column("observation.grid", pa.array(image.reshape(N, 2, 4).tolist(), nested(2))))
    change_rows(path, set_column("observation.image", pa.array(image.tolist(), nested(3))))
    assert "observation.image" not in read(path).obs
    assert read(path).obs["observation.grid"][0].tolist() == list(range(8))
    asked = read(path, obs=["observation.image"])
    assert list(asked.obs) == ["observation.image"]
    np.testing.assert_array_equal(asked[2].obs["observation.image"][:-1], image[11:])


def nested(axes: int) -> Any:
    kind = pa.uint8()
    for _ in range(axes):
        kind = pa.list_(kind)
    return kind


def test_video_images_and_text_are_left_out_with_one_warning_and_refused_when_asked_for(tmp_path):
    path = copy(tmp_path / "data")
    add_column(path, "observation.images.wrist", "image", [8, 8, 3], [{"bytes": b"png", "path": "x"}] * N)
    add_column(path, "language", "string", [1], ["push"] * N)
    change_info(path, features={"observation.images.top": {"dtype": "video", "shape": [8, 8, 3]}})
    with pytest.warns(UserWarning) as caught:
        data = source.load(path, Wanted())
    assert [str(warning.message) for warning in caught] == [
        f"{path}: left out observation.images.wrist (image), language (string), observation.images.top (video); this "
        "version reads numbers only"
    ]
    assert_equal(data, read(FOLDER))
    assert data.meta["left_out"] == {
        "observation.images.wrist": "image",
        "language": "string",
        "observation.images.top": "video",
    }
    assert list(read(path, obs=["observation.state"]).obs) == ["observation.state"]  # and no warning
    assert refused(path, obs=["observation.images.top"]) == (
        "PATH: meta/info.json says that observation.images.top is video, which is not read; choose of "
        "['observation.environment_state', 'observation.state']"
    )
    change_info(path, features={"observation.state": None, "observation.environment_state": None})
    assert "has no observations of numbers, only observation.images.wrist (image)" in refused(path)


def test_numbers_of_higher_precision_than_declared_are_read_as_declared(tmp_path):
    reward = np.arange(N, dtype=np.float64) / 3
    data = read(change_rows(copy(tmp_path / "data"), set_column("next.reward", reward)))
    np.testing.assert_array_equal(data.reward, reward.astype(np.float32))


def test_the_path_templates_of_info_json_are_never_used(tmp_path):
    path = change_info(
        copy(tmp_path / "data"), data_path="{0.__class__}/../../../etc/passwd", video_path="{x!r:>9999999}"
    )
    assert_equal(read(path), read(FOLDER))


@pytest.mark.parametrize(
    ("make", "file"),
    [(copy, DATA), (make_two_files, DATA.replace("000.p", "001.p"))],
    ids=["the only file", "the second file"],
)
def test_a_missing_file_of_v3_is_refused_with_both_totals(tmp_path, make, file):
    path = make(tmp_path / "data")
    rows = N - pq.read_metadata(path / file).num_rows
    (path / file).unlink()
    assert refused(path) == (
        f"PATH: meta/info.json declares 16 frames, the files in data/ have {rows} rows; wanted as many: a file is "
        "missing or of another dataset, copy it again"
    )


@pytest.mark.parametrize("episode", [0, 1, 2])
def test_a_missing_file_of_v21_is_refused_by_its_name(tmp_path, episode):
    path = make_v21(tmp_path / "data")
    (path / f"data/chunk-000/episode_{episode:06d}.parquet").unlink()
    assert refused(path) == f"PATH lacks data/chunk-*/episode_{episode:06d}.parquet; copy the dataset again"


@pytest.mark.parametrize(
    ("file", "what"),
    [
        (EPISODES, f"PATH/{EPISODES}: the file"),
        ("meta/tasks.parquet", "PATH/meta/tasks.parquet: the file"),
        ("meta/info.json", "PATH: meta/info.json"),
        (DATA, f"PATH/{DATA}: the file"),
    ],
)
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.95, -1])
def test_a_file_cut_short_anywhere_is_refused_by_its_name(tmp_path, file, what, keep):
    path = copy(tmp_path / "data")
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    message = refused(path)
    assert message.startswith(f"{what} cannot be read (")
    assert message.endswith("; copy the dataset again")


@pytest.mark.parametrize("name", ["episodes", "tasks"])
@pytest.mark.parametrize("text", [None, "{", "[]\n", "3\n", '{"task_index": "x", "episode_index": 0}\n', "[" * 9999])
def test_a_damaged_table_of_v21_is_refused_by_its_name(tmp_path, name, text):
    path = make_v21(tmp_path / "data")
    file = path / "meta" / f"{name}.jsonl"
    file.unlink() if text is None else file.write_text(text)
    assert refused(path).startswith(f"PATH: the table of {name} in meta/ cannot be read (")


@pytest.mark.parametrize("name", ["observation.state", "action", "next.reward", "timestamp", "frame_index"])
@pytest.mark.parametrize("make", [copy, make_v21])
def test_a_missing_column_is_refused_by_its_name_and_file(tmp_path, make, name):
    path = make(tmp_path / "data")
    file = sorted(path.glob("data/*/*"))[-1].relative_to(path)
    change_rows(path, lambda table: table.drop_columns([name]), str(file))
    assert refused(path) == (
        f"PATH/{file} lacks the column {name}, which meta/info.json declares; copy the dataset again"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_frames": 17}, "declares 17 frames, the files in data/ have 16 rows; wanted as many"),
        ({"total_frames": 10**30}, f"declares {10**30} frames, the files in data/ have 16 rows; wanted as many"),
        ({"total_frames": 16.5}, "has total_frames 16.5; wanted what lerobot writes"),
        ({"total_episodes": 2}, "declares 2 episodes, the table of episodes has 3 rows; wanted each number"),
        ({"total_episodes": 10**30}, "declares 1" + "0" * 30 + " episodes, the table of episodes has 3 rows"),
        ({"total_episodes": None}, "has total_episodes None; wanted what lerobot writes"),
        ({"fps": 0}, "has fps 0; wanted frames per second above 0"),
        ({"fps": float("nan")}, "has fps nan; wanted frames per second above 0"),
        ({"fps": "10"}, "has fps '10'; wanted what lerobot writes"),
        ({"features": {"action": None}}, "has no feature action of numbers; it has ["),
        ({"features": {"action": {"dtype": "string", "shape": [2]}}}, "has no feature action of numbers; it has ["),
        ({"features": {"action": {"dtype": "float32", "shape": [2, 1]}}}, "has actions of shape (2, 1); wanted a flat"),
        ({"features": {"frame_index": None}}, "has no feature frame_index of numbers; it has ["),
        ({"features": {"action": {"dtype": "float32", "shape": [0]}}}, "has action of shape [0]; wanted sizes above 0"),
        ({"features": {"action": {"dtype": "float32", "shape": 2}}}, "has action of shape 2; wanted sizes above 0"),
        ({"features": {"action": {"dtype": "float32"}}}, "has action of shape None; wanted sizes above 0"),
        ({"features": {"../x": {"dtype": "float32", "shape": [1]}}}, "has a feature '../x'; wanted a name without '/'"),
        ({"features": {"a\nb": 3}}, r"has a feature 'a\nb'; wanted a name without '/'"),
        (
            {"features": {"next.reward": {"dtype": "float32", "shape": [2]}}},
            "has next.reward of shape (2,); wanted one",
        ),
        ({"splits": 3}, "has splits 3; wanted what lerobot writes"),
    ],
)
def test_an_info_json_that_lies_is_refused_with_what_it_says(tmp_path, changes, message):
    assert refused(change_info(copy(tmp_path / "data"), **changes)).startswith(f"PATH: meta/info.json {message}")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '"v3.0"', "\xff\xfe", "[" * 99999])
def test_an_info_json_that_is_no_json_object_is_refused(tmp_path, text):
    path = copy(tmp_path / "data")
    (path / "meta" / "info.json").write_text(text, encoding="latin-1")
    assert refused(path).startswith("PATH: meta/info.json cannot be read (")


@pytest.mark.parametrize("version", ["v1.6", "v2.2", "v4.0", "3.0", "", None, ["v3.0"]])
def test_another_version_is_refused_with_those_that_are_read(tmp_path, version):
    message = refused(change_info(copy(tmp_path / "data"), codebase_version=version))
    assert message == (
        f"PATH is of LeRobot's format {str(version)!r}; wanted one of v2.0, v2.1, v3.0: convert an older one with "
        "lerobot, update diffpolicy for a newer one"
    )


def test_version_1_with_its_other_folders_is_recognised_and_refused(tmp_path):
    (tmp_path / "meta_data").mkdir()
    (tmp_path / "meta_data" / "info.json").write_text('{"codebase_version": "v1.6", "fps": 10, "video": true}')
    assert source.recognises(tmp_path)
    assert refused(tmp_path).startswith("PATH is of LeRobot's format 'v1.6'; wanted one of v2.0, v2.1, v3.0")


def swap(one: int, other: int) -> Callable[[Any], Any]:
    order = np.arange(N)
    order[[one, other]] = [other, one]
    return lambda table: table.take(order)


ORDER = "whole episodes in order as meta/ lists them: write the dataset again"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap(5, 6), "frame_index is 2 in row 5; wanted 1"),
        (swap(3, 4), "episode_index is 1 in row 3; wanted 0"),
        (swap(2, 13), "episode_index is 2 in row 2; wanted 0"),
        (set_column("frame_index", [0, 1, 2, 1, *range(7), *range(5)]), "frame_index is 1 in row 3; wanted 3"),
        (set_column("frame_index", [0, 1, 2, 3, *range(1, 8), *range(5)]), "frame_index is 1 in row 4; wanted 0"),
        (set_column("episode_index", [0] * 4 + [2] * 7 + [1] * 5), "episode_index is 2 in row 4; wanted 1"),
        (set_column("episode_index", [1] * 4 + [2] * 7 + [3] * 5), "episode_index is 1 in row 0; wanted 0"),
    ],
)
def test_rows_out_of_order_are_refused_by_the_first_of_them(tmp_path, change, message):
    assert refused(change_rows(copy(tmp_path / "data"), change)) == f"PATH/{DATA}: {message}, {ORDER}"


def test_an_episode_interleaved_over_two_files_is_refused(tmp_path):
    path = make_two_files(tmp_path / "data")
    tables = [pq.read_table(path / file, partitioning=None) for file in (DATA, DATA.replace("000.p", "001.p"))]
    rows = pa.concat_tables(tables)
    odd = np.arange(N) % 2 == 1
    pq.write_table(rows.filter(pa.array(~odd)), path / DATA)
    pq.write_table(rows.filter(pa.array(odd)), path / DATA.replace("000.p", "001.p"))
    assert refused(path) == f"PATH/{DATA}: episode_index is 1 in row 2; wanted 0, {ORDER}"


def test_two_files_of_v21_that_changed_names_are_refused(tmp_path):
    path = make_v21(tmp_path / "data")
    folder = path / "data" / "chunk-000"
    (folder / "episode_000000.parquet").rename(folder / "swap")
    (folder / "episode_000001.parquet").rename(folder / "episode_000000.parquet")
    (folder / "swap").rename(folder / "episode_000001.parquet")
    message = "episode_index is 1 in row 0; wanted 0"
    assert refused(path) == f"PATH/data/chunk-000/episode_000000.parquet: {message}, {ORDER}"


ROWS = [[1.0, 2.0, 3.0]] * N


@pytest.mark.parametrize(
    "values",
    [
        [*ROWS[1:], [1.0]],
        [*ROWS[2:], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0]],
        [*ROWS[1:], None],
        [*ROWS[1:], []],
        [*ROWS[1:], [1.0, None, 3.0]],
        [[1.0, 2.0]] * N,
        [1.0] * N,
        [[row] for row in ROWS],
    ],
    ids=["one shorter", "as many in all", "one none", "one empty", "a number none", "all shorter", "flat", "deeper"],
)
def test_rows_of_another_size_than_declared_are_refused_by_their_name(tmp_path, values):
    kind = pa.array(values).type
    column = pa.array(
        values, pa.list_(pa.float32()) if pa.types.is_list(kind) and kind.value_type == pa.float64() else kind
    )
    path = change_rows(copy(tmp_path / "data"), set_column("observation.state", column))
    assert refused(path) == (
        f"PATH/{DATA}: observation.state has rows that are empty or not of the shape (3,) that meta/info.json "
        "declares; write the dataset again"
    )


@pytest.mark.parametrize(
    ("values", "kind"),
    [(["a"] * N, "string"), ([b"a"] * N, "binary"), ([1.5] * N, "double")],
)
def test_a_column_of_another_type_than_declared_is_refused(tmp_path, values, kind):
    name, declared = ("task_index", "int64") if kind == "double" else ("next.reward", "float32")
    path = change_rows(copy(tmp_path / "data"), set_column(name, values))
    assert refused(path) == f"PATH/{DATA}: {name} is {kind}, meta/info.json declares {declared}; correct one of them"


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ([4, 7, 6], "declares 16 frames, the table of episodes 17, of at least 4 each; wanted as many"),
        ([4, 12, 0], "declares 16 frames, the table of episodes 16, of at least 0 each; wanted as many"),
        ([-4, 15, 5], "declares 16 frames, the table of episodes 16, of at least -4 each; wanted as many"),
    ],
)
def test_lengths_that_lie_are_refused_with_their_sum(tmp_path, length, message):
    path = change_rows(copy(tmp_path / "data"), set_column("length", length), EPISODES)
    assert refused(path).startswith(f"PATH: meta/info.json {message}")


def test_lengths_with_the_right_sum_that_lie_are_refused_by_the_first_row_that_tells(tmp_path):
    path = change_rows(copy(tmp_path / "data"), set_column("length", [5, 6, 5]), EPISODES)
    assert refused(path) == f"PATH/{DATA}: episode_index is 1 in row 4; wanted 0, {ORDER}"


def test_episodes_that_are_listed_twice_are_refused(tmp_path):
    path = change_rows(copy(tmp_path / "data"), set_column("episode_index", [0, 1, 1]), EPISODES)
    assert refused(path).startswith(
        "PATH: meta/info.json declares 3 episodes, the table of episodes has 3 rows; wanted"
    )


def test_a_million_rows_in_a_file_of_a_few_bytes_are_refused_before_they_are_allocated(tmp_path):
    path, n = change_info(copy(tmp_path / "data"), total_frames=1_000_000), 1_000_000
    table = pq.read_table(path / DATA, partitioning=None).slice(0, 1)
    pq.write_table(table.take(np.zeros(n, np.int64)), path / DATA, compression="zstd")
    assert (path / DATA).stat().st_size < 100_000
    change_rows(path, set_column("length", [4, 7, n - 11]), EPISODES)
    with pytest.raises(
        DatasetError, match=r"declares 0\.044 GB, most of it in obs/observation\.state, and 0\.001 GB may"
    ):
        read(path, allocate=in_memory(1_000_000))


def test_a_number_that_is_not_finite_is_refused_by_its_row(tmp_path):
    reward = np.zeros(N, np.float32)
    reward[5] = np.nan
    path = change_rows(copy(tmp_path / "data"), set_column("next.reward", reward))
    with pytest.raises(DatasetError, match="reward holds nan in row 5; wanted finite numbers"):
        read(path)


def test_whole_number_actions_are_refused_as_discrete(tmp_path):
    path = copy(tmp_path / "data")
    add_column(path, "action", "int64", [1], np.arange(N))
    with pytest.raises(DatasetError, match="discrete action spaces are not supported"):
        read(path)


def test_a_folder_of_something_else_is_not_recognised(tmp_path):
    (tmp_path / "meta").mkdir()
    assert not source.recognises(tmp_path)
    assert not source.recognises(FOLDER / "meta" / "info.json")
    assert not source.recognises(tmp_path / "nowhere")


def test_without_the_package_pyarrow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"needs the pyarrow package; pip install 'diffpolicy\[lerobot\]'"):
        source.load(FOLDER, Wanted())
