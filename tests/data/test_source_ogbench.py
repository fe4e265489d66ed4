"""OGBench's npz against its own package on the same files, and what is refused of a zip that others wrote."""

import io
import pickle
import shutil
import sys
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffpolicy.data import store
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.sources import load, npz
from diffpolicy.data.sources.ogbench import load as load_wanted
from diffpolicy.data.sources.reading import Wanted
from diffpolicy.errors import DatasetError, MissingExtraError

NAME = "cube-single-play-v0"
TASK = "cube-single-play-singletask-task{}-v0"
LENGTHS = (3, 2)


@pytest.fixture(scope="session")
def ogbench():
    return pytest.importorskip("ogbench", reason="the package ogbench is not there; pip install 'diffpolicy[ogbench]'")


@pytest.fixture(scope="session")
def cube(shared_data, tmp_path_factory) -> Path:
    """A real file, with a second one beside it as OGBench's functions want."""
    folder = tmp_path_factory.mktemp("cube")
    for name in (f"{NAME}.npz", f"{NAME}-val.npz"):
        shutil.copyfile(shared_data / "ogbench" / f"{NAME}-val.npz", folder / name)
    return folder / f"{NAME}.npz"


def transitions(episodes: Episodes) -> dict[str, np.ndarray]:
    """Every transition, under OGBench's names."""
    first = np.arange(episodes.steps) + np.repeat(np.arange(len(episodes)), episodes.length)
    terminals = np.zeros(episodes.steps, np.float32)
    terminals[np.cumsum(episodes.length) - 1] = 1
    obs = episodes.obs["obs"]
    columns = {"observations": obs[first], "next_observations": obs[first + 1], "actions": episodes.action}
    return {**columns, "terminals": terminals}


