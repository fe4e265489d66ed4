"""NumPy's npz, a zip of arrays: every member is looked at before it is read, and read row block by row block.

    data.npz    observations.npy    header {'descr': '<f4', 'fortran_order': False, 'shape': (R, Do)}, then R * Do * 4
                actions.npy         bytes, stored or deflated

`numpy.load` reads arrays whole, into memory, before anything can be checked. Here the header's shape must be exactly
what the zip says that the member holds, which must be no more than that many packed bytes can hold; nothing is
unpacked beyond it, and no member is ever written to the disk, or unpickled.
"""

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_magic

from diffpolicy.data.sources.hdf5 import DEFLATE_RATIO
from diffpolicy.data.sources.reading import BLOCK_BYTES, reading
from diffpolicy.errors import DatasetError, MissingExtraError, first_line

END = ".npy"
PACKED = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATE_RATIO}
SMALL_MEMBER = 64 << 10
PLAIN = (1, 0)  # the version of all headers below 64 KiB


@dataclass(frozen=True)
class Array:
    """One array of numbers, looked at but not read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    open: Callable[[], IO[bytes]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def rows(self) -> Callable[[slice], np.ndarray]:
        """Return a reader of slices of rows, quickest in their order: the packed bytes are passed once."""
        return _Rows(self).read


class _Rows:
    """The unpacked bytes of an array, and the row that comes next."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
        self.file, self.next = array.open(), 0

    def read(self, rows: slice) -> np.ndarray:
        if rows.start < self.next:
            self.file.close()
            self.file, self.next = self.array.open(), 0
        while self.next < rows.start:
            self._take(min(rows.start - self.next, max(BLOCK_BYTES // max(self.row_bytes, 1), 1)))
        data = self._take(rows.stop - rows.start)
        return np.frombuffer(data, self.array.dtype).reshape(rows.stop - rows.start, *self.array.shape[1:])

    def _take(self, rows: int) -> bytes:
        data = self.file.read(rows * self.row_bytes)
        if len(data) != rows * self.row_bytes:
            raise DatasetError(f"{self.array.name} ends after row {self.next}; wanted {len(self.array)} rows")
        self.next += rows
        return data


class Npz:
    """An opened file: `name in file`, `file.array(name)`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, files: ExitStack) -> None:
        self.path, self._archive, self._files = path, archive, files
        self._members = _members(path, archive)

    def __contains__(self, name: str) -> bool:
        """Whether there is an array of that name."""
        return name + END in self._members

    def array(self, name: str) -> Array:
        """Return an array of numbers whose declarations can be right.

        Raises:
            DatasetError: if it is not there, is no array of numbers stored row after row, or its header, the zip and
                the file disagree on its size.
        """
        if name not in self:
            raise DatasetError(f"{self.path} lacks {name}; it has {', '.join(sorted(self._members))}")
        info = self._members[name + END]
        _check_packing(self.path, info)
        with reading(self.path, name), self._archive.open(info) as file:
            version = read_magic(file)
            if version != PLAIN:
                raise DatasetError(f"{self.path}: {name} has a header of version {version}; wanted plain numbers")
            shape, columns_first, dtype = read_array_header_1_0(file)
            header = file.tell()
        if dtype.kind not in "fiub" or not shape:
            raise DatasetError(f"{self.path}: {name} has type {dtype} and shape {shape}; wanted rows of numbers")
        if columns_first and len(shape) > 1:
            raise DatasetError(f"{self.path}: {name} is stored column by column; save numpy.ascontiguousarray of it")
        size = header + math.prod(shape) * dtype.itemsize
        if min(shape) < 0 or size != info.file_size:
            raise DatasetError(
                f"{self.path}: {name} declares {shape} {dtype}, {size} bytes, and its member {info.file_size}; do not "
                "trust this file"
            )
        return Array(name, shape, dtype, lambda: self._open(info, header))

    def _open(self, info: zipfile.ZipInfo, header: int) -> IO[bytes]:
        file = self._files.enter_context(self._archive.open(info))
        file.read(header)
        return file


@contextmanager
def opened(path: Path) -> Iterator[Npz]:
    """Open a file for reading; what goes wrong in it becomes one sentence.

    Raises:
        DatasetError: if it cannot be read, or a member's name cannot be right.
    """
    try:
        with ExitStack() as files:
            archive = files.enter_context(zipfile.ZipFile(path))
            yield Npz(path, archive, files)
    except (DatasetError, MissingExtraError):
        raise
    except Exception as error:  # the zip's, the packing's and NumPy's errors come as many kinds
        raise DatasetError(f"{path}: the npz cannot be read ({first_line(error)}); copy the dataset again") from error


def names(path: Path) -> list[str]:
    """Names of the arrays of a file, none if it is no zip."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return []
    with reading(path, "the zip"), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(END) for name in archive.namelist() if name.endswith(END)]


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        parts = info.filename.split("/")
        if ".." in parts or parts[0] == "" or info.filename in members:
            raise DatasetError(
                f"{path} has a member {info.filename!r} that is outside of it or there twice; do not trust this file"
            )
        members[info.filename] = info
    return members


def _check_packing(path: Path, info: zipfile.ZipInfo) -> None:
    """Refuse a member that is packed in another way, or declares more than its packed bytes can hold."""
    if info.flag_bits & 1 or info.compress_type not in PACKED:
        raise DatasetError(
            f"{path}: {info.filename} is encrypted or packed in an unusual way; save it with numpy.savez"
        )
    if info.header_offset + info.compress_size > path.stat().st_size:
        raise DatasetError(
            f"{path}: {info.filename} declares {info.compress_size} bytes beyond the file; copy it again"
        )
    if info.file_size > max(PACKED[info.compress_type] * info.compress_size, SMALL_MEMBER):
        raise DatasetError(
            f"{path}: {info.filename} declares {info.file_size} bytes, more than its {info.compress_size} can hold; "
            "do not trust this file"
        )
