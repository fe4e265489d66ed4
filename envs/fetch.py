"""Experts for gymnasium-robotics' Fetch tasks: `FetchReach-v4` and `FetchPickAndPlace-v4`.

An action moves the gripper by at most `STEP` along each axis, so the expert asks for the way to a target in one step,

    action = clip((target - gripper) / STEP, -1, 1)        and the fourth number opens (+1) or closes (-1) the fingers.

```
      1      .->.            1  not above the object: rise to HOVER and come over it, fingers open
            /    | 2         2  above it: descend, fingers open
    -------'    [o] 3        3  round it: close the fingers
                 '--> 4      4  fingers on it: carry it to the goal, and hold it there
```

What to do follows from the present observation only: a gripper that is pushed away, or loses the object, begins again
where it is, and a network that sees one observation can imitate it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from .errors import EnvsError

Array = NDArray[np.float64]

STEP = 0.05  # metres that an action of 1 moves the gripper
HOVER = 0.06  # height in metres of the gripper over the object while it comes from the side
ROUND = np.array([0.03, 0.02, 0.025])  # closing grasps inside this: fingers are wide in x, and close in y round 5 cm
DESCENT = 0.8, 1.55  # in units of ROUND: sideways distances of the lowest height (0) and the full one (HOVER)
GAIN_50_HZ = 0.84  # at which 10 steps of 20 ms move the gripper as far as 5 of 40 ms
ON_OBJECT = 0.056  # opening in metres below which fingers round an object of 5 cm press on it; open, it is 0.1


def reach_at_50_hz(**kwargs: Any) -> gym.Env[Any, Any]:
    """Returns `FetchReach-v4` at a robot's rate: 20 ms a step instead of 40; `FetchReach50Hz-v0`, 100 steps an episode.

    Actions are multiplied by `GAIN_50_HZ`: the gripper hangs on its target by a spring, so half the way in half the
    time would move it at 0.6 of the speed. Like this it is as fast as at 25 Hz.
    """
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    env = gym.make("FetchReach-v4", max_episode_steps=-1, **kwargs)
    robot: Any = env.unwrapped
    robot.n_substeps //= 2
    return gym.wrappers.TransformAction(env, lambda action: GAIN_50_HZ * action, env.action_space)


class _FetchExpert(ABC):
    """What the experts share: observations of one environment or of many in, actions out."""

    task: ClassVar[str]
    size: ClassVar[int]  # of `observation`

    def predict(
        self,
        observation: Mapping[str, NDArray[Any]],
        state: tuple[Array, ...] | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], tuple[Array, ...] | None]:
        """Returns the actions, `(4,)` or `(N, 4)`, and the state unchanged, in stable-baselines3's protocol.

        Args:
            observation: `observation`, `(10,)` or `(N, 10)` of FetchReach and `(25,)` or `(N, 25)` of
                FetchPickAndPlace, and `desired_goal`, `(3,)` or `(N, 3)`, in metres.
            state: part of the protocol; the expert has none.
            episode_start: part of the protocol.
            deterministic: part of the protocol; an expert has only one way of acting.

        Raises:
            EnvsError: observations of another environment.
        """
        way, fingers = self._move(*self._parts(observation))
        return np.concatenate([np.clip(way / STEP, -1.0, 1.0), fingers[..., None]], -1).astype(np.float32), state

    @abstractmethod
    def _move(self, body: Array, goal: Array) -> tuple[Array, Array]:
        """Returns where the gripper goes, `(..., 3)` in metres, and what its fingers do, `(...)`."""

    def _parts(self, observation: Mapping[str, NDArray[Any]]) -> tuple[Array, Array]:
        """Returns `observation`, `(..., size)`, and `desired_goal`, `(..., 3)`."""
        shapes = {key: np.shape(observation[key]) for key in observation} if isinstance(observation, Mapping) else {}
        body, goal = shapes.get("observation", ()), shapes.get("desired_goal", ())
        if body[-1:] != (self.size,) or goal != (*body[:-1], 3):
            raise EnvsError(
                f"The observation has the parts {shapes}: wanted are 'observation' (..., {self.size}) and "
                f"'desired_goal' (..., 3), as the {self.task} environments of gymnasium-robotics give them."
            )
        return np.asarray(observation["observation"], np.float64), np.asarray(observation["desired_goal"], np.float64)


class FetchReachExpert(_FetchExpert):
    """Acts in `FetchReach-v4` and at 50 Hz: moves the gripper straight to the goal, and stays there.

    Example:
        >>> env = gym.make("FetchReach-v4")  # doctest: +SKIP
        >>> action, _ = FetchReachExpert().predict(env.reset(seed=0)[0])  # doctest: +SKIP
    """

    task, size = "FetchReach", 10

    def _move(self, body: Array, goal: Array) -> tuple[Array, Array]:
        way = goal - body[..., :3]
        return way, np.zeros(way.shape[:-1])


class FetchPickAndPlaceExpert(_FetchExpert):
    """Acts in `FetchPickAndPlace-v4`; the module's head tells how.

    Example:
        >>> env = gym.make("FetchPickAndPlace-v4")  # doctest: +SKIP
        >>> action, _ = FetchPickAndPlaceExpert().predict(env.reset(seed=0)[0])  # doctest: +SKIP
    """

    task, size = "FetchPickAndPlace", 25

    def _move(self, body: Array, goal: Array) -> tuple[Array, Array]:
        to_object, opening = body[..., 6:9], body[..., 9:11].sum(-1)
        sideways = np.linalg.norm(to_object[..., :2] / ROUND[:2], axis=-1)
        is_round = (sideways < 1.0) & (np.abs(to_object[..., 2]) < ROUND[2])
        holds = is_round & (opening < ON_OBJECT)
        height = np.where(is_round, 0.0, np.interp(sideways, DESCENT, (0.0, HOVER)))
        way = np.where(holds[..., None], goal - body[..., 3:6], to_object + height[..., None] * np.array([0, 0, 1]))
        return way, np.where(is_round, -1.0, 1.0)
