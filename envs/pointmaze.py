"""An expert for gymnasium-robotics' point mazes: the shortest path, followed by a PD controller with a carrot.

```
    #########          The walls are thickened by `clearance`; the shortest path then bends only at the thickened walls'
    #  x.   #          corners (+). What is known beforehand is a table of the corners: which sees which, and the shortest way
    #####+. #          from each to each. For an observation, the way from x to the goal g is the best over first and last
    #####+* #          corner. The carrot * runs `lookahead` ahead of the point on that way, and a spring and a damper pull:
    #  g.   #
    #########              action = gain (speed (carrot - x) / lookahead - v)
```

Everything is a function of the present observation, and a continuous one but for the places from which two ways are equally
long, so a network can imitate it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from .errors import EnvsError

Array = NDArray[np.float64]
WALL = 1  # in a maze map; every other mark is free ground
LEGS = 4  # of a path that a carrot can pass in one lookahead


class PointMazeExpert:
    """Acts in `PointMaze_*` environments by the shortest path; see the module's head for how.

    Example:
        >>> env = gym.make("PointMaze_UMaze-v3", continuing_task=False)  # doctest: +SKIP
        >>> expert = PointMazeExpert.from_env(env)  # doctest: +SKIP
        >>> action, _ = expert.predict(env.reset(seed=0)[0])  # doctest: +SKIP
    """

    def __init__(
        self,
        maze_map: Sequence[Sequence[Any]],
        scale: float = 1.0,
        clearance: float = 0.3,
        lookahead: float = 0.6,
        speed: float = 3.0,
        gain: float = 0.4,
    ) -> None:
        """Prepares the table of corners of one maze.

        Args:
            maze_map: rows of marks, 1 for a wall, bordered by walls.
            scale: side of a cell, in metres.
            clearance: distance kept from walls, in metres; at least the point's radius 0.1 and less than half a cell.
            lookahead: distance of the carrot along the path, in metres.
            speed: of travel on a straight way, in m/s.
            gain: action per m/s of error of the velocity.

        Raises:
            EnvsError: the map is not bordered by walls, or there is no room for the clearance.
        """
        self.wall = _walls(maze_map)
        if not 0.0 < clearance < scale / 2:
            raise EnvsError(f"clearance is {clearance}: it must lie between 0 and half the side of a cell, {scale / 2}.")
        self.scale, self.clearance, self.lookahead, self.speed, self.gain = scale, clearance, lookahead, speed, gain
        self._origin = 0.5 * scale * np.array([-self.wall.shape[1], self.wall.shape[0]])
        self._blocks = self._centres(np.argwhere(self.wall[1:-1, 1:-1]) + 1)
        self._corners = self._find_corners()
        self._legs = self._leg(self._corners[:, None], self._corners)
        np.fill_diagonal(self._legs, np.inf)
        self._ways = _shortest_ways(self._legs)

    @classmethod
    def from_env(cls, env: gym.Env[Any, Any], speed: float = 3.0) -> "PointMazeExpert":
        """Makes the expert for an environment.

        Args:
            env: a `PointMaze_*` environment of gymnasium-robotics, wrapped or not.
            speed: of travel on a straight way, in m/s.

        Raises:
            EnvsError: the environment is not a point maze.
        """
        maze = getattr(env.unwrapped, "maze", None)
        space = env.observation_space
        points = isinstance(space, gym.spaces.Dict) and "observation" in space.spaces and space["observation"].shape == (4,)
        if maze is None or not points:
            name = env.spec.id if env.spec else type(env.unwrapped).__name__
            raise EnvsError(f"{name} is not a point maze: the expert wants a PointMaze_* environment of gymnasium-robotics.")
        return cls(maze.maze_map, scale=float(maze.maze_size_scaling), speed=speed)

    def predict(
        self,
        observation: Mapping[str, Array],
        state: tuple[Array, ...] | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], tuple[Array, ...] | None]:
        """Returns the actions, `(2,)` or `(N, 2)`, and the state unchanged, in stable-baselines3's protocol.

        Args:
            observation: `observation` (x, y, vx, vy), `(4,)` or `(N, 4)`, and `desired_goal`, `(2,)` or `(N, 2)`.
            state: part of the protocol; the expert has none.
            episode_start: part of the protocol.
            deterministic: part of the protocol; an expert has only one way of acting.

        Raises:
            EnvsError: a goal that cannot be reached from where the point is.
        """
        body = np.asarray(observation["observation"], np.float64)
        rows = body.reshape(-1, 4)
        goal = np.asarray(observation["desired_goal"], np.float64).reshape(-1, 2)
        velocity = self.speed * (self.carrot(rows[:, :2], goal) - rows[:, :2]) / self.lookahead
        action = np.clip(self.gain * (velocity - rows[:, 2:]), -1.0, 1.0)
        return action.reshape(*body.shape[:-1], 2).astype(np.float32), state

    def carrot(self, position: Array, goal: Array) -> Array:
        """Returns the points `lookahead` ahead on the shortest ways.

        Args:
            position: `(N, 2)`, in metres.
            goal: `(N, 2)`, in metres.

        Returns:
            `(N, 2)`; the goal where it is nearer than the lookahead.

        Raises:
            EnvsError: a goal that cannot be reached.
        """
        place, goal = self._keep_clear(position), self._keep_clear(goal)
        rows, end = np.arange(len(place)), len(self._corners)
        nodes = np.concatenate([np.broadcast_to(self._corners, (len(goal), end, 2)), goal[:, None]], axis=1)
        to_goal = self._leg(nodes, goal[:, None])  # (N, C + 1), the straight way
        rest = np.concatenate([(self._ways + to_goal[:, None, :-1]).min(-1, initial=np.inf), np.zeros((len(goal), 1))], 1)
        legs = self._leg(place[:, None], nodes)
        if not np.isfinite((legs + rest).min(-1)).all():
            self._refuse(position, goal, np.isfinite((legs + rest).min(-1)))
        left = np.full(len(place), self.lookahead)
        for _ in range(LEGS):
            node = np.argmin(legs + rest, axis=-1)
            place, left = _walk(place, nodes[rows, node], left)
            legs = np.concatenate([self._legs, np.full((1, end), np.inf)])[node]  # no way leads on from the goal,
            legs = np.concatenate([legs, to_goal[rows, node][:, None]], axis=1)  # but to itself
        return place

    def _refuse(self, position: Array, goal: Array, reached: NDArray[np.bool_]) -> None:
        i = int(np.argmin(reached))
        raise EnvsError(f"No way leads from {position[i]} to the goal {goal[i]} in this maze: give positions on free ground.")

    def _centres(self, cells: NDArray[np.int64]) -> Array:
        return self._origin + self.scale * (cells[:, ::-1] + 0.5) * np.array([1.0, -1.0])

    def _find_corners(self) -> Array:
        """Returns the corners `(C, 2)` of the thickened walls: beside grid points where one cell of four is a wall."""
        four = np.stack([self.wall[i : len(self.wall) - 1 + i, j : -1 + j or None] for i in (0, 1) for j in (0, 1)])
        corners = np.argwhere((four.sum(0) == 1)) + 1
        wall_at = np.argmax(four[:, corners[:, 0] - 1, corners[:, 1] - 1], axis=0)
        away = np.array([[1, -1], [-1, -1], [1, 1], [-1, 1]])[wall_at]  # x and y, from the wall's quadrant to the opposite
        point = self._origin + self.scale * corners[:, ::-1] * np.array([1.0, -1.0])
        return point + self.clearance * away

    def _leg(self, a: Array, b: Array) -> Array:
        """Returns the lengths `(...)` of straight ways from `a` to `b`, `(..., 2)`: infinite through a thickened wall."""
        half = self.scale / 2 + self.clearance - 1e-6
        a, b = a[..., None, :], b[..., None, :]
        with np.errstate(divide="ignore", invalid="ignore"):
            s, t = (self._blocks - half - a) / (b - a), (self._blocks + half - a) / (b - a)
        parallel = np.where(np.abs(a - self._blocks) < half, -np.inf, np.inf)  # inside or outside for the whole way
        enter = np.where(a == b, parallel, np.minimum(s, t)).max(-1)
        leave = np.where(a == b, np.inf, np.maximum(s, t)).min(-1)
        through = (np.maximum(enter, 0.0) < np.minimum(leave, 1.0)).any(-1)
        return np.where(through, np.inf, np.linalg.norm(b - a, axis=-1)[..., 0])

    def _keep_clear(self, position: Array) -> Array:
        """Returns positions `(N, 2)` moved out of the thickened walls, sideways from faces and radially from corners."""
        cell = (position - self._origin) / self.scale * np.array([1.0, -1.0])
        index = np.clip(np.floor(cell).astype(np.int64), 1, np.array(self.wall.shape)[::-1] - 2)
        side = np.where(cell - index < 0.5, -1, 1)
        room = self.scale * (0.5 - np.abs(cell - index - 0.5))  # to the nearer side of the cell, in x and in y
        column, row = index.T
        faces = np.stack([self.wall[row, column + side[:, 0]], self.wall[row + side[:, 1], column]], axis=-1)
        corner = self.wall[row + side[:, 1], column + side[:, 0]] & ~faces.any(-1)
        clear = np.where(faces, np.maximum(room, self.clearance), room)
        reach = np.maximum(clear.max(-1), 1e-9)
        clear = clear * np.where(corner & (reach < self.clearance), self.clearance / reach, 1.0)[:, None]
        moved = index + 0.5 + side * (0.5 - clear / self.scale)
        return self._origin + self.scale * moved * np.array([1.0, -1.0])


def _walls(maze_map: Sequence[Sequence[Any]]) -> NDArray[np.bool_]:
    wall = np.array([[mark == WALL for mark in row] for row in maze_map])
    if wall.ndim != 2 or not (wall[[0, -1]].all() and wall[:, [0, -1]].all()):
        raise EnvsError("The maze map is not a rectangle bordered by walls (1): close its border.")
    return wall


def _shortest_ways(legs: Array) -> Array:
    """Returns the lengths `(C, C)` of the shortest ways over legs `(C, C)` (Floyd 1962)."""
    ways = legs.copy()
    np.fill_diagonal(ways, 0.0)
    for via in range(len(ways)):
        ways = np.minimum(ways, ways[:, via, None] + ways[via])
    return ways


def _walk(place: Array, target: Array, left: Array) -> tuple[Array, Array]:
    """Moves places `(N, 2)` towards targets by at most `left`, `(N,)`; returns where they are and what is left to walk."""
    way = target - place
    length = np.linalg.norm(way, axis=-1)
    walked = np.minimum(length, left)
    return place + way * (walked / np.maximum(length, 1e-12))[:, None], left - walked