def assert_equal(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize(("file", "steps"), [(NAME, 300_000), (f"{NAME}-val", 20_000)])
def test_a_real_file_gives_exactly_ogbenchs_transitions(shared_data, ogbench, file, steps):
    path = shared_data / "ogbench" / f"{file}.npz"
    data = load(path)
    assert (data.steps, set(data.length.tolist())) == (steps, {1000})
    assert_equal(transitions(data), ogbench.load_dataset(str(path), compact_dataset=False))
    assert data.meta == {
        "source": "ogbench-npz",
        "file": f"{file}.npz",
        "rewards": "none recorded; name a task",
    }
    assert not data.reward.any()
    assert (data.terminated.any(), data.truncated.all(), np.all(data.has_final)) == (False, True, True)


@pytest.fixture(scope="module")
def relabelled(cube, ogbench) -> Episodes:
    return load(cube, task=TASK.format(2))


@pytest.mark.filterwarnings("ignore:.*precision lowered")  # its own, about spaces
def test_a_task_gives_exactly_ogbenchs_rewards_and_masks(cube, relabelled, ogbench):
    task, data = TASK.format(2), relabelled
    _, theirs, _ = ogbench.make_env_and_datasets(task, dataset_path=str(cube))
    ours = {**transitions(data), "rewards": data.reward, "masks": data.info["mask"].astype(np.float32)}
    assert_equal(ours, theirs)
    last = np.cumsum(data.length) - 1
    np.testing.assert_array_equal(data.terminated, theirs["masks"][last] == 0)
    np.testing.assert_array_equal(data.truncated, ~data.terminated)
    assert data.meta == {
        "source": "ogbench-npz",
        "file": cube.name,
        "masked_steps": int((theirs["masks"] == 0).sum() - data.terminated.sum()),
        "env_id": "cube-single-singletask-task2-v0",
        "env_kwargs": {},
        "control_period": 0.05,
        "task": task,
    }
    assert data.meta["masked_steps"] > 0


def make_raw() -> dict[str, np.ndarray]:
    """Two trajectories of 4 and 3 rows; row i is i, the actions of last observations are not numbers."""
    row = np.arange(7, dtype=np.float32)
    actions = row[:, None] / 10
    actions[[3, 6]] = np.nan
    return {
        "observations": np.stack([row, -row], axis=1),
        "actions": actions,
        "terminals": np.array([0, 0, 0, 1, 0, 0, 1], bool),
        "rewards": np.array([-1, 0, -1, 77, -1, 0, 77], np.float32),
        "masks": np.array([1, 0, 1, 0, 1, 0, 1], np.float32),
    }


def make_regular() -> dict[str, np.ndarray]:
    """The same as `ogbench.load_dataset` returns it."""
    raw, going_on = make_raw(), [0, 1, 2, 4, 5]
    regular = {name: array[going_on] for name, array in raw.items()}
    after = raw["observations"][[1, 2, 3, 5, 6]]
    return {**regular, "next_observations": after, "terminals": np.array([0, 0, 1, 0, 1], np.float32)}


def make_compact() -> dict[str, np.ndarray]:
    """The same as `ogbench.load_dataset(compact_dataset=True)` returns it."""
    valids = np.array([1, 1, 1, 0, 1, 1, 0], np.float32)
    return {**make_raw(), "valids": valids, "terminals": np.array([0, 0, 1, 1, 0, 1, 1], np.float32)}


def expected() -> Episodes:
    raw = make_raw()
    rows = (0, 3), (4, 6)
    masks = [np.array([True, False, True]), np.array([True, False])]
    return from_list(
        [
            Episode(
                {"obs": raw["observations"][a : b + 1]},
                raw["actions"][a:b],
                raw["rewards"][a:b],
                terminated=not mask[-1],
                truncated=bool(mask[-1]),
                info={"mask": mask},
            )
            for (a, b), mask in zip(rows, masks, strict=True)
        ]
    )


def write(path: Path, arrays: Mapping[str, object] | None = None, **changes: object) -> Path:
    """A file; None leaves an array out."""
    content = {**(make_raw() if arrays is None else arrays), **changes}
    np.savez_compressed(path, **{name: a for name, a in content.items() if a is not None})  # type: ignore[arg-type]
    return path


def assert_same(a: Episodes, b: Episodes) -> None:
    for name in ("length", "terminated", "truncated", "has_final", "action", "reward"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_array_equal(a.obs["obs"], b.obs["obs"])
    np.testing.assert_array_equal(a.info["mask"], b.info["mask"])


@pytest.mark.parametrize("make", [make_raw, make_regular, make_compact])
def test_all_three_layouts_equal_the_same_content_through_our_store(tmp_path, make):
    store.save(expected(), tmp_path / "store")
    data = load(write(tmp_path / "data.npz", make()))
    assert data.length.tolist() == list(LENGTHS)
    assert_same(data, expected())
    assert_same(data, load(tmp_path / "store"))
    assert data.meta == {"source": "ogbench-npz", "file": "data.npz", "masked_steps": 1}


@pytest.mark.parametrize("make", [make_raw, make_regular, make_compact])
@pytest.mark.parametrize("block", [4, 8, 24])
def test_blocks_of_1_to_3_rows_give_the_same_in_memory_and_in_a_store(tmp_path, monkeypatch, make, block):
    monkeypatch.setattr("diffpolicy.data.sources.reading.BLOCK_BYTES", block)
    path = write(tmp_path / "data.npz", make())
    assert_same(load(path), expected())
    with store.writing(tmp_path / "store") as folder:
        folder.finish(load_wanted(path, replace(Wanted(), allocate=folder.allocate)))
    assert_same(load(tmp_path / "store"), expected())


def test_the_package_reads_our_three_layouts_alike(tmp_path, ogbench):
    path = write(tmp_path / "data.npz", {k: v for k, v in make_raw().items() if k not in ("rewards", "masks")})
    assert_equal(transitions(load(path)), ogbench.load_dataset(str(path)))


def test_rows_are_read_in_any_order_stored_or_deflated(tmp_path):
    rows = np.arange(3000, dtype=">f8").reshape(1000, 3)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "rows.npz", rows=rows)
        with npz.opened(tmp_path / "rows.npz") as file:
            read = file.array("rows").rows()
            for part in (slice(3, 5), slice(900, 1000), slice(0, 1), slice(0, 1000), slice(7, 7)):
                np.testing.assert_array_equal(read(part), rows[part])


def test_images_are_read_only_when_named(tmp_path):
    image = np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3)
    path = write(tmp_path / "data.npz", observations=image)
    assert "the dataset has no observations but images" in refused(path)
    np.testing.assert_array_equal(load(path, obs=["obs"]).obs["obs"], image)


