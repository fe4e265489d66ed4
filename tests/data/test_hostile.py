"""Damaged and malicious datasets of every format, by generators: refused in one line, or read exactly as they were.

Never a stack of somebody else's errors, never other numbers than those that were written, never anything executed.
"""

import json
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.sources import load, save
from diffpolicy.errors import DatasetError

FIXTURES = Path(__file__).parents[1] / "fixtures"
LENGTHS = (4, 3)


def episodes() -> Episodes:
    rng = np.random.default_rng(0)
    return from_list(
        [
            Episode({"obs": rng.normal(size=(n + 1, 3)).astype("f4")}, rng.uniform(-1, 1, size=(n, 2)).astype("f4"),
                    np.arange(n, dtype="f4"), terminated=False, truncated=True)
            for n in LENGTHS
        ]
    )  # fmt: skip


def make_store(folder: Path) -> Path:
    save(episodes(), folder / "store")
    return folder / "store"


def make_d4rl(folder: Path) -> Path:
    data = episodes()
    n = data.steps
    with h5py.File(folder / "d4rl.hdf5", "w") as file:
        keep = np.ones(n + 2, bool)
        keep[[4, 8]] = False
        file.create_dataset("observations", data=data.obs["obs"][keep], chunks=(2, 3), compression="gzip")
        file["actions"], file["rewards"] = data.action, data.reward
        file["terminals"], file["timeouts"] = np.zeros(n, bool), np.isin(np.arange(n), [3, 6])
    return folder / "d4rl.hdf5"


def make_robomimic(folder: Path) -> Path:
    with h5py.File(folder / "robomimic.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"], data.attrs["total"] = json.dumps({"env_name": "Lift", "env_kwargs": {}}), sum(LENGTHS)
        for i, episode in enumerate(episodes()[k] for k in range(2)):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = len(episode)
            demo["actions"], demo["rewards"] = episode.action, episode.reward
            demo["dones"] = np.arange(len(episode)) == len(episode) - 1
            demo["obs/eef"], demo["next_obs/eef"] = episode.obs["obs"][:-1], episode.obs["obs"][1:]
        file["mask/train"] = np.array([b"demo_0"])
    return folder / "robomimic.hdf5"


def make_ogbench(folder: Path) -> Path:
    rows = np.arange(9 * 3, dtype="f4").reshape(9, 3)
    ends = np.isin(np.arange(9), [4, 8])
    np.savez_compressed(folder / "play.npz", observations=rows, actions=rows[:, :2] / 9, terminals=ends.astype("f4"))
    return folder / "play.npz"


def make_zarr(version: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        zarr = pytest.importorskip("zarr")
        rows = np.arange(1, 8, dtype=np.float32)
        root = zarr.open_group(str(folder / "buffer.zarr"), mode="w", zarr_format=version)
        root.create_array("data/action", data=np.stack([rows, -rows], axis=1), chunks=(3, 2))
        root.create_array("data/state", data=rows[:, None] + 10, chunks=(3, 1))
        root.create_array("meta/episode_ends", data=np.array([4, 7]))
        return folder / "buffer.zarr"

    return make


def make_zip(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder / "buffer.zarr"), "zip", make_zarr(2)(folder)))


