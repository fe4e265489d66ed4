"""Making a Gymnasium environment by its id: the packages that register it are imported first, quietly."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from diffpolicy.errors import MissingExtraError, first_line

PLUGINS = ("gymnasium_robotics", "gym_pusht", "ogbench")


def register(env_id: str) -> None:
    """Import the packages that register robotics, Push-T and OGBench, one by one until `env_id` is known.

    Raises:
        MissingExtraError: if one of them is installed and cannot be imported.
    """
    for plugin in PLUGINS:
        if env_id not in gymnasium.registry and ":" not in env_id and find_spec(plugin):
            try:
                with redirect_stderr(StringIO()):  # they print notices about tasks nobody asked for
                    import_module(plugin)
            except Exception as error:  # a renderer that MUJOCO_GL names and the system lacks, for example
                raise MissingExtraError(
                    f"{env_id!r} may be an environment of {plugin}, which cannot be imported ({first_line(error)}); "
                    "install it again, and if its renderer is what fails, set MUJOCO_GL=disable"
                ) from error


def make(env: str | EnvSpec, **kwargs: Any) -> gymnasium.Env:
    """Return `gymnasium.make`'s environment, beside a mujoco_py that does not work too."""
    with _without_mujoco_py():
        return gymnasium.make(env, **kwargs)


@contextmanager
def _without_mujoco_py() -> Iterator[None]:
    """Gymnasium-robotics tries mujoco_py, which d4rl brings, and trips over one that lacks its MuJoCo 2.1."""
    absent = "mujoco_py" not in sys.modules
    if absent:
        sys.modules["mujoco_py"] = None  # type: ignore[assignment]  # then importing it is an ImportError
    try:
        yield
    finally:
        if absent:
            del sys.modules["mujoco_py"]