def test_more_than_the_memory_that_may_be_taken_is_refused_before_it_is_taken(tmp_path):
    assert "may be taken; convert it to a store" in refused(write(tmp_path / "data.npz"), max_bytes=50)


# By name, through the package; its cache folder is in the user's home.


@pytest.fixture
def cached(tmp_path, monkeypatch, ogbench) -> Path:
    def no_network(address: str) -> None:
        raise OSError("no network")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return tmp_path / ".ogbench" / "data"


def fill(cached: Path, cube: Path) -> None:
    cached.mkdir(parents=True)
    for path in (cube, cube.with_name(f"{NAME}-val.npz")):
        shutil.copyfile(path, cached / path.name)


def test_a_name_is_read_from_ogbenchs_cache_folder_whole_or_by_its_parts(cached, cube):
    fill(cached, cube)
    data, val = load(f"ogbench:{NAME}"), load(f"ogbench:{NAME}", part="val")
    assert data.meta == {
        "env_id": "cube-single-v0",
        "env_kwargs": {},
        "source": "ogbench-npz",
        "file": f"{NAME}.npz",
        "rewards": "none recorded; name a task",
        "dataset": NAME,
    }
    assert val.meta["file"] == f"{NAME}-val.npz"
    assert load(f"ogbench:{NAME}", part="train").meta == data.meta
    with pytest.raises(DatasetError, match="part 'test' was asked for; OGBench's datasets have train and val"):
        load(f"ogbench:{NAME}", part="test")


def test_a_tasks_name_is_its_dataset_with_its_rewards(cached, cube, relabelled):
    fill(cached, cube)
    named = load(f"ogbench:{TASK.format(2)}")
    assert_same(named, relabelled)
    assert named.meta == {**relabelled.meta, "dataset": NAME}


def test_what_cannot_be_downloaded_is_refused_with_the_folder_that_was_looked_in(cached):
    with pytest.raises(DatasetError, match=r"ogbench:cube-nine-play-v0 could not be downloaded .no network.") as caught:
        load("ogbench:cube-nine-play-v0")
    assert str(cached) in str(caught.value)


@pytest.mark.parametrize("name", ["../secrets-v0", "cube/single-v0", "", "cube-single-play", "Cube-v0", "a-v0\n"])
def test_what_is_no_name_of_ogbenchs_is_refused_before_anything_is_asked_of_it(cached, name):
    with pytest.raises(DatasetError, match="is no name of OGBench's; wanted one such as cube-single-play-v0"):
        load(f"ogbench:{name}")


def test_a_task_of_another_dataset_is_refused(cached, cube):
    with pytest.raises(DatasetError, match="is of the dataset 'scene-play-v0'; wanted one of 'cube-single-play-v0'"):
        load(f"ogbench:{NAME}", task="scene-play-singletask-v0")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("cube-single-play-v0", "'cube-single-play-v0' names no task of OGBench's; wanted a name such as cube-single"),
        ("task 1", "'task 1' names no task of OGBench's"),
        (TASK.format(9), "ogbench has no task 'cube-single-play-singletask-task9-v0' ("),
        ("pointmaze-large-navigate-singletask-v0", "has observations (28,) and task 'pointmaze-large-navigate-single"),
    ],
)
def test_a_task_that_is_not_of_this_file_is_refused(cube, ogbench, task, message):
    assert message in refused(cube, task=task)


