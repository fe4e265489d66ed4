"""Files that cannot be right: each is refused in one line that says what came, what was wanted and what to do."""

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from diffpolicy.data.sources import load
from diffpolicy.errors import DatasetError

N = 6
LAYOUT = "wanted D4RL's observations, actions, rewards, terminals"


def refused(path: Path) -> str:
    """The one line with which loading is refused, without the path that it must contain."""
    with pytest.raises(DatasetError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "PATH")


def make_hdf5(path: Path, **changes: object) -> Path:
    """Two good episodes of three steps, but for the changes; None leaves an array out, a dict makes a group."""
    arrays: dict[str, object] = {
        "observations": np.ones((N, 3), np.float32),
        "actions": np.zeros((N, 2), np.float32),
        "rewards": np.zeros(N, np.float32),
        "terminals": np.array([0, 0, 1, 0, 0, 0], bool),
        "timeouts": np.array([0, 0, 0, 0, 0, 1], bool),
    }
    with h5py.File(path, "w") as file:
        for name, array in (arrays | changes).items():
            if isinstance(array, dict):
                file.create_group(name)
            elif array is not None:
                file[name] = array
    return path


def with_value(row: int, value: float) -> np.ndarray:
    rows = np.ones((N, 3), np.float32)
    rows[row, 1] = value
    return rows


def test_the_file_that_the_bad_ones_are_made_from_is_good(tmp_path):
    assert load(make_hdf5(tmp_path / "good.hdf5")).length.tolist() == [3, 3]


def test_a_path_with_nothing_there_is_refused(tmp_path):
    assert refused(tmp_path / "nowhere.hdf5") == "there is no dataset at PATH; check the path"


def folder(path: Path) -> None:
    path.mkdir()
    (path / "holiday.txt").write_text("hello")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("observations,actions\n1,2\n"),
        lambda path: path.write_bytes(b"\x89HDF"),
        lambda path: path.mkdir(),
        folder,
    ],
    ids=["empty file", "text file", "4 bytes of HDF5", "empty folder", "folder of something else"],
)
def test_what_is_no_dataset_is_refused_with_the_formats_that_are_known(tmp_path, make: Callable[[Path], object]):
    make(tmp_path / "data")
    assert refused(tmp_path / "data") == (
        "PATH is no format this version knows; wanted a diffpolicy store (a folder with episodes.json), an HDF5 file "
        "of D4RL's or robomimic's layout, a zarr replay buffer (data/ and meta/episode_ends), OGBench's npz, or the "
        "folder of a LeRobot or Minari dataset"
    )


def test_a_pickle_is_refused_and_not_executed(tmp_path, bomb):
    path = tmp_path / "data.hdf5"
    path.write_bytes(pickle.dumps(bomb))
    assert "is no format this version knows; wanted" in refused(path)
    assert not bomb.mark.exists()


@pytest.mark.parametrize("keep", [8, 100, 2048, 0.1, 0.5, 0.9, -4096, -1])
def test_a_real_hdf5_file_cut_short_anywhere_is_refused(tmp_path, shared_data, keep):
    whole = (shared_data / "door-human.hdf5").read_bytes()
    path = tmp_path / "cut.hdf5"
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    message = refused(path)
    assert message.startswith("PATH cannot be read as HDF5, it may be cut short (")
    assert message.endswith("; copy it again")


@pytest.mark.parametrize("at", [0.05, 0.3, 0.6, 0.9])
def test_a_real_hdf5_file_with_4000_damaged_bytes_is_refused(tmp_path, shared_data, at):
    damaged = bytearray((shared_data / "door-human.hdf5").read_bytes())
    start = int(at * len(damaged))
    damaged[start : start + 4000] = np.random.default_rng(0).bytes(4000)
    path = tmp_path / "damaged.hdf5"
    path.write_bytes(damaged)
    assert refused(path).endswith("; copy it again")


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
def test_a_missing_key_is_named_with_those_that_are_wanted(tmp_path, name):
    assert refused(make_hdf5(tmp_path / "f.hdf5", **{name: None})) == f"PATH lacks {name}; {LAYOUT}"


