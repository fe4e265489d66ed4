"""Spec: every size that the rest depends on, made once from the episodes and the arguments; refuses what cannot work.

    history of To observations        predicted chunk of Tp actions
    o o                               index 0 ........ To-1 .......... Tp-1
    step-1, step                      action of step-1  step  ...
                                                        |<---- Ta ---->|    executed: chunk[To-1 : To-1+Ta]

A history ends at the current step, so element `To-1` of a chunk is the action of the current step.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diffpolicy.errors import SpecError

if TYPE_CHECKING:
    from diffpolicy.data.episodes import Episodes


@dataclass(frozen=True)
class Spec:
    """Sizes, horizons and units of a policy.

    Args:
        obs_shapes: shape of one observation of each name, for example `{"obs": (5,)}`.
        action_dim: `Da`.
        horizon: `Tp`, predicted actions.
        n_obs_steps: `To`, observations of the history.
        n_action_steps: `Ta`, actions executed of each chunk.
        control_period: seconds between actions, None if unknown.

    Raises:
        SpecError: if a size is below 1, or `n_obs_steps - 1 + n_action_steps > horizon`.
    """

    obs_shapes: Mapping[str, tuple[int, ...]]
    action_dim: int
    horizon: int = 16
    n_obs_steps: int = 2
    n_action_steps: int = 8
    control_period: float | None = None

    def __post_init__(self) -> None:
        for name in ("action_dim", "horizon", "n_obs_steps", "n_action_steps"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; give a whole number of at least 1")
        if not self.obs_shapes:
            raise SpecError("the observations have no names; give at least one named array")
        last = self.n_obs_steps - 1 + self.n_action_steps
        if last > self.horizon:
            room = self.horizon - self.n_obs_steps + 1
            lower = f"n_action_steps to at most {room}" if room > 0 else f"n_obs_steps to at most {self.horizon}"
            raise SpecError(
                f"n_obs_steps {self.n_obs_steps} - 1 + n_action_steps {self.n_action_steps} = {last} exceeds horizon "
                f"{self.horizon}; raise horizon to at least {last} or lower {lower}"
            )

    @classmethod
    def from_episodes(cls, episodes: "Episodes", horizon: int, n_obs_steps: int, n_action_steps: int) -> "Spec":
        """Take shapes from the episodes and horizons from the arguments."""
        return cls(
            obs_shapes={name: tuple(array.shape[1:]) for name, array in episodes.obs.items()},
            action_dim=episodes.action.shape[1],
            horizon=horizon,
            n_obs_steps=n_obs_steps,
            n_action_steps=n_action_steps,
            control_period=episodes.meta.get("control_period"),
        )

    @property
    def executed(self) -> slice:
        """Part of a chunk that is executed, `[To-1 : To-1+Ta]`."""
        return slice(self.n_obs_steps - 1, self.n_obs_steps - 1 + self.n_action_steps)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Spec":
        """Inverse of `to_json`."""
        shapes = {name: tuple(shape) for name, shape in values["obs_shapes"].items()}
        return cls(**{**values, "obs_shapes": shapes})