def test_a_task_without_its_positions_is_refused(tmp_path, ogbench):
    path = write(tmp_path / "data.npz", observations=np.zeros((7, 28), np.float32))
    assert "PATH cannot be relabelled for cube-single-singletask-task1-v0 (" in refused(path, task=TASK.format(1))


def test_without_the_package_a_file_is_read_and_a_task_or_a_name_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    path = write(tmp_path / "data.npz")
    assert load(path).steps == 5
    for dataset, task in ((str(path), TASK.format(1)), (f"ogbench:{NAME}", None)):
        with pytest.raises(MissingExtraError, match=r"need the ogbench package .*pip install 'diffpolicy\[ogbench\]'"):
            load(dataset, task=task)


# Files that cannot be right.


def refused(path: Path, **asked: object) -> str:
    """The one line with which loading is refused, without the path that it must contain."""
    with pytest.raises(DatasetError) as caught:
        load(path, **asked)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "PATH")


def flags(*rows: int, n: int = 7) -> np.ndarray:
    return np.isin(np.arange(n), rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": None}, "PATH lacks actions; wanted OGBench's observations, actions, terminals"),
        ({"terminals": None, "actions": None}, "PATH lacks actions, terminals; wanted"),
        ({"actions": np.ones((6, 1))}, "actions has 6 rows and observations 7; wanted as many"),
        ({"masks": np.ones(6)}, "masks has 6 rows and observations 7"),
        ({"terminals": np.ones((7, 1))}, "terminals has shape (7, 1); wanted one number a row"),
        ({"rewards": np.ones((7, 2))}, "rewards has shape (7, 2); wanted one number a row"),
        ({"next_observations": np.ones((7, 3))}, "next_observations has shape (7, 3); wanted that of observations"),
        ({"terminals": flags()}, "the last of 7 rows ends no trajectory in terminals, it may be cut short"),
        ({"terminals": flags(3, 5)}, "the last of 7 rows ends no trajectory in terminals"),
        ({"valids": np.ones(7)}, "the last of 7 rows ends no trajectory in valids"),
        ({"terminals": flags(3, 4, 6)}, "the trajectory that ends in row 4 has no transition; leave it out"),
        ({"terminals": flags(0, 6)}, "the trajectory that ends in row 0 has no transition"),
        ({"masks": np.full(7, 0.5)}, "masks holds other numbers than 0 and 1"),
        ({"rewards": np.full(7, np.inf)}, "reward holds inf in row 0; wanted finite numbers"),
        ({"actions": np.ones((7, 1), np.int64)}, "discrete action spaces are not supported"),
        ({"observations": np.array(["a"] * 7)}, "observations has type <U1 and shape (7,); wanted rows of numbers"),
        ({"observations": np.float32(1)}, "observations has type float32 and shape (); wanted rows of numbers"),
        ({"observations": np.ones((2, 7)).T}, "observations is stored column by column; save numpy.ascontiguousarray"),
        ({name: make_raw()[name][:0] for name in make_raw()}, "the last of 0 rows ends no trajectory"),
    ],
)
def test_arrays_that_cannot_be_right_are_refused(tmp_path, changes, message):
    assert message in refused(write(tmp_path / "data.npz", **changes))


def test_parts_of_a_file_are_refused(tmp_path):
    assert "part 'val' was asked for; OGBench's file has no named parts" in refused(
        write(tmp_path / "data.npz"), part="val"
    )


