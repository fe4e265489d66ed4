"""The maze expert: its distances against a plain shortest-path search, its actions in the environments themselves."""

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy_envs import ActionNoise, Detour, EnvsError, PointMazeExpert

robotics = pytest.importorskip(
    "gymnasium_robotics", reason="gymnasium-robotics is not installed: the extra `envs` has it"
)
maps = pytest.importorskip("gymnasium_robotics.envs.maze.maps")
gym.register_envs(robotics)

U_CORNERS = np.array([[0.8, 0.8], [0.8, -0.8]])  # of the wall that the U bends round, thickened by 0.3


def make(name, std=0.0, correlation=0.0):
    env = gym.make(f"PointMaze_{name}-v3", continuing_task=False)
    return ActionNoise(env, std, correlation) if std else env


def outcomes(env, expert, seeds):
    """Success and length of an episode for each seed."""
    result = []
    for seed in seeds:
        obs, _ = env.reset(seed=seed)
        steps, ended, info = 0, False, {}
        while not ended:
            obs, _, terminated, truncated, info = env.step(expert.predict(obs)[0])
            steps, ended = steps + 1, terminated or truncated
        result.append((info["success"], steps))
    return np.array(result).T


def clear_of_walls(maze, points, clearance=0.3 - 1e-6):
    """Whether squares of half-side `clearance` round points `(..., 2)` touch no wall: by the map's marks alone."""
    wall = np.array(maze) == 1
    clear = np.ones(points.shape[:-1], bool)
    for dx in (-clearance, clearance):
        for dy in (-clearance, clearance):
            column = np.floor(points[..., 0] + dx + wall.shape[1] / 2).astype(int)
            row = np.floor(wall.shape[0] / 2 - points[..., 1] - dy).astype(int)
            clear &= ~wall[row.clip(0, len(wall) - 1), column.clip(0, wall.shape[1] - 1)]
    return clear


def searched(maze, goal):
    """The shortest ways from all places of a grid of 0.1 to one of them, with 48 kinds of moves (Bellman and Ford)."""
    height, width = np.array(maze).shape
    xs, ys = np.arange(-5 * width, 5 * width + 1), np.arange(-5 * height, 5 * height + 1)
    grid = np.stack(np.meshgrid(xs, ys, indexing="ij"), -1) / 10
    moves = [(i, j) for i in range(-4, 5) for j in range(-4, 5) if np.gcd(i, j) == 1]
    along = np.linspace(0, 1, 17)[:, None, None, None]
    legs = [
        np.where(clear_of_walls(maze, grid + along * np.array(m) / 10).all(0), np.hypot(*m) / 10, np.inf) for m in moves
    ]
    far = np.where((grid == np.round(goal, 1)).all(-1), 0.0, np.inf)
    for _ in range(400):
        before = far
        for leg, (i, j) in zip(legs, moves, strict=True):
            far = np.minimum(far, leg + np.roll(far, (-i, -j), (0, 1)))
        if np.array_equal(far, before):
            break
    return lambda place: far[tuple(np.round(place * 10).astype(int) + np.array([5 * width, 5 * height]))]


def free_points(expert, count, seed=0):
    """Random places in free cells, up to 0.25 from their middle, on a grid of 0.1."""
    generator = np.random.default_rng(seed)
    cells = np.argwhere(~expert.wall)
    middle = expert._xy(cells[generator.integers(len(cells), size=count)] + 0.5)
    return np.round(middle + generator.integers(-2, 3, (count, 2)) / 10, 3)


def test_the_u_maze_bends_at_2_corners_and_its_longest_way_is_two_legs_and_a_leg_between():
    expert = PointMazeExpert(maps.U_MAZE)
    np.testing.assert_allclose(expert._corners[np.argsort(-expert._corners[:, 1])], U_CORNERS)
    start, goal = np.array([[-1.0, 1.0]]), np.array([[-1.0, -1.0]])
    legs = 2 * np.hypot(1.8, 0.2) + 1.6
    assert expert.distance(start, goal).item() == pytest.approx(legs)


