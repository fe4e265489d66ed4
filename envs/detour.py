"""Detour: a point, a round obstacle in its way, and two equally good ways round it.

```
            .-~~~~-.
  start ---(obstacle)--- goal        above and below are mirror images: start and goal lie on the axis of symmetry
            `-....-'
```

The shortest way from `a` to `b` round a disc of radius `R` at the origin is a tangent, an arc and a tangent,

    sqrt(|a|^2 - R^2) + R (angle(a, b) - arccos(R / |a|) - arccos(R / |b|)) + sqrt(|b|^2 - R^2),

so the optimum is known. The mean of the two ways leads straight into the obstacle: whoever imitates demonstrations of
both by regression crashes, whoever models their distribution does not.
"""

import math
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from .errors import EnvsError

Array = NDArray[np.float64]

RADIUS = 0.4  # of the obstacle, whose centre is the origin
START = (-1.0, 0.0)
GOAL = (1.0, 0.0)
GOAL_RADIUS = 0.1  # arriving means being at most this far from GOAL
MAX_STEP = 0.1  # the longest way in one step, in every direction
LIMIT = 1.5  # the arena is [-LIMIT, LIMIT]^2
COLLISION_PENALTY = 10.0  # more than waiting costs until the time limit


def move(position: Array, action: Array) -> Array:
    """Returns where an action leads: `MAX_STEP * action`, no longer than `MAX_STEP`, inside the arena.

    Args:
        position: positions `(..., 2)`.
        action: actions `(..., 2)` in the unit box; what is longer than 1 is shortened to 1.
    """
    length = np.linalg.norm(action, axis=-1, keepdims=True)
    return np.clip(position + MAX_STEP * action / np.maximum(length, 1.0), -LIMIT, LIMIT)


def gap(a: Array, b: Array) -> Array:
    """Returns the distance from the centre of the obstacle to the segments from `a` to `b`, both `(..., 2)`."""
    way = b - a
    along = -(a * way).sum(-1) / np.maximum((way * way).sum(-1), 1e-300)
    return np.linalg.norm(a + np.clip(along, 0.0, 1.0)[..., None] * way, axis=-1)


def arrived(position: Array) -> NDArray[np.bool_]:
    """Returns which positions `(..., 2)` are within `GOAL_RADIUS` of the goal."""
    return np.linalg.norm(position - np.asarray(GOAL), axis=-1) <= GOAL_RADIUS


def swept(a: Array, b: Array) -> Array:
    """Returns the angle, counter-clockwise, that segments from `a` to `b`, both `(..., 2)`, sweep round the centre."""
    return np.arctan2(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0], (a * b).sum(-1))


def optimal_length(start: tuple[float, float] | Array = START) -> float:
    """Returns the length of the shortest way from `start` to the rim of the goal: tangent, arc, tangent.

    Raises:
        EnvsError: `start` lies inside the obstacle.
    """
    a, b = np.asarray(start, np.float64), np.asarray(GOAL)
    if math.hypot(*a) < RADIUS:
        raise EnvsError(f"The start ({a[0]:g}, {a[1]:g}) lies inside the obstacle: keep {RADIUS} from the origin.")
    if gap(a, b) >= RADIUS:
        return float(np.linalg.norm(b - a)) - GOAL_RADIUS
    arc = abs(float(swept(a, b)))
    tangents = 0.0
    for distance in (math.hypot(*a), math.hypot(*b)):
        arc -= math.acos(RADIUS / distance)
        tangents += math.sqrt(distance**2 - RADIUS**2)
    return tangents + RADIUS * arc - GOAL_RADIUS


def passes(start: tuple[float, float] | Array, actions: Array) -> NDArray[np.int64]:
    """Tells on which side of the obstacle chunks of actions pass when the environment plays them open loop.

    Args:
        start: where each chunk starts, `(2,)` or `(B, 2)`.
        actions: chunks `(B, T, 2)`; what follows the arrival at the goal is not played.

    Returns:
        `(B,)`: +1 above (clockwise round the centre), -1 below, 0 through the obstacle (or exactly along the axis).
    """
    actions = np.asarray(actions, np.float64)
    position = np.broadcast_to(np.asarray(start, np.float64), (len(actions), 2))
    angle, crashed, playing = np.zeros(len(actions)), np.zeros(len(actions), bool), np.ones(len(actions), bool)
    for action in actions.swapaxes(0, 1):
        after = move(position, action)
        crashed |= playing & (gap(position, after) < RADIUS)
        angle += playing * swept(position, after)
        playing &= ~arrived(after)
        position = after
    return np.where(crashed, 0, -np.sign(angle)).astype(np.int64)


