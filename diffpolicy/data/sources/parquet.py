"""Parquet files: columns of numbers and of lists of them, looked at before they are read, and read batch by batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.data.sources.reading import reading
from diffpolicy.errors import DatasetError, MissingExtraError

INFO = "meta/info.json"
NUMBERS = (
    "bool",
    "float16",
    "float32",
    "float64",
    *(f"{kind}{b}" for kind in ("int", "uint") for b in (8, 16, 32, 64)),
)
ARROW_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Feature:
    """A column of numbers as info.json declares it; `shape` of one row."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class File:
    """A file of data, and the row of the dataset that it begins with."""

    path: Path
    row: int
    rows: int


HEADROOM = 2 << 30


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a parquet file; what goes wrong in it becomes one sentence.

    600 bytes of parquet can hold a row of 600 million zeros, which no footer has to admit: while a file is open, a
    decoder that asks for 2 GiB more than there was gets none (on Linux, where a process can be told so).
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError(
            f"reading {path} needs the pyarrow package; pip install 'diffpolicy[lerobot]'"
        ) from error
    arrow.allocate_buffer(1)  # pyarrow's allocator reserves its first GiB of addresses before the limit is set
    with reading(path, "the file"), arrow.OSFile(str(path), "rb") as source, _bounded(HEADROOM):
        yield parquet.ParquetFile(source)


@contextmanager
def _bounded(headroom: int) -> Iterator[None]:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [pages * resource.getpagesize() + headroom, *(n for n in (soft, hard) if n != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_column(path: Path, schema: Any, feature: Feature) -> None:
    """Hold a column's type against what is declared.

    The footer counts the numbers of each column too; but pyarrow ends the process where that part of it is damaged.
    """
    if schema.names.count(feature.name) != 1:
        raise DatasetError(f"{path} lacks the column {feature.name}, which {INFO} declares; copy the dataset again")
    number, axes = _innermost(schema.field(feature.name).type)
    name = ARROW_NAMES.get(str(number), str(number))
    if name not in NUMBERS or not (np.can_cast(name, feature.dtype) or feature.dtype.kind == "f"):
        raise DatasetError(f"{path}: {feature.name} is {number}, {INFO} declares {feature.dtype}; correct one of them")
    if axes != len(feature.shape) and not (axes == 0 and feature.shape == (1,)):
        raise _wrong_size(path, feature)


def _wrong_size(path: Path, feature: Feature) -> DatasetError:
    return DatasetError(
        f"{path}: {feature.name} has rows that are empty or not of the shape {feature.shape} that {INFO} declares; "
        "write the dataset again"
    )


def _innermost(kind: Any) -> tuple[Any, int]:
    """Type of the numbers in a column, and how deep they lie in lists."""
    from pyarrow import BaseExtensionType, types

    axes = 0
    if isinstance(kind, BaseExtensionType):
        kind = kind.storage_type
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, axes = kind.value_type, axes + 1
    return kind, axes


def batches(files: list[File], rows: range, columns: list[str], size: int) -> Iterator[tuple[File, int, Any]]:
    """Yield the files' rows within `rows`: the file, the number of the first row, the rows."""
    for file in (file for file in files if file.row < rows.stop and file.row + file.rows > rows.start):
        row = file.row
        with opened(file.path) as parquet:
            for batch in parquet.iter_batches(size, columns=columns):
                first, stop = max(row, rows.start), min(row + len(batch), rows.stop)
                if first < stop:
                    yield file, first, batch.slice(first - row, stop - first)
                row += len(batch)
        if row != file.row + file.rows:
            raise DatasetError(f"{file.path} has {row - file.row} rows and declares {file.rows}; copy it again")


def numbers_of(path: Path, batch: Any, feature: Feature) -> np.ndarray:
    """Rows of a column, `(rows, *shape)`."""
    from pyarrow import BaseExtensionType, compute

    column = batch.column(feature.name)
    if isinstance(column.type, BaseExtensionType):
        column = column.storage
    _, axes = _innermost(column.type)
    for size in feature.shape[:axes]:
        sizes = compute.call_function("list_value_length", [column]).to_numpy(zero_copy_only=False)
        if np.any(sizes != size):  # of an empty row it is NaN
            raise _wrong_size(path, feature)
        column = column.flatten()
    if column.null_count:
        raise _wrong_size(path, feature)
    return column.to_numpy(zero_copy_only=False).reshape(len(batch), *feature.shape)
