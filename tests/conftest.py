"""What several test files share."""

import os
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from pretended_cuda import PretendedCuda

# The same examples each time: a red check is then a change, not luck.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real datasets; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("DIFFPOLICY_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real datasets are not at {folder}; set DIFFPOLICY_DATA to their folder")
    return folder


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both kinds of device; a GPU is pretended where there is none."""
    with nullcontext() if request.param == "cpu" or torch.cuda.is_available() else PretendedCuda():
        yield request.param


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    """What a malicious file could hold; it has been tried out."""
    bomb = Bomb(tmp_path / "executed")
    pickle.loads(pickle.dumps(bomb))
    assert bomb.mark.exists()
    bomb.mark.unlink()
    return bomb