def make_lerobot(folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    return Path(shutil.copytree(FIXTURES / "lerobot_v3", folder / "lerobot"))


MAKERS: dict[str, Callable[[Path], Path]] = {
    "store": make_store,
    "d4rl": make_d4rl,
    "robomimic": make_robomimic,
    "ogbench": make_ogbench,
    "zarr 2": make_zarr(2),
    "zarr 3": make_zarr(3),
    "zarr zip": make_zip,
    "lerobot": make_lerobot,
}


def numbers(data: Episodes) -> dict[str, np.ndarray]:
    ends = {name: np.asarray(getattr(data, name)) for name in ("length", "terminated", "truncated", "has_final")}
    return {name: np.array(array) for name, array in {**data.arrays(), **ends}.items()}


def outcome(path: Path, whole: dict[str, np.ndarray]) -> str:
    """`refused`, `equal`, or what else happened."""
    try:
        found = numbers(load(path))
    except DatasetError as error:
        message = str(error)
        return "refused" if "\n" not in message and str(path) in message else f"refused by {message!r}"
    except Exception as error:  # what is tested is that there is none
        return f"raised {error!r}"
    same = found.keys() == whole.keys() and all(np.array_equal(found[name], whole[name]) for name in whole)
    return "equal" if same else "read other numbers"


def boundaries(path: Path) -> set[int]:
    """Byte counts at which a file's parts begin and end, and some within them."""
    size = path.stat().st_size
    found = {0, 1, 4, 8, size // 3, size // 2, size - 8, size - 4, size - 1}
    if path.suffix == ".hdf5":
        with h5py.File(path) as file:
            file.visititems(lambda _, item: found.update(_hdf5_offsets(item)))
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found |= {archive.start_dir, archive.start_dir + 46}
            for member in archive.infolist():
                begin = member.header_offset
                found |= {begin, begin + 30, begin + 30 + len(member.filename) + member.compress_size}
    elif path.suffix == ".npy":
        found |= {6, 10, 128, 129}
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        metadata = pq.ParquetFile(path).metadata
        found |= {size - 8 - metadata.serialized_size}
        for k in range(metadata.num_columns):
            found.add(metadata.row_group(0).column(k).data_page_offset)
    return {n for n in found if 0 <= n < size}


def _hdf5_offsets(item: object) -> set[int]:
    if not isinstance(item, h5py.Dataset):
        return set()
    if item.chunks is None:
        begin = item.id.get_offset() or 0
        return {begin, begin + item.id.get_storage_size()}
    infos = [item.id.get_chunk_info(i) for i in range(item.id.get_num_chunks())]
    return {info.byte_offset for info in infos} | {info.byte_offset + info.size for info in infos}


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_cut_at_any_boundary_of_its_parts_is_refused_in_one_line(tmp_path, kind):
    path = MAKERS[kind](tmp_path)
    whole, count, wrong = numbers(load(path)), 0, []
    for file in files(path):
        content = file.read_bytes()
        for keep in sorted(boundaries(file)):
            file.unlink()  # a new file: an open memory map of the old one keeps its own
            file.write_bytes(content[:keep])
            found = outcome(path, whole)
            count += 1
            if found not in ("refused", "equal"):
                wrong.append(f"{file.relative_to(path.parent)} cut to {keep} of {len(content)}: {found}")
            # A damaged description of what training does not read may be equal; an array never is.
            if (
                found == "equal"
                and file.suffix not in (".json", ".jsonl", ".parquet")
                and not file.name.startswith(".z")
            ):
                wrong.append(f"{file.relative_to(path.parent)} cut to {keep} of {len(content)} was read")
        file.unlink()
        file.write_bytes(content)
    assert not wrong, "\n".join(wrong)
    assert count >= 9
    assert outcome(path, whole) == "equal"


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind in ("store", "zarr 2", "zarr 3", "lerobot")])
def test_a_folder_without_any_one_of_its_files_is_refused_or_read_as_it_was(tmp_path, kind):
    path = MAKERS[kind](tmp_path)
    whole, wrong = numbers(load(path)), []
    for file in files(path):
        content = file.read_bytes()
        file.unlink()
        found = outcome(path, whole)
        if found not in ("refused", "equal"):
            wrong.append(f"without {file.relative_to(path)}: {found}")
        file.write_bytes(content)
    assert not wrong, "\n".join(wrong)


def hdf5_arrays(path: Path) -> list[str]:
    found: list[str] = []
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return [name for name in found if not name.startswith("mask")]


def replace_with(make: Callable[[h5py.Group, str, np.ndarray], object]) -> Callable[[h5py.File, str], object]:
    def damage(file: h5py.File, name: str) -> None:
        array = file[name][:]
        del file[name]
        make(file, name, array)

    return damage


def external_link(file: h5py.File, name: str, array: np.ndarray) -> None:
    with h5py.File(Path(file.filename).with_name("other.hdf5"), "w") as other:
        other["x"] = array
    file[name] = h5py.ExternalLink("other.hdf5", "x")


def soft_link_to_an_external_one(file: h5py.File, name: str, array: np.ndarray) -> None:
    external_link(file, "link", array)
    file[name] = h5py.SoftLink("/link")


def external_storage(file: h5py.File, name: str, array: np.ndarray) -> None:
    raw = Path(file.filename).with_name("raw.bin")
    raw.write_bytes(array.tobytes())
    file.create_dataset(name, array.shape, array.dtype, external=[(str(raw), 0, array.nbytes)])


