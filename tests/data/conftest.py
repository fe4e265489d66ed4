"""What tests of data share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_collection() -> Iterator[None]:
    """No garbage is collected while a module runs, so none in the thread in which zarr reads.

    There the end of an HDF5 object left by another test waits for h5py's lock, and once waited for good.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()