@pytest.mark.parametrize("maze", [maps.MEDIUM_MAZE, maps.LARGE_MAZE])
def test_distances_equal_a_grid_search_over_the_map_to_2_percent(maze):
    expert = PointMazeExpert(maze)
    starts, goal = free_points(expert, 40, seed=1), free_points(expert, 1, seed=2)
    search = searched(maze, goal[0])
    found = np.array([search(start) for start in starts])
    distance = expert.distance(starts, goal.repeat(40, 0))
    assert (distance <= found + 1e-6).all()
    assert (found <= 1.02 * distance + 0.02).all()


@pytest.mark.parametrize("maze", [maps.U_MAZE, maps.MEDIUM_MAZE, maps.LARGE_MAZE])
def test_distances_are_symmetric_and_fulfil_the_triangle_inequality(maze):
    expert = PointMazeExpert(maze)
    a, b, c = (free_points(expert, 200, seed) for seed in range(3))
    np.testing.assert_allclose(expert.distance(a, b), expert.distance(b, a), atol=1e-9)
    assert (expert.distance(a, c) <= expert.distance(a, b) + expert.distance(b, c) + 1e-9).all()


def test_the_carrot_is_0_6_ahead_on_the_shortest_way():
    expert = PointMazeExpert(maps.MEDIUM_MAZE)
    a, b = free_points(expert, 300, seed=0), free_points(expert, 300, seed=1)
    total, after = expert.distance(a, b), expert.distance(expert.carrot(a, b), b)
    np.testing.assert_allclose(after, np.maximum(total - 0.6, 0.0), atol=1e-6)


def test_the_carrot_moves_by_less_than_0_02_where_the_point_moves_by_0_001_but_for_1_percent_of_places():
    expert = PointMazeExpert(maps.MEDIUM_MAZE)
    generator = np.random.default_rng(0)
    a, b = free_points(expert, 2000, seed=0), free_points(expert, 2000, seed=1)
    a = a + generator.uniform(-0.19, 0.19, a.shape)
    moved = a + 0.001 * generator.choice([-1.0, 1.0], a.shape)
    jumps = np.linalg.norm(expert.carrot(moved, b) - expert.carrot(a, b), axis=-1)
    assert np.mean(jumps > 0.02) < 0.01


@pytest.mark.parametrize(("name", "std", "seeds"), [("UMaze", 0.0, 20), ("Medium", 0.0, 20), ("UMaze", 0.5, 20)])
def test_every_one_of_20_seeds_reaches_the_goal(name, std, seeds):
    env = make(name, std, 0.9)
    success, length = outcomes(env, PointMazeExpert.from_env(env), range(seeds))
    assert success.all()
    assert length.max() <= 0.9 * env.spec.max_episode_steps


def test_a_batch_of_observations_gives_what_each_gives_alone():
    env = make("Medium")
    expert = PointMazeExpert.from_env(env)
    singles = [env.reset(seed=seed)[0] for seed in range(6)]
    batch = {name: np.stack([obs[name] for obs in singles]) for name in singles[0]}
    actions, state = expert.predict(batch, None, np.ones(6, bool), deterministic=True)
    assert actions.dtype == np.float32 and actions.shape == (6, 2) and state is None
    np.testing.assert_array_equal(actions, [expert.predict(obs)[0] for obs in singles])


def test_an_open_map_without_corners_is_crossed_straight():
    expert = PointMazeExpert(maps.OPEN)
    a, b = np.array([[-1.0, 0.5]]), np.array([[1.5, -0.5]])
    np.testing.assert_allclose(expert.distance(a, b), np.linalg.norm(b - a, axis=-1))


def test_a_goal_in_another_room_a_map_without_border_and_foreign_environments_are_refused():
    rooms = PointMazeExpert([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(EnvsError, match="No way leads from"):
        rooms.carrot(np.array([[-1.0, 0.0]]), np.array([[1.0, 0.0]]))
    with pytest.raises(EnvsError, match="border of walls"):
        PointMazeExpert([[1, 1, 1], [1, 0, 0], [1, 1, 1]])
    with pytest.raises(EnvsError, match=r"clearance is 0\.6"):
        PointMazeExpert(maps.U_MAZE, clearance=0.6)
    with pytest.raises(EnvsError, match="is not a point maze"):
        PointMazeExpert.from_env(Detour())