def virtual(file: h5py.File, name: str, array: np.ndarray) -> None:
    with h5py.File(Path(file.filename).with_name("other.hdf5"), "w") as other:
        other["x"] = array
    layout = h5py.VirtualLayout(array.shape, array.dtype)
    layout[:] = h5py.VirtualSource("other.hdf5", "x", array.shape)
    file.create_virtual_dataset(name, layout)


BOMB = zlib.compress(bytes(80_000_000), 1)


def inflating(file: h5py.File, name: str, array: np.ndarray) -> None:
    """One chunk of the declared size that inflates to 80 million zeros."""
    shape = (len(array), *array.shape[1:])
    item = file.create_dataset(name, shape, array.dtype, chunks=shape, compression="gzip")
    item.id.write_direct_chunk((0,) * len(shape), BOMB)


HDF5_DAMAGE: dict[str, Callable[[h5py.File, str], object]] = {
    "gone": lambda file, name: file.__delitem__(name),
    "one row less": replace_with(lambda file, name, array: file.create_dataset(name, data=array[:-1])),
    "no rows": replace_with(lambda file, name, array: file.create_dataset(name, data=array[:0])),
    "a scalar": replace_with(lambda file, name, array: file.create_dataset(name, data=1.0)),
    "a group": replace_with(lambda file, name, array: file.create_group(name)),
    "text": replace_with(lambda file, name, array: file.create_dataset(name, data=[b"x"] * len(array))),
    "complex": replace_with(lambda file, name, array: file.create_dataset(name, data=array.astype("c8"))),
    "a pickle": replace_with(
        lambda file, name, array: file.create_dataset(name, data=np.void(pickle.dumps({"weights": 1})))
    ),
    "objects of any length": replace_with(
        lambda file, name, array: file.create_dataset(name, (len(array),), h5py.vlen_dtype(np.uint8))
    ),
    "10^12 rows that were never written": replace_with(
        lambda file, name, array: file.create_dataset(name, (10**12, *array.shape[1:]), array.dtype, chunks=True)
    ),
    "never written": replace_with(lambda file, name, array: file.create_dataset(name, array.shape, array.dtype)),
    "a chunk missing": replace_with(
        lambda file, name, array: file.create_dataset(
            name, array.shape, array.dtype, chunks=(2, *array.shape[1:])
        ).__setitem__(slice(0, 2), array[:2])
    ),
    "in another file": replace_with(external_link),
    "in another file, by a detour": replace_with(soft_link_to_an_external_one),
    "raw bytes of another file": replace_with(external_storage),
    "a view of another file": replace_with(virtual),
    "a bomb": replace_with(inflating),
}


@pytest.mark.parametrize("damage", HDF5_DAMAGE)
@pytest.mark.parametrize("kind", ["d4rl", "robomimic"])
def test_any_array_of_an_hdf5_file_that_is_damaged_is_refused_in_one_line(tmp_path, kind, damage):
    path = MAKERS[kind](tmp_path)
    whole, content, wrong = numbers(load(path)), path.read_bytes(), []
    for name in hdf5_arrays(path):
        with h5py.File(path, "a") as file:
            HDF5_DAMAGE[damage](file, name)
        found = outcome(path, whole)
        # Without timeouts only terminals end an episode (here none): D4RL's layout allows it, and nothing is complete.
        if found != "refused" and not (damage == "gone" and found == "read other numbers" and optional(kind, name)):
            wrong.append(f"{name}: {found}")
        path.write_bytes(content)
    assert not wrong, "\n".join(wrong)


def optional(kind: str, name: str) -> bool:
    """Whether a dataset of the format need not have this array, so that without it other numbers are right."""
    return kind == "robomimic" and name.startswith(("data/demo_1/next_obs", "data/demo_0/next_obs"))


