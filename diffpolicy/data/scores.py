"""Reference scores: what a return is measured against, and where that measure does not hold.

    score = 100 (return - low) / (high - low)         low: a random policy's mean return, high: an expert's

D4RL's references come with its dataset names, Minari's with a dataset's metadata (`minari.get_normalized_score` has no
factor 100; here both have it). A return is comparable only in the environment that its references were measured in:
anywhere else the number would look like a score and be none, so it is refused, with the reason.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from diffpolicy.errors import SpecError


@dataclass(frozen=True)
class Reference:
    """Two returns that a score is measured against.

    Args:
        kind: `d4rl` or `minari`.
        name: of the dataset they belong to.
        low: return that scores 0, None if there is none.
        high: return that scores 100, None if there is none.
        env_ids: environments in which returns are comparable.
        reason: why they are not in others; in any, where `env_ids` is empty.
    """

    kind: str
    name: str
    low: float | None
    high: float | None
    env_ids: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        """Return kind and name, as reports show them."""
        return f"{self.kind} {self.name}"

    def why_not(self, env_id: str | None) -> str | None:
        """Return why returns of this environment have no such score, None if they have."""
        played = (env_id or "").rpartition(":")[2]
        if self.low is not None and played in self.env_ids:
            return None
        fits = f"; play {' or '.join(self.env_ids)}, or ask for no score" if self.env_ids else "; ask for no score"
        return f"returns of {env_id} have no score of {self}: {self.reason}{fits}"

    def check(self, env_id: str | None) -> None:
        """Refuse an environment whose returns are not comparable.

        Raises:
            SpecError: with the reason.
        """
        if reason := self.why_not(env_id):
            raise SpecError(reason)

    def score(self, returns: np.ndarray) -> np.ndarray:
        """Return `100 (return - low) / (high - low)` of undiscounted returns `(E,)`."""
        assert self.low is not None
        assert self.high is not None
        return 100 * (np.asarray(returns, dtype=np.float64) - self.low) / (self.high - self.low)


def _locomotion(robot: str, reason: str) -> tuple[tuple[str, ...], str]:
    versions = tuple(f"{robot}-v{version}" for version in (2, 3, 4))
    return versions, f"they belong to {robot}-v2, whose dynamics and rewards -v3 and -v4 keep{reason}"


ADROIT = "they were measured in D4RL's Adroit hand, which Gymnasium-Robotics keeps as AdroitHand*-v1 with 200 steps"
PEN = "they were measured over 100 steps, and AdroitHandPen-v1 plays 200 (Minari#303)"
KITCHEN = (
    "FrankaKitchen's reward may count each finished task again at every step, where the references count it once; "
    "compare the number of finished tasks"
)
# Environments in which returns are comparable with D4RL's references, beside D4RL's own, and why not in others.
D4RL: dict[str, tuple[tuple[str, ...], str]] = {
    "halfcheetah": _locomotion("HalfCheetah", ""),
    "hopper": _locomotion("Hopper", ", while -v5 rewards fewer steps"),
    "walker2d": _locomotion("Walker2d", ", while -v5 rewards fewer steps and has another right foot"),
    "ant": _locomotion("Ant", ", while -v5 rewards fewer steps and counts contact costs"),
    "maze2d": ((), "Gymnasium-Robotics' PointMaze is another task than maze2d, with its own goals and time limits"),
    "antmaze": ((), "Gymnasium-Robotics' AntMaze is another task than antmaze, with its own goals and time limits"),
    "pen": ((), PEN),
    "door": (("AdroitHandDoor-v1",), ADROIT),
    "hammer": (("AdroitHandHammer-v1",), ADROIT),
    "relocate": (("AdroitHandRelocate-v1",), ADROIT),
    "kitchen": ((), KITCHEN),
}


@cache
def reference_scores() -> Mapping[str, Any]:
    """D4RL's reference returns by dataset name, with their source."""
    return json.loads((files("diffpolicy.data") / "ref_scores.json").read_text())["envs"]


def d4rl(name: str) -> Reference:
    """Return D4RL's references for one of its datasets.

    Raises:
        SpecError: if D4RL has none of that name.
    """
    entry = reference_scores().get(name)
    if entry is None or entry["ref_min"] is None:
        raise SpecError(f"D4RL has no reference scores for {name!r}; give a name such as hopper-medium-v2, or no score")
    env_ids, reason = D4RL.get(name.partition("-")[0], ((), "they belong to D4RL's own environment"))
    return Reference("d4rl", name, entry["ref_min"], entry["ref_max"], (*env_ids, name), reason)


def of_dataset(meta: Mapping[str, Any]) -> Reference | None:
    """Return the references of a dataset that came from Minari, None for others.

    Args:
        meta: `Episodes.meta`, or a run's `config.json` under `dataset`.
    """
    if meta.get("source") != "minari":
        return None
    name = str(meta.get("dataset_id", "mixture"))
    low, high = meta.get("ref_min_score"), meta.get("ref_max_score")
    made_in = dict.fromkeys(meta[key] for key in ("env_id", "eval_env_id") if meta.get(key))
    if low is None or high is None or not -math.inf < low < high < math.inf:
        return Reference("minari", name, None, None, (), _missing(name))
    if reason := _incomparable(meta, high):
        return Reference("minari", name, low, high, (), reason)
    return Reference("minari", name, low, high, tuple(made_in), "they belong to the dataset's own environment")


def _missing(name: str) -> str:
    if name.startswith("mujoco/"):
        return "its metadata hold none (Minari#323), and D4RL's belong to other data and older environments"
    return "its metadata hold no ref_min_score below a ref_max_score"


def _incomparable(meta: Mapping[str, Any], high: float) -> str | None:
    """Return why references that a dataset has are no measure even in its own environment."""
    env_id, kwargs = str(meta.get("env_id")), meta.get("env_kwargs") or {}
    if env_id.startswith("FrankaKitchen") and kwargs.get("remove_task_when_completed") is not True:
        return KITCHEN
    if env_id.startswith("AdroitHandPen") and math.isclose(high, reference_scores()["pen-human-v1"]["ref_max"]):
        return PEN
    return None
