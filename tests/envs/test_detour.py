"""Detour's geometry in closed form, the contract of its environment, and an expert that takes both ways."""

import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from diffpolicy_envs import ActionNoise, Detour, DetourExpert, EnvsError
from diffpolicy_envs.detour import GOAL_RADIUS, MAX_STEP, RADIUS, START, gap, optimal_length, passes

ENV_ID = "diffpolicy_envs:Detour-v0"


def play(env, expert, seed):
    """One episode; returns its positions, actions, return and last info."""
    obs, info = env.reset(seed=seed)
    state, ended, positions, actions, total = None, False, [obs], [], 0.0
    while not ended:
        action, state = expert.predict(obs, state)
        obs, reward, terminated, truncated, info = env.step(action)
        positions.append(obs)
        actions.append(action)
        total += reward
        ended = terminated or truncated
    return np.array(positions), np.array(actions), total, info


def roped_length(start, goal, radius):
    """The shortest way by brute force: the shortest polygon over points on the circle, above it."""
    angles = np.linspace(math.pi, 0.0, 20_001)
    rim = radius * np.stack([np.cos(angles), np.sin(angles)], -1)
    first = np.where(gap(np.broadcast_to(start, rim.shape), rim) >= radius - 1e-9, np.hypot(*(rim - start).T), np.inf)
    last = np.where(gap(rim, np.broadcast_to(goal, rim.shape)) >= radius - 1e-9, np.hypot(*(rim - goal).T), np.inf)
    return np.min(np.minimum.accumulate(first - radius * (math.pi - angles)) + last + radius * (math.pi - angles))


def test_gymnasium_s_checker_accepts_the_environment():
    check_env(gym.make(ENV_ID, render_mode="rgb_array").unwrapped)


def test_the_shortest_way_from_the_start_is_2_tangents_and_an_arc():
    arc = math.pi - 2 * math.acos(RADIUS)
    assert optimal_length() == pytest.approx(2 * math.sqrt(1 - RADIUS**2) + RADIUS * arc - GOAL_RADIUS, abs=1e-12)
    assert optimal_length() == pytest.approx(2.0622, abs=1e-4)


@pytest.mark.parametrize("start", [(-1.0, 0.0), (-0.8, 0.2), (-1.3, 0.4), (-0.5, 0.1)])
def test_the_closed_form_equals_the_shortest_of_20000_ways_over_the_rim(start):
    shortest = roped_length(np.array(start), np.array([1.0, 0.0]), RADIUS) - GOAL_RADIUS
    assert optimal_length(start) == pytest.approx(shortest, abs=1e-5)


def test_where_the_obstacle_is_not_in_the_way_the_shortest_way_is_straight():
    assert optimal_length((-1.0, 1.5)) == pytest.approx(2.5 - GOAL_RADIUS)


def test_an_expert_with_margin_0_1_is_5_percent_from_the_optimum_and_one_with_0_001_reaches_it():
    env = gym.make(ENV_ID)
    for margin, excess, steps in ((0.1, 0.06, 22), (0.001, 0.01, 21)):
        positions, actions, total, info = play(env, DetourExpert(seed=0, margin=margin), seed=0)
        way = np.linalg.norm(np.diff(positions, axis=0), axis=-1).sum()
        assert info["success"] and len(actions) == steps
        assert optimal_length() - 1e-6 <= way <= (1 + excess) * optimal_length() + MAX_STEP
        assert total == pytest.approx(-MAX_STEP * steps)
    assert total == pytest.approx(env.unwrapped.optimal_return())


def test_2000_choices_of_the_expert_have_shares_0_5():
    expert = DetourExpert(seed=0)
    _, (side,) = expert.predict(np.tile(np.float32(START), (2000, 1)))
    assert np.mean(side > 0) == pytest.approx(0.5, abs=0.04)


def test_the_two_ways_are_mirror_images_and_16_actions_show_which_was_taken():
    env, expert = gym.make(ENV_ID), DetourExpert(seed=0)
    ways = {}
    for seed in range(20):
        _, actions, _, info = play(env, expert, seed)
        assert info["success"] and len(actions) <= 32
        ways[passes(START, actions[None, :16]).item()] = actions
    assert sorted(ways) == [-1, 1]
    np.testing.assert_allclose(ways[1], ways[-1] * [1, -1], atol=1e-5)


