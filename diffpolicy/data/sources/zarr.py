"""The zarr replay buffer of Diffusion Policy (Chi et al. 2023): arrays under `data/`, row ends in `meta/episode_ends`.

    data/action (N, Da)   data/state (N, ...)   data/<any other>        meta/episode_ends (E,)  rows, cumulative

A folder or a zip, zarr format 2 or 3. Every array but `action` becomes an observation; images are left out unless
asked for, and become uint8. `timestamp` and `stage`, which the recorder of real robots (`real_env.py`) writes beside
them, go into `info`, unless they are asked for as observations. There are no rewards (zeros), no ends of the task, and
the observation after the last action is unknown.

zarr reads a chunk that is not there as zeros, and unpacks whatever a chunk holds: here each chunk must be there, and
must declare no more than its array does.
"""

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources.reading import (
    IMAGE_AXES,
    Layout,
    Wanted,
    assemble,
    copy_observations,
    copy_rows,
    reading,
)
from diffpolicy.errors import DatasetError, MissingExtraError

METADATA = (".zgroup", ".zarray", ".zattrs", ".zmetadata", "zarr.json")
METADATA_BYTES = 16 << 20
NOT_OBSERVED = ("timestamp", "stage")
ROOT_NAMES = (".zgroup", "zarr.json", "meta/episode_ends")
UNPACKED = ("bytes", "transpose", "crc32c")
SMALL_CHUNK = 16 << 20
CUT = "a chunk is cut short"


def recognises(path: Path) -> bool:
    """Whether the path is a zarr group, a folder or a zip."""
    if path.is_dir():
        return any((path / name).exists() for name in ROOT_NAMES)
    if not zipfile.is_zipfile(path):
        return False
    with reading(path, "the zip"), zipfile.ZipFile(path) as archive:
        return any(name in METADATA for name in archive.namelist())


def load(path: Path, wanted: Wanted) -> Episodes:
    """Read a replay buffer.

    Raises:
        DatasetError: if an array or a chunk of one is missing, unpacks to more than it declares, or its rows disagree
            with the episodes' ends.
        MissingExtraError: if the `zarr` package is not installed.
    """
    wanted.refuse_part_and_task("a replay buffer")
    buffer = _Buffer(path)
    ends = _ends(buffer)
    shapes = buffer.names()
    told = [name for name in NOT_OBSERVED if name in shapes and name not in (wanted.obs or ())]
    names = wanted.choose({name: shape for name, shape in shapes.items() if name not in told})
    arrays = {name: buffer.array(f"data/{name}") for name in ("action", *told, *names)}
    n = int(ends[-1])
    for name, array in arrays.items():
        if array.shape[0] != n:
            raise DatasetError(
                f"{path}: data/{name} has {array.shape[0]} rows, the episodes end at {n}; wanted as many: copy the "
                "dataset again"
            )
    steps = {"action": arrays.pop("action"), **{f"info/{name}": arrays.pop(name) for name in told}}
    layout: Layout = {
        **{f"obs/{name}": ((n + len(ends), *_shape(array)), _dtype(array)) for name, array in arrays.items()},
        **{name: (array.shape, array.dtype) for name, array in steps.items()},
        "reward": ((n,), np.dtype(np.float32)),
    }
    out = wanted.allocate(layout)
    for name, array in arrays.items():
        copy_observations(out[f"obs/{name}"], ends, _rows(path, name, array), multiple_of=array.chunks[0])
    for name, array in steps.items():
        copy_rows(out[name], _slices(path, name.removeprefix("info/"), array), array.chunks[0])
    out["reward"][:] = 0
    return assemble(
        out,
        length=np.diff(ends, prepend=0),
        terminated=np.zeros(len(ends), dtype=bool),
        truncated=np.ones(len(ends), dtype=bool),
        has_final=np.zeros(len(ends), dtype=bool),
        meta={"source": "zarr", "file": path.name, "rewards": "none recorded"},
    )


def _is_image(array: Any) -> bool:
    return len(array.shape[1:]) >= IMAGE_AXES


