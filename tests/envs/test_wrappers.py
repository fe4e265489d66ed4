"""ActionNoise: what it adds has the spread and the memory that were asked for, and follows the seed."""

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy_envs import ActionNoise, EnvsError


class Still(gym.Env):
    """Does nothing, with a box of actions wide enough that nothing is clipped."""

    def __init__(self, bound=100.0):
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
        self.action_space = gym.spaces.Box(-bound, bound, (2,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


def noises(env, steps, seed):
    env.reset(seed=seed)
    return np.array([env.step(np.zeros(2))[-1]["executed_action"] for _ in range(steps)])


@pytest.mark.parametrize(("std", "correlation"), [(0.5, 0.0), (0.5, 0.9), (0.2, 0.5)])
def test_noise_has_the_std_and_the_correlation_that_were_asked_for(std, correlation):
    n = noises(ActionNoise(Still(), std, correlation), 40_000, seed=0)
    assert n.std() == pytest.approx(std, rel=0.04)
    assert np.abs(n.mean(0)).max() < 0.15 * std
    for lag in (1, 3):
        measured = np.mean(n[lag:] * n[:-lag]) / n.var()
        assert measured == pytest.approx(correlation**lag, abs=0.03)
    assert np.corrcoef(n.T)[0, 1] == pytest.approx(0.0, abs=0.08)


def test_the_first_noise_of_an_episode_already_has_std_0_5():
    env = ActionNoise(Still(), 0.5, 0.9)
    first = np.array([noises(env, 1, seed)[0] for seed in range(2000)])
    assert first.std() == pytest.approx(0.5, rel=0.05)


def test_the_same_seed_gives_the_same_noise_and_another_seed_another():
    env = ActionNoise(Still(), 0.5, 0.9)
    first, again, other = noises(env, 50, 7), noises(env, 50, 7), noises(env, 50, 8)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_a_reset_without_a_seed_goes_on_drawing():
    env = ActionNoise(Still(), 0.5, 0.9)
    assert np.abs(noises(env, 20, 7) - noises(env, 20, None)).max() > 0.1


def test_executed_actions_stay_in_the_box_and_the_caller_s_action_is_left_alone():
    env, action = ActionNoise(Still(bound=0.3), 5.0), np.full(2, 0.1)
    env.reset(seed=0)
    executed = [env.step(action)[-1]["executed_action"] for _ in range(100)]
    assert np.abs(executed).max() == pytest.approx(0.3)
    np.testing.assert_array_equal(action, 0.1)


def test_noise_leaves_the_environment_s_own_random_numbers_alone():
    plain = gym.make("diffpolicy_envs:Detour-v0", start_noise=0.2)
    noisy = ActionNoise(gym.make("diffpolicy_envs:Detour-v0", start_noise=0.2), 0.5)
    for seed in (0, None, None):
        start = plain.reset(seed=seed)[0]
        np.testing.assert_array_equal(start, noisy.reset(seed=seed)[0])
        noisy.step(np.zeros(2, np.float32))


def test_std_0_executes_what_was_asked_for():
    env = ActionNoise(Still(), 0.0)
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step(np.full(2, 0.25))[-1]["executed_action"], 0.25)


def test_a_discrete_action_space_and_impossible_numbers_are_refused():
    discrete = Still()
    discrete.action_space = gym.spaces.Discrete(3)
    with pytest.raises(EnvsError, match=r"Discrete\(3\): ActionNoise wants a Box"):
        ActionNoise(discrete, 0.5)
    for std, correlation in ((-1.0, 0.0), (0.5, 1.0), (float("nan"), 0.0)):
        with pytest.raises(EnvsError, match="wanted are std >= 0"):
            ActionNoise(Still(), std, correlation)