HDF5_LIES: dict[str, tuple[str, Callable[[h5py.File], object]]] = {
    "total": ("robomimic", lambda file: file["data"].attrs.__setitem__("total", 8)),
    "num_samples": ("robomimic", lambda file: file["data/demo_1"].attrs.__setitem__("num_samples", 10**9)),
    "negative num_samples": ("robomimic", lambda file: file["data/demo_1"].attrs.__setitem__("num_samples", -3)),
    "env_args that are a pickle": (
        "robomimic",
        lambda file: file["data"].attrs.__setitem__("env_args", np.void(pickle.dumps([1]))),
    ),
    "env_args that are no JSON": ("robomimic", lambda file: file["data"].attrs.__setitem__("env_args", "{")),
    "meta that is no JSON": ("d4rl", lambda file: file.attrs.__setitem__("meta", "{")),
    "meta that is a list": ("d4rl", lambda file: file.attrs.__setitem__("meta", "[1]")),
}


@pytest.mark.parametrize("lie", HDF5_LIES)
def test_attributes_that_lie_are_refused_in_one_line(tmp_path, lie):
    kind, tell = HDF5_LIES[lie]
    path = MAKERS[kind](tmp_path)
    whole = numbers(load(path))
    with h5py.File(path, "a") as file:
        tell(file)
    assert outcome(path, whole) == "refused"


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """An array's file, with another shape in its header if one is given."""
    import io

    out = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(out, {**header, "shape": shape or array.shape})
    return out.getvalue() + array.tobytes()


def npz_members(bomb: object) -> Iterator[tuple[str, str, bytes, int]]:
    """What is wrong, and a member's name and content that replace or join the good ones."""
    rows = np.arange(9 * 3, dtype="f4").reshape(9, 3)
    objects = np.empty(9, object)
    objects[:] = bomb
    yield "a pickle in place of an array", "actions.npy", pickle.dumps(bomb), zipfile.ZIP_STORED
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (9,), }".ljust(117) + b"\n"
    yield "an array of objects", "actions.npy", header + pickle.dumps(bomb), zipfile.ZIP_STORED
    yield "a shape of 10^12 rows", "actions.npy", npy(rows, (10**12, 3)), zipfile.ZIP_DEFLATED
    yield "a shape with a negative size", "actions.npy", npy(rows, (-9, -3)), zipfile.ZIP_STORED
    yield "a shape of fewer rows than bytes", "actions.npy", npy(rows, (5, 3)), zipfile.ZIP_STORED
    yield "80 megabytes of zeros", "actions.npy", npy(rows) + bytes(80_000_000), zipfile.ZIP_DEFLATED
    yield "code for a type", "actions.npy", header.replace(b"'|O'", b"eval"), zipfile.ZIP_STORED
    yield "a path that escapes", "../../outside.npy", npy(rows), zipfile.ZIP_STORED
    yield "an absolute path", "/outside.npy", npy(rows), zipfile.ZIP_STORED
    yield "text", "observations.npy", npy(np.array(["a"] * 9)), zipfile.ZIP_STORED
    yield "no end of a trajectory", "terminals.npy", npy(np.zeros(9, "f4")), zipfile.ZIP_STORED
    yield "ends that are not 0 or 1", "terminals.npy", npy(np.full(9, 0.5, "f4")), zipfile.ZIP_STORED


def test_every_hostile_member_of_an_npz_is_refused_in_one_line_and_nothing_is_executed(tmp_path, bomb):
    path = make_ogbench(tmp_path)
    with zipfile.ZipFile(path) as archive:
        good = {name: archive.read(name) for name in archive.namelist()}
    whole, wrong, count = numbers(load(path)), [], 0
    for what, name, content, packing in npz_members(bomb):
        with zipfile.ZipFile(path, "w", packing) as archive:
            for member, value in {**good, name: content}.items():
                archive.writestr(member, value)
        found = outcome(path, whole)
        count += 1
        if found != "refused":
            wrong.append(f"{what}: {found}")
    assert not wrong, "\n".join(wrong)
    assert count == 12
    assert not bomb.mark.exists()