def _shape(array: Any) -> tuple[int, ...]:
    """Shape of one row: images keep theirs, all else is flat."""
    return array.shape[1:] if _is_image(array) else (int(np.prod(array.shape[1:])),)


def _dtype(array: Any) -> np.dtype:
    return np.dtype(np.uint8) if _is_image(array) else array.dtype


def _slices(path: Path, name: str, array: Any) -> Callable[[slice], np.ndarray]:
    """Return a reader of slices of rows, as they are."""

    def read(rows: slice) -> np.ndarray:
        with reading(path, f"data/{name}"):
            return np.asarray(array[rows])

    return read


def _rows(path: Path, name: str, array: Any) -> Callable[[slice], np.ndarray]:
    """Return a reader of slices of rows, images as uint8."""
    slices = _slices(path, name, array)

    def read(rows: slice) -> np.ndarray:
        block = slices(rows).reshape(-1, *_shape(array))
        return _pixels(path, name, block) if _is_image(array) else block

    return read


def _pixels(path: Path, name: str, block: np.ndarray) -> np.ndarray:
    if block.dtype == np.uint8:
        return block
    low, high = block.min(), block.max()
    if not (low >= 0 and 1 < high <= 255):  # also false for NaN
        raise DatasetError(
            f"{path}: images in data/{name} range from {low} to {high}; wanted 0 to 255, uint8 or float: rescale them"
        )
    return np.rint(block).astype(np.uint8)


class _Buffer:
    """An opened replay buffer; every array is looked at before its chunks are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.limits: dict[str, tuple[str, int]] = {}
        self.root = _open(path, self._check_chunk)

    def names(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each observation."""
        with reading(self.path, "data"):
            return {name: array.shape[1:] for name, array in self.root["data"].arrays() if name != "action"}

    def array(self, name: str) -> Any:
        """Return an array of numbers whose declarations can be right."""
        with reading(self.path, name):
            if name not in self.root:
                raise DatasetError(
                    f"{self.path} lacks {name}; wanted data/action, observations beside it and meta/episode_ends"
                )
            array = self.root[name]
            shape, chunks, dtype = array.shape, array.chunks, array.dtype
            codec = _compressor(array.metadata)
        if min((*shape, *(c - 1 for c in chunks)), default=0) < 0:
            raise DatasetError(f"{self.path}: {name} declares {shape} in chunks of {chunks}; do not trust this file")
        if dtype.kind not in "fiub" or not shape:
            raise DatasetError(f"{self.path}: {name} has type {dtype}; wanted numbers: convert it or leave it out")
        if codec not in SIZES:
            raise DatasetError(
                f"{self.path}: {name} is packed with {codec}; wanted one of {', '.join(SIZES)}: rewrite it"
            )
        chunk, whole = (math.prod(sizes) * dtype.itemsize for sizes in (chunks, shape))
        if chunk > 2 * whole + SMALL_CHUNK:
            raise DatasetError(f"{self.path}: {name} declares chunks of {chunk} bytes and {whole} in all; rewrite it")
        self.limits[name] = codec, chunk
        return array

    def _check_chunk(self, key: str, chunk: bytes | None) -> None:
        if key.rpartition("/")[2] in METADATA:
            return
        if chunk is None:
            raise DatasetError(
                f"{self.path}: the chunk {key} is missing and would read as zeros; copy the dataset again, or write "
                "it with write_empty_chunks"
            )
        codec, limit = next(value for name, value in self.limits.items() if key.startswith(f"{name}/"))
        if SIZES[codec](chunk, limit) > limit:
            raise DatasetError(
                f"{self.path}: the chunk {key} unpacks to more than its {limit} bytes; do not trust this file"
            )


def _open(path: Path, check: Callable[[str, bytes | None], None]) -> Any:
    """Open the group read-only; `check` sees every value before zarr unpacks it."""
    try:
        import zarr
        from zarr.storage import LocalStore, WrapperStore, ZipStore
    except ImportError as error:
        raise MissingExtraError(f"reading {path} needs the zarr package; pip install 'diffpolicy[zarr]'") from error

    class Checked(WrapperStore[Any]):
        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            value = await super().get(key, prototype, byte_range)
            check(key, None if value is None else value.to_bytes())
            return value

    if path.is_file():
        _check_members(path)
    with reading(path, "the group"):
        store = ZipStore(path, mode="r") if path.is_file() else LocalStore(path, read_only=True)
        return zarr.open_group(store=Checked(store), mode="r")