def rewrite(path: Path, **members: bytes) -> Path:
    """A file of which some members are replaced by other bytes."""
    write(path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content |= {f"{name}.npy": data for name, data in members.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def header(shape: object, descr: str = "<f4", version: tuple[int, int] = (1, 0)) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    size = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + size + text.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "observations cannot be read ("),
        (b"\x93NUMPY\x01\x00\xff\xff", "observations cannot be read ("),
        (header("(7, 1)")[:-3], "observations cannot be read ("),
        (header("(7, __import__('os'))"), "observations cannot be read ("),
        (header("(" * 5000), "observations cannot be read ("),
        (
            header("(7, 1)") + bytes(27),
            "observations declares (7, 1) float32, 97 bytes, and its member 96; do not trust",
        ),
        (header("(7, 1)") + bytes(29), "observations declares (7, 1) float32"),
        (header("(-7, -1)") + bytes(28), "observations declares (-7, -1) float32"),
        (header(f"({10**30}, 2)") + bytes(28), "do not trust this file"),
        (header("(7, 1)", version=(2, 0)) + bytes(28), "observations has a header of version (2, 0); wanted plain"),
        (header("(7,)", "|O") + bytes(28), "observations has type object and shape (7,); wanted rows of numbers"),
        (header("(7,)", "<c8") + bytes(56), "observations has type complex64"),
    ],
)
def test_headers_that_cannot_be_right_are_refused(tmp_path, data, message):
    assert message in refused(rewrite(tmp_path / "data.npz", observations=data))


def test_an_array_of_objects_is_refused_and_not_unpickled(tmp_path, bomb):
    pickled = header("(7,)", "|O") + pickle.dumps(bomb)
    assert "has type object" in refused(rewrite(tmp_path / "data.npz", terminals=pickled))
    assert not bomb.mark.exists()


@pytest.mark.parametrize("name", ["../observations.npy", "/etc/observations.npy", "a/../../b.npy", "actions.npy"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_outside_of_the_file_or_twice_in_it_is_refused(tmp_path, name):
    path = write(tmp_path / "data.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"")
    assert f"PATH has a member {name!r} that is outside of it or there twice" in refused(path)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_packing_that_does_not_bound_what_it_unpacks_to_is_refused(tmp_path, packing):
    file = io.BytesIO()
    np.save(file, make_raw()["observations"])
    path = write(tmp_path / "data.npz", observations=None)
    with zipfile.ZipFile(path, "a", packing) as archive:
        archive.writestr("observations.npy", file.getvalue())
    assert "observations.npy is encrypted or packed in an unusual way; save it with numpy.savez" in refused(path)


def declare(path: Path, name: str, size: int) -> Path:
    """Let the zip say that a member is of this size, in both places where it says so."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
    data = bytearray(path.read_bytes())
    central = data.rindex(f"{name}.npy".encode()) - 46
    for at in (info.header_offset + 22, central + 24):
        data[at : at + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def test_a_member_that_declares_more_than_its_packed_bytes_can_hold_is_refused_before_it_is_unpacked(tmp_path):
    path = rewrite(tmp_path / "data.npz", terminals=header("(4000000000,)", "|b1"))
    message = refused(declare(path, "terminals", 4_000_000_000))
    assert "PATH: terminals.npy declares 4000000000 bytes, more than its " in message


@pytest.mark.parametrize("held", [0, 6, 100, 50_000_000])
def test_a_member_that_unpacks_to_more_or_less_than_it_declares_is_refused(tmp_path, held):
    start = header("(7,)", "|b1")
    path = rewrite(
        tmp_path / "data.npz", terminals=start + bytes([0, 0, 0, 1, 0, 0, 1])[:held] + bytes(max(held - 7, 0))
    )
    message = refused(declare(path, "terminals", len(start) + 7))
    assert "terminals ends after row 0; wanted 7 rows" in message or "terminals cannot be read (Bad CRC-32" in message


@pytest.mark.parametrize("at", [0.1, 0.4, 0.7])
def test_a_real_file_with_400_damaged_bytes_is_refused(tmp_path, cube, at):
    damaged = bytearray(cube.read_bytes())
    start = int(at * len(damaged) / 2)  # in the first half, its observations
    damaged[start : start + 400] = np.random.default_rng(0).bytes(400)
    path = tmp_path / "damaged.npz"
    path.write_bytes(damaged)
    assert "copy the dataset again" in refused(path)


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_real_file_cut_short_is_no_zip_and_refused(tmp_path, cube, keep):
    path = tmp_path / "cut.npz"
    path.write_bytes(cube.read_bytes()[: int(keep * cube.stat().st_size)])
    assert "PATH is no format this version knows" in refused(path)
