"""The store: what is written comes back to the bit, stays on disk, and is never half-written nor executed."""

import errno
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpolicy.data import store
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.sources import load
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows
from diffpolicy.errors import DatasetError

FLAT = ("action", "reward", "length", "terminated", "truncated", "has_final")


def make_episodes(seed: int = 0) -> Episodes:
    rng = np.random.default_rng(seed)
    episodes = [
        Episode(
            obs={
                "observation.state": rng.normal(size=(n + 1, 3)).astype(np.float32),
                "image": rng.integers(0, 256, size=(n + 1, 4, 4, 3), dtype=np.uint8),
            },
            action=rng.normal(size=(n, 2)),
            reward=rng.normal(size=n).astype(np.float32),
            terminated=n == 5,
            truncated=n != 5,
            info={"success": rng.random(n) < 0.5},
            has_final=n != 3,
        )
        for n in (5, 3, 7)
    ]
    return from_list(episodes, {"env_id": "Some-v0", "seeds": [1, 2, 3], "control_period": 0.1})


def files(episodes: Episodes) -> dict[str, np.ndarray]:
    arrays = {name: getattr(episodes, name) for name in FLAT}
    arrays |= {f"obs/{name}": array for name, array in episodes.obs.items()}
    return arrays | {f"info/{name}": array for name, array in episodes.info.items()}


def assert_same(first: Episodes, second: Episodes) -> None:
    ours, theirs = files(first), files(second)
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape)
        assert array.tobytes() == theirs[name].tobytes()
    assert first.meta == second.meta