class Detour(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A point that must get past a round obstacle, above or below.

    Observation: `(2,)`, the position in the arena `[-1.5, 1.5]^2`. Action: `(2,)` in `[-1, 1]^2`, a displacement in
    units of `MAX_STEP`, of length at most 1. Reward: `-MAX_STEP` a step, so the return is minus the way that could
    have been travelled, and `-COLLISION_PENALTY` more for touching the obstacle. The episode terminates at the goal
    and in the obstacle; `info` holds `success` and `collision`. No episode is better than `optimal_return()`.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (as Gymnasium has it)

    def __init__(self, start_noise: float = 0.0, render_mode: str | None = None) -> None:
        """Makes the environment.

        Args:
            start_noise: how far the start is moved at most in x and in y; 0 starts exactly on the axis of symmetry.
            render_mode: `rgb_array` or None.

        Raises:
            EnvsError: the start could lie in the obstacle or outside the arena.
        """
        if not 0.0 <= start_noise <= 0.3:
            raise EnvsError(f"start_noise is {start_noise}: it must lie between 0 and 0.3, clear of the obstacle.")
        self.start_noise = start_noise
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-LIMIT, LIMIT, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.path = [np.asarray(START)]

    def optimal_length(self) -> float:
        """Returns the length of the shortest way from this episode's start to the rim of the goal."""
        return optimal_length(self.path[0])

    def optimal_return(self) -> float:
        """Returns a bound that no episode's return exceeds: the fewest steps that cover `optimal_length()`."""
        return -MAX_STEP * math.ceil(self.optimal_length() / MAX_STEP - 1e-9)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Puts the point at the start; `options` may hold another `start`, a position `(2,)` outside the obstacle."""
        super().reset(seed=seed)
        start = np.asarray((options or {}).get("start", START), np.float64)
        start = start + self.np_random.uniform(-self.start_noise, self.start_noise, 2)
        if np.abs(start).max() > LIMIT or math.hypot(*start) < RADIUS:
            raise EnvsError(
                f"The start ({start[0]:g}, {start[1]:g}) is in the obstacle or outside [-{LIMIT}, {LIMIT}]^2."
            )
        self.path = [start]
        return self._observation(), {"success": False, "collision": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Moves the point by `action`, `(2,)`; the way between the two positions counts as well as its end."""
        before, after = self.path[-1], move(self.path[-1], np.asarray(action, np.float64))
        self.path.append(after)
        collision = bool(gap(before, after) < RADIUS)
        success = bool(arrived(after)) and not collision
        reward = -MAX_STEP - COLLISION_PENALTY * collision
        return self._observation(), reward, success or collision, False, {"success": success, "collision": collision}

    def _observation(self) -> NDArray[np.float32]:
        return self.path[-1].astype(np.float32)

    def render(self) -> NDArray[np.uint8] | None:  # type: ignore[override]
        """Returns a picture `(240, 240, 3)` of the obstacle, the goal and the way so far."""
        if self.render_mode is None:
            return None
        x, y = np.meshgrid(np.linspace(-LIMIT, LIMIT, 240), np.linspace(LIMIT, -LIMIT, 240))
        picture = np.full((240, 240, 3), 255, np.uint8)
        picture[np.hypot(x, y) < RADIUS] = (70, 70, 70)
        picture[np.hypot(x - GOAL[0], y - GOAL[1]) < GOAL_RADIUS] = (90, 180, 90)
        for place in self.path:
            picture[np.hypot(x - place[0], y - place[1]) < 0.02] = (120, 150, 220)
        picture[np.hypot(x - self.path[-1][0], y - self.path[-1][1]) < 0.05] = (30, 60, 200)
        return picture


class DetourExpert:
    """Goes the shortest way round the obstacle, above or below with probability 1/2, chosen anew in each episode.

    The way keeps `margin` clear of the obstacle: with `r = RADIUS + margin` the point heads for the goal when it sees
    it, else along the tangent to the circle of radius `r` on its side, and outwards when it has been pushed inside that
    circle. The side of each environment is the state, held by the caller; sides are drawn from a generator that `seed`
    fixes.
    """

    def __init__(self, seed: int | None = None, margin: float = 0.1) -> None:
        """Makes an expert.

        Args:
            seed: of the generator that chooses the sides.
            margin: distance kept from the obstacle, between 0 and 0.5.

        Raises:
            EnvsError: the margin is out of its range.
        """
        if not 0.0 <= margin <= 0.5:
            raise EnvsError(f"margin is {margin}: it must lie between 0 and 0.5, so that start and goal stay outside.")
        self.radius = RADIUS + margin
        self._generator = np.random.default_rng(seed)

    def predict(
        self,
        observation: NDArray[np.float32],
        state: tuple[Array, ...] | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], tuple[Array, ...]]:
        """Returns the actions and the state, in stable-baselines3's protocol.

        Args:
            observation: positions, `(2,)` or `(N, 2)`.
            state: what the former call returned, `(side (N,),)`, +1 above and -1 below; None chooses all sides anew.
            episode_start: `(N,)`, where a new episode starts and a new side is chosen.
            deterministic: part of the protocol; an expert has only one way of acting.
        """
        position = np.atleast_2d(np.asarray(observation, np.float64))
        side = self._sides(len(position), state, episode_start)
        action = self._heading(position, side).astype(np.float32)
        return action.reshape(np.shape(observation)), (side,)

    def _sides(self, n: int, state: tuple[Array, ...] | None, episode_start: NDArray[np.bool_] | None) -> Array:
        starts = np.full(n, state is None) if episode_start is None else np.asarray(episode_start) | (state is None)
        drawn = self._generator.choice([-1.0, 1.0], n) if starts.any() else np.ones(n)
        return np.where(starts, drawn, drawn if state is None else state[0])

    def _heading(self, position: Array, side: Array) -> Array:
        to_goal = np.asarray(GOAL) - position
        remaining = np.linalg.norm(to_goal, axis=-1, keepdims=True)
        straight = to_goal / np.maximum(remaining, MAX_STEP)
        keep = np.minimum(self.radius, np.linalg.norm(position, axis=-1)) - 1e-9  # pushed inside: nearer is too near
        sees_goal = gap(position, np.broadcast_to(GOAL, position.shape)) >= keep
        return np.where(sees_goal[:, None], straight, self._tangent(position, side))

    def _tangent(self, position: Array, side: Array) -> Array:
        distance = np.linalg.norm(position, axis=-1)
        touch = np.arctan2(position[:, 1], position[:, 0]) - side * np.arccos(np.minimum(self.radius / distance, 1.0))
        along = side[:, None] * np.stack([np.sin(touch), -np.cos(touch)], axis=-1)
        inside = np.maximum(self.radius - distance, 0.0) / MAX_STEP
        heading = along + inside[:, None] * position / distance[:, None]
        return heading / np.linalg.norm(heading, axis=-1, keepdims=True)
