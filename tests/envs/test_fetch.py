"""The Fetch experts: whether they reach their goals, with and without noise, from observations alone."""

import sys

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy_envs import ActionNoise, EnvsError, FetchPickAndPlaceExpert, FetchReachExpert

robotics = pytest.importorskip(
    "gymnasium_robotics", reason="gymnasium-robotics is not installed: the extra `envs` has it"
)
gym.register_envs(robotics)

EXPERTS = {"FetchReach-v4": FetchReachExpert(), "FetchPickAndPlace-v4": FetchPickAndPlaceExpert()}


@pytest.fixture(scope="module", autouse=True)
def no_mujoco_py():
    """Gymnasium-robotics tries mujoco_py, which d4rl brings, and trips over one that lacks its MuJoCo 2.1."""
    with pytest.MonkeyPatch.context() as patch:
        if "mujoco_py" not in sys.modules:
            patch.setitem(sys.modules, "mujoco_py", None)
        yield


def play(env, expert, seed):
    """The observations and actions of an episode, whether it ended in success, and how it ended."""
    obs, _ = env.reset(seed=seed)
    seen, actions, ended = [obs], [], False
    while not ended:
        action, state = expert.predict(obs)
        obs, _, terminated, truncated, info = env.step(action)
        assert state is None
        seen.append(obs)
        actions.append(action)
        ended = terminated or truncated
    return seen, np.array(actions), bool(info["is_success"]), (terminated, truncated)


@pytest.mark.parametrize("std", [0.0, 0.2])
@pytest.mark.parametrize(("env_id", "correlation"), [("FetchReach-v4", 0.0), ("FetchPickAndPlace-v4", 0.8)])
def test_each_of_20_seeds_is_at_its_goal_at_step_50_which_truncates(env_id, std, correlation):
    """With the noise that demonstrations of the task are made with, and without."""
    env = ActionNoise(gym.make(env_id), std, correlation)
    for seed in range(20):
        _, actions, success, end = play(env, EXPERTS[env_id], seed)
        assert success and len(actions) == 50 and end == (False, True)
        assert np.abs(actions).max() <= 1.0


def test_an_object_on_the_table_is_approached_with_open_fingers_and_carried_with_closed_ones():
    seen, actions, _, _ = play(gym.make("FetchPickAndPlace-v4"), EXPERTS["FetchPickAndPlace-v4"], seed=1)
    closing = int(np.argmax(actions[:, 3] < 0))
    assert (actions[:closing, 3] == 1.0).all() and (actions[closing:, 3] == -1.0).all()
    moved = np.linalg.norm([obs["achieved_goal"] - seen[0]["achieved_goal"] for obs in seen], axis=-1)
    assert moved[: closing + 1].max() < 0.005 < 0.1 < moved[-1]


def test_an_object_lost_at_step_25_is_fetched_again():
    env, expert = gym.make("FetchPickAndPlace-v4"), EXPERTS["FetchPickAndPlace-v4"]
    recovered = []
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        heights = []
        for step in range(50):
            action = expert.predict(obs)[0]
            if 20 <= step < 23:
                action = np.array([0.0, 0.0, 1.0, 1.0], np.float32)  # opens and rises
            obs, *_, info = env.step(action)
            heights.append(obs["observation"][8])
        assert min(heights[20:30]) < -0.03  # it did lose it
        recovered.append(info["is_success"])
    assert all(recovered)


@pytest.mark.parametrize("env_id", EXPERTS)
def test_a_batch_of_observations_gives_what_each_gives_alone(env_id):
    env, expert = gym.make(env_id), EXPERTS[env_id]
    singles = [obs for seed in range(2) for obs in play(env, expert, seed)[0][::5]]
    batch = {name: np.stack([obs[name] for obs in singles]) for name in singles[0]}
    actions, state = expert.predict(batch, None, np.ones(len(singles), bool), deterministic=True)
    assert actions.dtype == np.float32 and actions.shape == (len(singles), 4) and state is None
    np.testing.assert_array_equal(actions, [expert.predict(obs)[0] for obs in singles])


def test_a_goal_0_02_away_asks_for_an_action_of_0_4():
    obs = {"observation": np.zeros(10), "achieved_goal": np.zeros(3), "desired_goal": np.array([0.02, 0.0, -0.3])}
    np.testing.assert_allclose(FetchReachExpert().predict(obs)[0], [0.4, 0.0, -1.0, 0.0], atol=1e-6)


def test_observations_of_another_environment_are_refused_in_one_sentence():
    reach = {"observation": np.zeros(10), "achieved_goal": np.zeros(3), "desired_goal": np.zeros(3)}
    with pytest.raises(EnvsError, match=r"wanted are 'observation' \(\.\.\., 25\).*FetchPickAndPlace"):
        FetchPickAndPlaceExpert().predict(reach)
    with pytest.raises(EnvsError, match=r"has the parts \{\}: wanted"):
        FetchReachExpert().predict(np.zeros(10))


def test_reach_at_50_hz_is_as_fast_as_fetch_reach_in_steps_of_half_the_time():
    whole, half = gym.make("FetchReach-v4"), gym.make("diffpolicy_envs:FetchReach50Hz-v0")
    assert whole.unwrapped.dt == pytest.approx(0.04) and half.unwrapped.dt == pytest.approx(0.02)
    for seed in range(3):
        before, same = whole.reset(seed=seed)[0], half.reset(seed=seed)[0]
        np.testing.assert_array_equal(before["desired_goal"], same["desired_goal"])
        action = np.random.default_rng(seed).uniform(-1, 1, 4).astype(np.float32)
        for _ in range(5):
            after = whole.step(action)[0]
            half.step(action)
            twice = half.step(action)[0]
        moved, too = after["achieved_goal"] - before["achieved_goal"], twice["achieved_goal"] - same["achieved_goal"]
        assert np.linalg.norm(too - moved) < 0.03 * np.linalg.norm(moved)


def test_at_50_hz_the_expert_is_at_each_of_20_goals_at_step_100_which_truncates():
    env = ActionNoise(gym.make("diffpolicy_envs:FetchReach50Hz-v0"), 0.2, 0.0)
    for seed in range(20):
        _, actions, success, end = play(env, EXPERTS["FetchReach-v4"], seed)
        assert success and len(actions) == 100 and end == (False, True)