def test_all_missing_keys_are_named_at_once(tmp_path):
    path = make_hdf5(tmp_path / "f.hdf5", observations=None, rewards=None)
    assert refused(path) == f"PATH lacks observations, rewards; {LAYOUT}"


@pytest.mark.parametrize("name", ["actions", "rewards", "terminals", "timeouts", "next_observations"])
def test_an_array_of_another_length_is_refused_with_both_numbers(tmp_path, name):
    short = np.zeros((N - 1, 3) if "observations" in name else (N - 1, 2) if name == "actions" else N - 1, np.float32)
    assert refused(make_hdf5(tmp_path / "f.hdf5", **{name: short})) == (
        f"PATH: {name} has 5 rows and observations 6; wanted as many: write it again"
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rewards": np.zeros((N, 2))}, "rewards has shape (6, 2); wanted one number a row: reshape it"),
        ({"terminals": np.zeros((N, 2))}, "terminals has shape (6, 2); wanted one number a row: reshape it"),
        ({"observations": np.zeros(N)}, "observations has shape (6,); wanted flat rows of one size: reshape it"),
        (
            {"observations": np.zeros((N, 4, 4, 3), np.uint8)},
            "observations has shape (6, 4, 4, 3); wanted flat rows of one size: reshape it",
        ),
        (
            {"next_observations": np.zeros((N, 4))},
            "next_observations has shape (6, 4); wanted flat rows of one size: reshape it",
        ),
    ],
)
def test_an_array_of_another_shape_is_refused_with_its_shape(tmp_path, changes, wanted):
    assert refused(make_hdf5(tmp_path / "f.hdf5", **changes)) == f"PATH: {wanted}"


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_whole_number_actions_are_refused_as_discrete(tmp_path, shape):
    message = refused(make_hdf5(tmp_path / "f.hdf5", actions=np.zeros(shape, np.int64)))
    assert message.startswith(f"PATH: actions have shape {shape} and type int64; wanted continuous actions")
    assert "discrete action spaces are not supported" in message


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
@pytest.mark.parametrize(
    "content",
    [
        np.array([b"a"] * N),
        np.array(["a"] * N, dtype=h5py.string_dtype()),
        np.zeros(N, dtype=[("x", "f4"), ("y", "f4")]),
        np.zeros(N, np.complex64),
        np.float32(1),
        h5py.Empty("f4"),
        {},
    ],
    ids=["bytes", "strings", "records", "complex", "scalar", "nothing", "group"],
)
def test_what_is_no_array_of_numbers_is_refused_by_name(tmp_path, name, content):
    assert refused(make_hdf5(tmp_path / "f.hdf5", **{name: content})) == (
        f"PATH: /{name} is not an array of numbers; {LAYOUT}: write it again"
    )


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_an_observation_that_is_not_finite_is_refused_by_its_row(tmp_path, value, shown):
    # Row 4 of the file is row 5 here: the first episode's last observation stands between.
    assert refused(make_hdf5(tmp_path / "f.hdf5", observations=with_value(4, value))) == (
        f"PATH: obs 'obs' holds {shown} in row 5; wanted finite numbers: remove that episode or repair the value"
    )


def test_an_action_or_reward_that_is_not_finite_is_refused_by_its_row(tmp_path):
    actions, rewards = np.zeros((N, 2), np.float32), np.zeros(N, np.float32)
    actions[3, 0], rewards[2] = np.nan, np.inf
    assert "PATH: action holds nan in row 3; wanted finite" in refused(make_hdf5(tmp_path / "a.hdf5", actions=actions))
    assert "PATH: reward holds inf in row 2; wanted finite" in refused(make_hdf5(tmp_path / "r.hdf5", rewards=rewards))


@pytest.mark.parametrize("rows", [N, 0])
def test_zero_complete_episodes_are_refused(tmp_path, rows):
    arrays = {
        "observations": np.ones((rows, 3), np.float32),
        "actions": np.ones((rows, 2), np.float32),
        **{name: np.zeros(rows, np.float32) for name in ("rewards", "terminals", "timeouts")},
    }
    assert refused(make_hdf5(tmp_path / "f.hdf5", **arrays)) == (
        "PATH has zero complete episodes: no row of terminals or timeouts is true; mark where each one ends"
    )
