"""Trained stable-baselines3 and sb3-contrib agents as actors: a model's zip, and the `vecnormalize.pkl` beside it.

    obs --(clip((obs - mean) / sqrt(var + epsilon), +-clip_obs))--> model.predict --> action

Both files hold pickles, and unpickling runs whatever code their author put there; so loading wants `trust_pickle=True`.
Of `vecnormalize.pkl`, which need not be there, only numbers are kept. Agents saved before Gymnasium name classes of
`gym`: while a file is read, `gym` stands for `gymnasium`.
"""

import importlib
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import EnvsError

ALGORITHMS = {
    "a2c": ("stable_baselines3", "A2C"),
    "ddpg": ("stable_baselines3", "DDPG"),
    "ppo": ("stable_baselines3", "PPO"),
    "sac": ("stable_baselines3", "SAC"),
    "td3": ("stable_baselines3", "TD3"),
    "ars": ("sb3_contrib", "ARS"),
    "crossq": ("sb3_contrib", "CrossQ"),
    "ppo_lstm": ("sb3_contrib", "RecurrentPPO"),
    "tqc": ("sb3_contrib", "TQC"),
    "trpo": ("sb3_contrib", "TRPO"),
}

# What only training needs is replaced and not unpickled: schedules are code of the Python version that saved them.
BUFFERS = ("_last_obs", "_last_original_obs", "_last_episode_starts", "ep_info_buffer", "ep_success_buffer")
SCHEDULES = ("lr_schedule", "clip_range", "clip_range_vf")
SETTINGS = {"learning_rate": 0.0, "buffer_size": 1}


@dataclass(frozen=True)
class ObsNormalizer:
    """What `VecNormalize` does to observations: `clip((obs - mean) / sqrt(var + epsilon), -clip, clip)`."""

    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    epsilon: float
    clip: float

    def __call__(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        """Normalises observations, `(Do,)` or `(N, Do)`."""
        scaled = (obs - self.mean) / np.sqrt(self.var + self.epsilon)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)


@dataclass(frozen=True)
class Sb3Agent:
    """A trained agent that acts: normalises the observation where its training did, and asks the model."""

    model: Any
    normalizer: ObsNormalizer | None

    def predict(
        self,
        observation: NDArray[Any],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Returns actions, `(Da,)` or `(N, Da)`, and the state, in stable-baselines3's protocol.

        Args:
            observation: `(Do,)` or `(N, Do)`, as the environment gives it.
            state: of recurrent models; others pass it on.
            episode_start: `(N,)`, of recurrent models.
            deterministic: the mode of the model's distribution, not a sample.
        """
        seen = observation if self.normalizer is None else self.normalizer(observation)
        return self.model.predict(seen, state, episode_start, deterministic)


def load_sb3_agent(path: str | Path, trust_pickle: bool = False, algorithm: str | None = None) -> Sb3Agent:
    """Loads a trained agent onto the CPU.

    Args:
        path: a model's zip, or a folder with one; a `vecnormalize.pkl` beside the zip is used.
        trust_pickle: the files hold pickles, which can run any code: True says that you trust where they come from.
        algorithm: `ppo`, `sac`, `tqc`, ...; None reads it from the folder's name, as in `tqc-HalfCheetah`.

    Raises:
        EnvsError: no such file, no trust, an unknown algorithm, a file that cannot be read, or a missing package.
    """
    zip_path = _find_zip(Path(path))
    if not trust_pickle:
        raise EnvsError(f"{zip_path} holds pickles, which can run any code: pass trust_pickle=True if you trust it.")
    model_class = _model_class(algorithm or zip_path.resolve().parent.name.split("-")[0], zip_path)
    with _gym_is_gymnasium():
        model = _load_model(model_class, zip_path)
        normalizer = _load_normalizer(zip_path.with_name("vecnormalize.pkl"))
    return Sb3Agent(model, normalizer)


def _find_zip(path: Path) -> Path:
    if path.is_file():
        return path
    zips = sorted(path.glob("*.zip"))
    if len(zips) != 1:
        raise EnvsError(f"{path} holds {len(zips)} zips of agents: give a folder with one, or the zip itself.")
    return zips[0]


def _model_class(algorithm: str, zip_path: Path) -> Any:
    if algorithm.lower() not in ALGORITHMS:
        known = ", ".join(sorted(ALGORITHMS))
        raise EnvsError(f"{zip_path}: '{algorithm}' is not a known algorithm: pass algorithm= one of {known}.")
    package, name = ALGORITHMS[algorithm.lower()]
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError as error:
        install = package.replace("_", "-")
        raise EnvsError(f"{zip_path} needs {install}, which is not installed: pip install {install}.") from error


def _load_model(model_class: Any, zip_path: Path) -> Any:
    replaced = {**dict.fromkeys(BUFFERS), **dict.fromkeys(SCHEDULES, _zero_schedule), **SETTINGS}
    try:
        return model_class.load(zip_path, device="cpu", custom_objects=replaced)
    except Exception as error:  # a pickle can fail in any way
        raise _unreadable(zip_path, f"{model_class.__name__} agent", error) from error


def _zero_schedule(progress_remaining: float) -> float:
    return 0.0


def _load_normalizer(path: Path) -> ObsNormalizer | None:
    if not path.exists():
        return None
    try:
        saved = pickle.loads(path.read_bytes())
        wanted, rms = bool(saved.norm_obs), saved.obs_rms
        normalizer = ObsNormalizer(rms.mean, rms.var, float(saved.epsilon), float(saved.clip_obs))
    except Exception as error:  # a pickle can fail in any way
        raise _unreadable(path, "VecNormalize", error) from error
    return normalizer if wanted else None


def _unreadable(path: Path, wanted: str, error: Exception) -> EnvsError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return EnvsError(f"{path} is not a {wanted} that can be read ({reason}): check the file, and the algorithm.")


@contextmanager
def _gym_is_gymnasium() -> Iterator[None]:
    """Lets `gym` and its spaces mean Gymnasium's while pickles are read, and puts `sys.modules` back afterwards."""
    before = _loaded("gym")
    spaces = {name: module for name, module in _loaded("gymnasium").items() if ".spaces" in name or "." not in name}
    sys.modules.update({name.replace("gymnasium", "gym", 1): module for name, module in spaces.items()})
    try:
        yield
    finally:
        for name in _loaded("gym"):
            del sys.modules[name]
        sys.modules.update(before)


def _loaded(package: str) -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}