def test_the_expert_keeps_its_side_until_the_next_episode_starts():
    expert, obs = DetourExpert(seed=0), np.tile(np.float32(START), (64, 1))
    _, state = expert.predict(obs)
    _, kept = expert.predict(obs, state, np.zeros(64, bool))
    starts = np.arange(64) < 32
    _, renewed = expert.predict(obs, state, starts)
    np.testing.assert_array_equal(kept[0], state[0])
    np.testing.assert_array_equal(renewed[0][32:], state[0][32:])
    assert (renewed[0][:32] != state[0][:32]).any()


def test_the_same_seed_chooses_the_same_sides_and_one_observation_acts_as_a_batch_of_1():
    obs = np.tile(np.float32(START), (8, 1))
    np.testing.assert_array_equal(DetourExpert(seed=3).predict(obs)[0], DetourExpert(seed=3).predict(obs)[0])
    one, batch = DetourExpert(seed=3).predict(obs[0])[0], DetourExpert(seed=3).predict(obs[:1])[0]
    assert one.shape == (2,)
    np.testing.assert_array_equal(one, batch[0])


def test_an_expert_pushed_inside_its_margin_behind_the_obstacle_heads_for_the_goal():
    place = np.float32([0.43, 0.1])
    for side in (-1.0, 1.0):
        action, _ = DetourExpert(margin=0.1).predict(place, (np.array([side]),))
        np.testing.assert_allclose(action, (np.array([1.0, 0.0]) - place) / np.hypot(0.57, 0.1), atol=1e-6)


def test_noise_of_std_0_2_and_correlation_0_8_costs_no_success_in_100_episodes():
    env, expert = ActionNoise(gym.make(ENV_ID), 0.2, 0.8), DetourExpert(seed=0)
    assert all(play(env, expert, seed)[-1]["success"] for seed in range(100))


def test_passes_tells_above_below_and_through():
    straight = np.tile([1.0, 0.0], (16, 1))
    up = np.concatenate([np.tile([0.6, 0.8], (7, 1)), np.tile([1.0, 0.0], (9, 1))])
    chunks = np.stack([up, up * [1, -1], straight])
    np.testing.assert_array_equal(passes(START, chunks), [1, -1, 0])


def test_passes_agrees_with_the_environment_on_200_random_chunks():
    generator, env = np.random.default_rng(0), Detour()
    chunks = np.clip(generator.normal([0.7, 0.0], 0.5, (200, 16, 2)) + generator.normal(0, 0.5, (200, 1, 2)), -1, 1)
    crashed = []
    for chunk in chunks:
        env.reset()
        infos = []
        for action in chunk:
            _, _, terminated, _, info = env.step(action)
            infos.append(info)
            if terminated:
                break
        crashed.append(infos[-1]["collision"])
    assert 20 < sum(crashed) < 180
    np.testing.assert_array_equal(passes(START, chunks) == 0, crashed)


def test_a_step_through_the_rim_is_a_collision_though_both_ends_are_outside():
    env = Detour()
    env.reset(options={"start": (-0.03, 0.3999)})
    _, reward, terminated, truncated, info = env.step(np.array([0.6, 0.0], np.float32))
    assert terminated and not truncated and info == {"success": False, "collision": True}
    assert reward == pytest.approx(-10.1)


def test_an_action_longer_than_1_is_shortened_to_1():
    env = Detour()
    env.reset()
    obs = env.step(np.array([-1.0, 1.0], np.float32))[0]
    assert np.linalg.norm(obs - START) == pytest.approx(MAX_STEP, rel=1e-5)


def test_a_start_in_the_obstacle_or_outside_the_arena_is_refused():
    for start in ((0.1, 0.1), (-1.6, 0.0)):
        with pytest.raises(EnvsError, match="is in the obstacle or outside"):
            Detour().reset(options={"start": start})
    with pytest.raises(EnvsError, match=r"start_noise is 0\.5"):
        Detour(start_noise=0.5)
    with pytest.raises(EnvsError, match=r"margin is 0\.7"):
        DetourExpert(margin=0.7)