def contents(folder: Path) -> dict[str, bytes]:
    """Every file beneath, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_gives_back_every_array_to_the_bit_with_its_type_and_provenance(tmp_path):
    data = make_episodes()
    assert store.save(data, tmp_path / "sub" / "demos") == tmp_path / "sub" / "demos"
    assert_same(store.load(tmp_path / "sub" / "demos"), data)
    assert_same(load(str(tmp_path / "sub" / "demos")), data)


def test_a_loaded_store_stays_on_disk_and_windows_share_its_pages(tmp_path):
    data = store.load(store.save(make_episodes(), tmp_path / "demos"))
    for name, array in files(data).items():
        assert isinstance(array, np.memmap)
        assert array.mode == "c"
        assert Path(str(array.filename)) == tmp_path / "demos" / f"{name}.npy"
    windows = Windows(data, Spec.from_episodes(data, 4, 2, 2))
    assert np.shares_memory(windows.action.numpy(), data.action)
    assert np.shares_memory(windows.reward.numpy(), data.reward)
    for name, array in data.obs.items():
        assert np.shares_memory(windows.obs[name].numpy(), array)


def test_what_is_done_to_a_loaded_store_and_its_windows_is_never_written_back(tmp_path):
    data = store.load(store.save(make_episodes(), tmp_path / "demos"))
    before = contents(tmp_path)
    windows = Windows(data, Spec.from_episodes(data, 4, 2, 2))
    windows.gather(torch.arange(15)).action.zero_()
    assert not np.any(data.action == 0)  # a batch is a copy
    windows.action.zero_()
    data.obs["image"][:] = 0
    assert np.all(data.action == 0)
    del data, windows
    assert contents(tmp_path) == before


def test_a_store_can_be_replaced_by_what_was_loaded_from_it(tmp_path):
    data = make_episodes()
    store.save(data, tmp_path / "demos")
    loaded = store.load(tmp_path / "demos")
    store.save(loaded.rename({"state": "observation.state"}), tmp_path / "demos")
    assert_same(loaded, data)  # the pages of the former files live on
    assert_same(store.load(tmp_path / "demos"), data.rename({"state": "observation.state"}))
    assert [path.name for path in tmp_path.iterdir()] == ["demos"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("call", [1, 3, 9])
def test_a_disk_that_is_full_at_the_nth_array_leaves_the_former_store_and_nothing_else(
    tmp_path, monkeypatch, call, existing
):
    if existing:
        store.save(make_episodes(0), tmp_path / "demos")
    before, calls, save = contents(tmp_path), [], np.save

    def failing(path: Path, array: np.ndarray, **options: bool) -> None:
        calls.append(path)
        if len(calls) == call:
            Path(path).write_bytes(b"\x93NUMPY half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, array, **options)

    monkeypatch.setattr(np, "save", failing)
    with pytest.raises(DatasetError, match="No space left"):
        store.save(make_episodes(1), tmp_path / "demos")
    assert len(calls) == call
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["demos"] if existing else [])
    if existing:
        assert_same(store.load(tmp_path / "demos"), make_episodes(0))


def test_a_store_that_cannot_be_moved_into_its_place_leaves_the_former_one(tmp_path, monkeypatch):
    store.save(make_episodes(0), tmp_path / "demos")
    before, rename = contents(tmp_path), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(DatasetError, match="Permission denied"):
        store.save(make_episodes(1), tmp_path / "demos")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["demos"]


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder"])
def test_saving_over_what_is_no_store_is_refused_and_touches_nothing(tmp_path, kind):
    target = tmp_path / "thesis"
    if kind != "file":
        target.mkdir()
    if kind != "empty folder":
        (target if kind == "file" else target / "chapter").write_text("important")
    before = contents(tmp_path)
    with pytest.raises(DatasetError, match="thesis exists and is not a dataset of ours; give another path or remove"):
        store.save(make_episodes(), target)
    assert contents(tmp_path) == before
    assert target.exists()


@pytest.mark.parametrize("name", ["camera/front", "../outside", ".hidden", ""])
def test_a_name_that_is_no_file_name_is_refused_before_anything_is_left_behind(tmp_path, name):
    data = make_episodes().rename({name: "image"})
    with pytest.raises(DatasetError, match="cannot be a file name; rename it"):
        store.save(data, tmp_path / "demos")
    assert list(tmp_path.iterdir()) == []


def edit_header(folder: Path, **changes: object) -> None:
    header = json.loads((folder / "episodes.json").read_text())
    (folder / "episodes.json").write_text(json.dumps(header | changes))


def test_format_2_is_refused_by_this_version_which_reads_format_1(tmp_path):
    folder = store.save(make_episodes(), tmp_path / "demos")
    edit_header(folder, format=store.FORMAT + 1)
    with pytest.raises(DatasetError, match="demos has format 2, this version reads up to 1; update diffpolicy"):
        load(folder)


@pytest.mark.parametrize("name", ["../../secret", "/secret", "x/../../../secret", ".hidden"])
def test_a_header_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    folder = store.save(make_episodes(), tmp_path / "demos")
    edit_header(folder, obs=[name])
    with pytest.raises(DatasetError, match="cannot be a file name"):
        load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"format": 1}', '{"format": "one", "obs": [], "info": [], "meta": {}}'],
)
def test_a_damaged_header_is_refused_in_one_line(tmp_path, text):
    folder = store.save(make_episodes(), tmp_path / "demos")
    (folder / "episodes.json").write_text(text)
    with pytest.raises(DatasetError, match=r"episodes.json cannot be read \(.*\); write the dataset again") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"obs": [1]}, {"obs": 5}, {"info": None}, {"meta": []}])
def test_a_header_with_values_of_another_kind_is_refused(tmp_path, changes):
    folder = store.save(make_episodes(), tmp_path / "demos")
    edit_header(folder, **changes)
    with pytest.raises(DatasetError, match=r"episodes\.json cannot be read"):
        load(folder)


@pytest.mark.parametrize("name", [*FLAT, "obs/image", "info/success"])
def test_every_missing_array_is_named(tmp_path, name):
    folder = store.save(make_episodes(), tmp_path / "demos")
    (folder / f"{name}.npy").unlink()
    with pytest.raises(DatasetError, match=f"{name}.npy cannot be read: it is missing; copy or write"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 60, 128, -1])
def test_an_array_cut_short_anywhere_is_named(tmp_path, keep):
    folder = store.save(make_episodes(), tmp_path / "demos")
    path = folder / "obs" / "image.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"image\.npy cannot be read: .*; copy or write the dataset again") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_random_damage_of_an_arrays_header_never_raises_anything_but_a_dataset_error(tmp_path):
    folder = store.save(make_episodes(), tmp_path / "demos")
    path, rng, refused = folder / "action.npy", np.random.default_rng(0), 0
    whole = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        for at in rng.integers(0, 128, size=3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load(folder)
        except DatasetError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 150


@pytest.mark.parametrize("form", ["object array", "bare pickle"])
def test_a_pickle_in_a_store_is_refused_and_not_executed(tmp_path, bomb, form):
    folder = store.save(make_episodes(), tmp_path / "demos")
    path = folder / "info" / "success.npy"
    if form == "object array":
        np.save(path, np.array([bomb] * 15, dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(DatasetError, match=r"success\.npy cannot be read: .*; copy or write the dataset again"):
        load(folder)
    assert not bomb.mark.exists()


def test_a_store_whose_arrays_disagree_is_refused_with_its_path(tmp_path):
    folder = store.save(make_episodes(), tmp_path / "demos")
    np.save(folder / "reward.npy", np.zeros(3))
    with pytest.raises(DatasetError, match=r"demos: reward has shape \(3,\); wanted 15 rows, one number a step"):
        load(folder)