def _check_members(path: Path) -> None:
    """Refuse a zip whose members lie outside of it, or are metadata of a size that no metadata has."""
    with reading(path, "the zip"), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            parts = member.filename.split("/")
            if ".." in parts or parts[0] == "":
                raise DatasetError(f"{path} has a member {member.filename!r} outside of it; do not trust this file")
            if parts[-1] in METADATA and member.file_size > METADATA_BYTES:
                raise DatasetError(f"{path}: {member.filename} unpacks to {member.file_size} bytes; do not trust it")


def _compressor(metadata: Any) -> str:
    """Name of what packs the chunks, `none` where nothing does; several are named together, which nothing knows."""
    if metadata.zarr_format == 2:
        stages = [*(metadata.filters or ()), *([metadata.compressor] if metadata.compressor else [])]
        named = [stage.codec_id for stage in stages]
    else:
        named = [codec.to_dict()["name"] for codec in metadata.codecs]
    return " and ".join(name for name in named if name not in UNPACKED) or "none"


def _inflated(chunk: bytes, limit: int) -> int:
    inflater = zlib.decompressobj(wbits=47)
    size = len(inflater.decompress(chunk, limit + 1))
    if size <= limit and not inflater.eof:
        raise ValueError(CUT)
    return size


def _blosc_size(chunk: bytes, limit: int) -> int:
    """Sizes in blosc's header: unpacked at byte 4, packed at byte 12."""
    if int.from_bytes(chunk[12:16], "little") != len(chunk):
        raise ValueError(CUT)
    return int.from_bytes(chunk[4:8], "little")


def _zstd_size(chunk: bytes, limit: int) -> int:
    """Frame_Content_Size of a zstd frame (RFC 8878, 3.1.1.1); a frame that hides it counts as beyond the limit.

    A cut frame unpacks to anything: its blocks are walked to the end.
    """
    descriptor = chunk[4]
    flag, single, checksum = descriptor >> 6, descriptor >> 5 & 1, descriptor >> 2 & 1
    width = {0: single, 1: 2, 2: 4, 3: 8}[flag]
    first = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    end, last = first + width, False
    while not last:
        if end + 3 > len(chunk):
            raise ValueError(CUT)
        header = int.from_bytes(chunk[end : end + 3], "little")
        last, repeated = bool(header & 1), header >> 1 & 3 == 1
        end += 3 + (1 if repeated else header >> 3)
    if end + 4 * checksum != len(chunk):
        raise ValueError(CUT)
    if width == 0:
        return limit + 1
    return int.from_bytes(chunk[first : first + width], "little") + (256 if width == 2 else 0)


# Bytes that a chunk declares to unpack to, by codec: read from its header, or unpacked up to the limit.
SIZES: dict[str, Callable[[bytes, int], int]] = {
    "none": lambda chunk, limit: len(chunk),
    "blosc": _blosc_size,
    "zstd": _zstd_size,
    "lz4": lambda chunk, limit: int.from_bytes(chunk[:4], "little"),
    "gzip": _inflated,
    "zlib": _inflated,
}


def _ends(buffer: _Buffer) -> np.ndarray:
    array = buffer.array("meta/episode_ends")
    with reading(buffer.path, "meta/episode_ends"):
        ends = np.asarray(array[:])
    row_numbers = ends.ndim == 1 and ends.dtype.kind in "iu" and len(ends) > 0
    if not row_numbers or np.any(np.diff(ends.astype(np.int64), prepend=0) < 1):
        raise DatasetError(
            f"{buffer.path}: meta/episode_ends is {ends.ravel()[:5].tolist()}...; wanted rising row numbers, one an "
            "episode"
        )
    return ends.astype(np.int64)
