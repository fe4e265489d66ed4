"""An expert for gymnasium-robotics' point mazes: the shortest path, followed by a spring and a damper.

```
    #########     The walls are thickened by `clearance`; the shortest path then bends only at corners (+) of thickened
    #  x.   #     walls. A table made once says which corners see each other, and how far each is from each. For an
    #####+. #     observation, the way from x to the goal g is the best over its first and its last corner. The carrot *
    #####+* #     runs `lookahead` ahead of the point on that way and pulls it along:
    #  g.   #
    #########         action = gain (speed (carrot - x) / lookahead - v)
```

All this depends on the present observation only, and is continuous but for the places from which two ways are equally
long, so a network can imitate it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from .errors import EnvsError

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

WALL = 1  # in a maze map; every other mark is free ground
LEGS = 4  # more than a carrot passes in one lookahead
DOWN = np.array([1.0, -1.0])  # rows of a map are counted downwards, y upwards


class PointMazeExpert:
    """Acts in `PointMaze_*` environments by the shortest path; the module's head tells how.

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
        speed: float = 4.0,
        gain: float = 0.4,
    ) -> None:
        """Prepares the table of corners of one maze.

        Args:
            maze_map: rows of marks, 1 for a wall, bordered by walls.
            scale: side of a cell, in metres.
            clearance: distance kept from walls, in metres; more than the point's radius 0.1, less than half a cell.
            lookahead: distance of the carrot along the path, in metres.
            speed: of travel on a straight way, in m/s.
            gain: action per m/s of error of the velocity.

        Raises:
            EnvsError: the map is not bordered by walls, or there is no room for the clearance.
        """
        self.wall = _walls(maze_map)
        if not 0.0 < clearance < scale / 2:
            raise EnvsError(
                f"clearance is {clearance}: it must lie between 0 and half the side of a cell, {scale / 2}."
            )
        self.scale, self.clearance, self.lookahead, self.speed, self.gain = scale, clearance, lookahead, speed, gain
        self._top_left = 0.5 * scale * np.array([-self.wall.shape[1], self.wall.shape[0]])
        self._blocks = self._xy(np.argwhere(self.wall[1:-1, 1:-1]) + 1.5)  # the border cannot stand between two points
        self._corners = self._find_corners()
        self._legs = self._leg(self._corners[:, None], self._corners)
        np.fill_diagonal(self._legs, np.inf)
        self._ways = _shortest_ways(self._legs)
        self._onwards = np.pad(self._legs, ((0, 1), (0, 0)), constant_values=np.inf)  # no way leads on from the goal

    @classmethod
    def from_env(cls, env: gym.Env[Any, Any], speed: float = 4.0) -> "PointMazeExpert":
        """Makes the expert for an environment.

        Args:
            env: a `PointMaze_*` environment of gymnasium-robotics, wrapped or not.
            speed: of travel on a straight way, in m/s.

        Raises:
            EnvsError: the environment is not a point maze.
        """
        maze = getattr(env.unwrapped, "maze", None)
        space = env.observation_space
        if maze is None or not (isinstance(space, gym.spaces.Dict) and space["observation"].shape == (4,)):
            name = env.spec.id if env.spec else type(env.unwrapped).__name__
            raise EnvsError(f"{name} is not a point maze: give a PointMaze_* environment of gymnasium-robotics.")
        return cls(maze.maze_map, scale=float(maze.maze_size_scaling), speed=speed)

    def predict(
        self,
        observation: Mapping[str, NDArray[Any]],
        state: tuple[Array, ...] | None = None,
        episode_start: Bools | None = None,
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
        goal = np.asarray(observation["desired_goal"], np.float64)
        position, velocity = np.split(body.reshape(-1, 4), 2, axis=-1)
        wanted = self.speed * (self.carrot(position, goal.reshape(-1, 2)) - position) / self.lookahead
        action = np.clip(self.gain * (wanted - velocity), -1.0, 1.0)
        return action.reshape(goal.shape).astype(np.float32), state

    def distance(self, position: Array, goal: Array) -> Array:
        """Returns the lengths `(N,)` of the shortest ways past thickened walls, infinite where there is none."""
        place, goal = self._keep_clear(position), self._keep_clear(goal)
        nodes, to_goal = self._nodes(goal)
        return (self._leg(place[:, None], nodes) + self._rest(to_goal)).min(-1)

    def carrot(self, position: Array, goal: Array) -> Array:
        """Returns the points `lookahead` ahead on the shortest ways, or the goals where they are nearer than that.

        Args:
            position: `(N, 2)`, in metres.
            goal: `(N, 2)`, in metres.

        Raises:
            EnvsError: a goal that cannot be reached.
        """
        place, end = self._keep_clear(position), self._keep_clear(goal)
        nodes, to_goal = self._nodes(end)
        rest = self._rest(to_goal)
        legs = self._leg(place[:, None], nodes)
        _check_reached(np.isfinite((legs + rest).min(-1)), position, goal)
        left, rows = np.full(len(place), self.lookahead), np.arange(len(place))
        for _ in range(LEGS):
            node = np.argmin(legs + rest, axis=-1)
            place, left = _walk(place, nodes[rows, node], left)
            legs = np.concatenate([self._onwards[node], to_goal[rows, node, None]], axis=-1)
        return place

    def _nodes(self, goal: Array) -> tuple[Array, Array]:
        """Returns corners and goal, `(N, C + 1, 2)`, and the straight ways from each to the goal, `(N, C + 1)`."""
        corners = np.broadcast_to(self._corners, (len(goal), *self._corners.shape))
        nodes = np.concatenate([corners, goal[:, None]], axis=1)
        return nodes, self._leg(nodes, goal[:, None])

    def _rest(self, to_goal: Array) -> Array:
        """Returns the lengths `(N, C + 1)` of the shortest ways from corners and goal to the goal."""
        last = self._ways + to_goal[:, None, :-1]
        return np.concatenate([last.min(-1, initial=np.inf), np.zeros((len(to_goal), 1))], axis=-1)

    def _xy(self, row_column: NDArray[Any]) -> Array:
        return self._top_left + self.scale * row_column[:, ::-1] * DOWN

    def _find_corners(self) -> Array:
        """Returns the corners `(C, 2)` of thickened walls: beside the grid points where one cell of four is a wall."""
        wall = self.wall
        four = np.stack([wall[:-1, :-1], wall[:-1, 1:], wall[1:, :-1], wall[1:, 1:]])
        points = np.argwhere(four.sum(0) == 1)
        where = np.argmax(four[:, points[:, 0], points[:, 1]], axis=0)
        away = np.array([[1, -1], [-1, -1], [1, 1], [-1, 1]])[where]  # in x and y, from the wall
        return self._xy(points + 1.0) + self.clearance * away

    def _leg(self, a: Array, b: Array) -> Array:
        """Returns the lengths `(...)` of straight ways from `a` to `b`, `(..., 2)`; infinite through a thick wall."""
        half = self.scale / 2 + self.clearance - 1e-6
        a, b = a[..., None, :], b[..., None, :]
        with np.errstate(divide="ignore", invalid="ignore"):
            s, t = (self._blocks - half - a) / (b - a), (self._blocks + half - a) / (b - a)
        beside = np.where(np.abs(a - self._blocks) < half, -np.inf, np.inf)  # in a coordinate that does not change
        enter = np.where(a == b, beside, np.minimum(s, t)).max(-1)
        leave = np.where(a == b, np.inf, np.maximum(s, t)).min(-1)
        through = (np.maximum(enter, 0.0) < np.minimum(leave, 1.0)).any(-1)
        return np.where(through, np.inf, np.linalg.norm(b - a, axis=-1)[..., 0])

    def _keep_clear(self, position: Array) -> Array:
        """Returns positions `(N, 2)` moved out of thickened walls: sideways from faces, radially from corners."""
        cell = (position - self._top_left) / self.scale * DOWN
        index = np.clip(np.floor(cell).astype(np.int64), 1, np.array(self.wall.shape)[::-1] - 2)
        side = np.where(cell - index < 0.5, -1, 1)
        room = self.scale * (0.5 - np.abs(cell - index - 0.5))  # to the nearer side of the cell, in x and in y
        (column, row), (beside, above) = index.T, (index + side).T
        faces = np.stack([self.wall[row, beside], self.wall[above, column]], axis=-1)
        corner = self.wall[above, beside] & ~faces.any(-1)
        reach = np.maximum(room.max(-1, keepdims=True), 1e-9)
        out = np.where(corner[:, None], np.maximum(self.clearance / reach, 1.0), 1.0)
        room = np.where(faces, np.maximum(room, self.clearance), room * out)
        return self._top_left + self.scale * (index + 0.5 + side * (0.5 - room / self.scale)) * DOWN


def _walls(maze_map: Sequence[Sequence[Any]]) -> Bools:
    lengths = {len(row) for row in maze_map}
    wall = (
        np.array([[mark == WALL for mark in row] for row in maze_map]) if len(lengths) == 1 else np.zeros((1, 1), bool)
    )
    if not (wall[[0, -1]].all() and wall[:, [0, -1]].all()):
        raise EnvsError(
            "The maze map is not a rectangle with a border of walls (1): make its rows equal, and close it."
        )
    return wall


def _check_reached(reached: Bools, position: Array, goal: Array) -> None:
    if not reached.all():
        a, b = position[np.argmin(reached)], goal[np.argmin(reached)]
        raise EnvsError(f"No way leads from {a} to the goal {b} in this maze: give places on connected free ground.")


def _shortest_ways(legs: Array) -> Array:
    """Returns the lengths `(C, C)` of the shortest ways over legs `(C, C)` (Floyd 1962)."""
    ways = legs.copy()
    np.fill_diagonal(ways, 0.0)
    for via in range(len(ways)):
        ways = np.minimum(ways, ways[:, via, None] + ways[via])
    return ways


def _walk(place: Array, target: Array, left: Array) -> tuple[Array, Array]:
    """Moves places `(N, 2)` towards targets by at most `left`, `(N,)`; returns the places and what is left to walk."""
    way = target - place
    length = np.linalg.norm(way, axis=-1)
    walked = np.minimum(length, left)
    return place + way * (walked / np.maximum(length, 1e-12))[:, None], left - walked
