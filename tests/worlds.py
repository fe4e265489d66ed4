"""Small worlds whose best behaviour and values are known: what offline reinforcement learning must find."""

import numpy as np

from diffpolicy.data.episodes import Episode, Episodes, from_list


def bandit(count: int = 600, steps: int = 1, seed: int = 0, gap: float = 1.0) -> Episodes:
    """Episodes of `steps` actions, all near 0.6 (reward `gap` in all) or all near -0.6 (reward 0), as often."""
    rng = np.random.default_rng(seed)
    episodes = []
    for i in range(count):
        mode = 1 if i % 2 else -1
        action = (0.6 * mode + 0.05 * rng.normal(size=(steps, 1))).astype(np.float32)
        reward = np.full(steps, gap * (mode > 0) / steps, np.float32)
        episodes.append(Episode({"obs": np.zeros((steps + 1, 1), np.float32)}, action, reward, True, False))
    return from_list(episodes)


def two_episodes(has_final: bool = True, mask: list[bool] | None = None) -> Episodes:
    """Rewards 1 2 3 4 and a true end; 5 6 7 8 and a time limit."""

    def episode(rewards: list[float], terminated: bool, has_final: bool) -> Episode:
        obs = {"obs": np.array([*rewards, 0.0], np.float32)[:, None]}
        action = np.array(rewards, np.float32)[:, None]
        info = {} if mask is None else {"mask": np.array(mask)}
        return Episode(obs, action, np.array(rewards, np.float32), terminated, not terminated, info, has_final)

    return from_list([episode([1.0, 2.0, 3.0, 4.0], True, True), episode([5.0, 6.0, 7.0, 8.0], False, has_final)])


def babble(sizes: dict[str, int], low: float = -1.0, high: float = 1.0) -> Episodes:
    """One episode of 30 steps, all at random: named observations of these sizes, and two actions."""
    rng = np.random.default_rng(0)
    obs = {name: rng.normal(size=(31, size)).astype(np.float32) for name, size in sizes.items()}
    action = rng.uniform(low, high, size=(30, 2)).astype(np.float32)
    return from_list([Episode(obs, action, np.zeros(30, np.float32), terminated=False, truncated=True)])


def chain(count: int = 300, cells: int = 5, limit: int = 12, seed: int = 0) -> Episodes:
    """A walk over `cells` places, one-hot: action 1 goes right, -1 left, at random; behind the last place is reward 1.

    An episode begins anywhere and ends truly at the reward, or is cut at `limit` steps. The optimal value of stepping
    right from place c is `gamma^(cells - 1 - c)`; of stepping left, `gamma^2` times that (`gamma` from place 0).
    """
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(count):
        place, places, actions, rewards = int(rng.integers(cells)), [], [], []
        while place < cells and len(actions) < limit:
            places.append(place)
            right = rng.random() < 0.5
            place = place + 1 if right else max(place - 1, 0)
            actions.append(1.0 if right else -1.0)
            rewards.append(float(place == cells))
        obs = np.eye(cells, dtype=np.float32)[np.minimum([*places, place], cells - 1)]
        ended = place == cells
        action, reward = np.array(actions, np.float32)[:, None], np.array(rewards, np.float32)
        episodes.append(Episode({"obs": obs}, action, reward, ended, not ended))
    return from_list(episodes)