STORE_DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lengths that go back": ("length.npy", lambda file: np.save(file, np.array([-4, 11]))),
    "a length of 0": ("length.npy", lambda file: np.save(file, np.array([7, 0]))),
    "lengths that add up to more": ("length.npy", lambda file: np.save(file, np.array([4, 10**9]))),
    "lengths that overflow": ("length.npy", lambda file: np.save(file, np.array([2**63 - 1, 8]))),
    "lengths in floats": ("length.npy", lambda file: np.save(file, np.array([4.0, 3.0]))),
    "a flag an episode too many": ("terminated.npy", lambda file: np.save(file, np.zeros(3, bool))),
    "observations without the last": ("obs/obs.npy", lambda file: np.save(file, np.zeros((7, 3), "f4"))),
    "actions that are whole numbers": ("action.npy", lambda file: np.save(file, np.zeros((7, 2), int))),
    "a header of 10^12 rows": ("action.npy", lambda file: file.write_bytes(npy(np.zeros((7, 2), "f4"), (10**12, 2)))),
    "objects": ("action.npy", lambda file: np.save(file, np.array([{}] * 7), allow_pickle=True)),
    "a name that escapes": (
        "episodes.json",
        lambda file: file.write_text(file.read_text().replace('"obs"\n', '"../../obs"\n')),
    ),
    "a name that is a path": (
        "episodes.json",
        lambda file: file.write_text(file.read_text().replace('"obs"\n', '"/etc/obs"\n')),
    ),
    "a newer format": (
        "episodes.json",
        lambda file: file.write_text(file.read_text().replace('"format": 1', '"format": 7')),
    ),
}


@pytest.mark.parametrize("damage", STORE_DAMAGE)
def test_a_store_with_what_cannot_be_is_refused_in_one_line(tmp_path, damage):
    path = make_store(tmp_path)
    whole = numbers(load(path))
    name, harm = STORE_DAMAGE[damage]
    before = (path / name).read_bytes()
    harm(path / name)
    assert (path / name).read_bytes() != before
    assert outcome(path, whole) == "refused"


ZARR_DAMAGE: dict[str, dict[str, object]] = {
    "10^12 rows": {"shape": [10**12, 2]},
    "a negative size": {"shape": [-7, 2]},
    "chunks of 10^12 rows": {"chunks": [10**12, 2]},
    "chunks of no rows": {"chunks": [0, 2]},
    "an unknown compressor": {"compressor": {"id": "os.system"}},
    "a filter that unpickles": {"filters": [{"id": "pickle"}]},
    "a filter that runs code": {"filters": [{"id": "json2", "code": "print(1)"}]},
    "objects": {"dtype": "|O"},
    "wider numbers than the chunks hold": {"dtype": "<f8"},
    "narrower numbers than the chunks hold": {"dtype": "<f2"},
}


@pytest.mark.parametrize("damage", ZARR_DAMAGE)
def test_a_zarr_array_whose_metadata_lie_is_refused_in_one_line(tmp_path, damage):
    path = make_zarr(2)(tmp_path)
    whole = numbers(load(path))
    header = path / "data" / "action" / ".zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | ZARR_DAMAGE[damage]))
    assert outcome(path, whole) == "refused"


@pytest.mark.parametrize("ends", [[4, 3], [-4, 7], [0, 7], [4, 8], [4, 6], [7, 7], [2**62, 2**63 - 1], [4.0, 7.0], []])
@pytest.mark.parametrize("version", [2, 3])
def test_ends_of_episodes_that_cannot_be_are_refused_in_one_line(tmp_path, ends, version):
    zarr = pytest.importorskip("zarr")
    path = make_zarr(version)(tmp_path)
    whole = numbers(load(path))
    root = zarr.open_group(str(path), mode="a")
    del root["meta/episode_ends"]
    root.create_array("meta/episode_ends", data=np.array(ends))
    assert outcome(path, whole) == "refused"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux can be told how much a decoder may take")
def test_a_parquet_file_of_a_kilobyte_that_decodes_to_gigabytes_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import resource

    import pyarrow.parquet as pq

    path = make_lerobot(tmp_path)
    whole, before = numbers(load(path)), resource.getrlimit(resource.RLIMIT_AS)
    (file,) = (path / "data").rglob("*.parquet")
    table = pq.read_table(file)
    name, rows = "observation.state", len(table)
    offsets = np.r_[np.arange(rows) * 3, 300_000_000].astype("i4")
    zeros = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.zeros(300_000_000, "f4")))
    bomb = table.set_column(table.column_names.index(name), name, zeros).replace_schema_metadata(None)
    pq.write_table(bomb, file, compression="zstd")
    del zeros, bomb, table
    assert file.stat().st_size < 10_000
    assert outcome(path, whole) == "refused"
    assert resource.getrlimit(resource.RLIMIT_AS) == before
