"""HDF5, for the formats that use it: every dataset is looked at before it is read.

A file is somebody else's: it may point into other files, hold pickled objects, declare more than it has, or unpack to
far more than it declares. Such a dataset is refused; nothing in a file is executed.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from diffpolicy.errors import DatasetError, MissingExtraError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SMALL_CHUNK = 64 << 10
DEFLATE_RATIO = 1032  # the most that deflate can shrink, zlib's technical notes


def is_hdf5(path: Path) -> bool:
    """Whether the file begins as HDF5 does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8) == SIGNATURE


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a file for reading; what goes wrong in it becomes one sentence.

    Raises:
        DatasetError: if it cannot be read.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (DatasetError, MissingExtraError):
        raise
    except Exception as error:  # HDF5's errors come as many kinds
        raise DatasetError(f"{path} cannot be read as HDF5, it may be cut short ({error}); copy it again") from error


def names(path: Path) -> list[str]:
    """Names at the root of a file."""
    with opened(path) as file:
        return list(file)


def group(path: Path, parent: h5py.Group, name: str, wanted: str) -> h5py.Group:
    """Return a group within `parent`.

    Raises:
        DatasetError: if it is not there, is something else, or lies in another file.
    """
    item = _item(path, parent, name, wanted)
    if not isinstance(item, h5py.Group):
        raise DatasetError(f"{path}: {_place(parent, name)} is not a group; wanted {wanted}")
    return item


def dataset(path: Path, parent: h5py.Group, name: str, wanted: str) -> h5py.Dataset:
    """Return an array of numbers within `parent`, looked at but not read.

    Raises:
        DatasetError: if it is not there, is no array of numbers, lies in another file, was never written whole, or
            unpacks to more than it declares.
    """
    item = _item(path, parent, name, wanted)
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "fiub" or not item.shape:
        raise DatasetError(
            f"{path}: {_place(parent, name)} is not an array of numbers; wanted {wanted}: write it again"
        )
    if item.external or item.is_virtual:
        raise DatasetError(f"{path}: {item.name} keeps its numbers in other files; wanted one whole file: repack it")
    _check_written(path, item)
    return item


def rows(item: h5py.Dataset) -> Callable[[slice], np.ndarray]:
    """Return a reader of slices of rows."""
    return lambda part: np.asarray(item[part])


def chunk_rows(item: h5py.Dataset) -> int:
    """Rows of one chunk, 1 where the rows are not chunked."""
    return item.chunks[0] if item.chunks else 1


def check_rows(path: Path, items: Sequence[h5py.Dataset], rows: int, why: str) -> None:
    """Refuse datasets that do not have this many rows."""
    for item in items:
        if len(item) != rows:
            raise DatasetError(f"{path}: {item.name} has {len(item)} rows; wanted {rows}, {why}: write it again")


def _item(path: Path, parent: h5py.Group, name: str, wanted: str) -> object:
    if name not in parent:
        raise DatasetError(f"{path} lacks {_place(parent, name)}; wanted {wanted}")
    linked = isinstance(parent.get(name, getlink=True), h5py.ExternalLink)
    item = None if linked else parent[name]
    if linked or getattr(item, "file", parent.file).filename != parent.file.filename:
        raise DatasetError(f"{path}: {_place(parent, name)} points into another file; wanted one whole file")
    return item


def _place(parent: h5py.Group, name: str) -> str:
    return f"{(parent.name or '').rstrip('/')}/{name}"


def _check_written(path: Path, item: h5py.Dataset) -> None:
    """Refuse an array with parts that were never written (they would read as zeros), or that unpacks too far."""
    if item.size == 0:
        return
    if item.chunks is None:
        if item.id.get_storage_size() == 0:
            raise DatasetError(f"{path}: {item.name} declares {item.shape} and was never written; write it again")
        return
    wanted = math.prod(math.ceil(size / chunk) for size, chunk in zip(item.shape, item.chunks, strict=True))
    if item.id.get_num_chunks() < wanted:
        raise DatasetError(
            f"{path}: {item.name} has {item.id.get_num_chunks()} of its {wanted} chunks, the others would read as "
            "zeros; write it again"
        )
    if item.compression == "gzip":
        _check_unpacked(path, item, math.prod(item.chunks) * item.dtype.itemsize)


def _check_unpacked(path: Path, item: h5py.Dataset, declared: int) -> None:
    """Refuse chunks that inflate beyond their declared size: HDF5 itself would follow them to the end."""
    infos: list[h5py.h5d.StoreInfo] = []
    item.id.chunk_iter(infos.append)
    for info in infos:
        if info.size * DEFLATE_RATIO <= max(declared, SMALL_CHUNK * DEFLATE_RATIO):
            continue
        if info.size > 2 * declared + SMALL_CHUNK or _inflates_beyond(item, info.chunk_offset, declared):
            raise DatasetError(f"{path}: {item.name} unpacks to more than it declares; do not trust this file")


def _inflates_beyond(item: h5py.Dataset, offset: tuple[int, ...], declared: int) -> bool:
    mask, packed = item.id.read_direct_chunk(offset)
    if mask:  # this chunk skipped a filter: it is not deflated
        return len(packed) > declared + SMALL_CHUNK
    inflater = zlib.decompressobj()
    return len(inflater.decompress(packed, declared + 1)) > declared
