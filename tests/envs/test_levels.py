"""Levels of quality: what a replay buffer tells is what happened, training stops where it was told to, and repeats."""

from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy_envs import EnvsError, UniformActor, load_sb3_agent, replay_episodes, save_agent, train_agent

pytest.importorskip("stable_baselines3")

SMALL = {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 50, "batch_size": 16}
DETOUR = "diffpolicy_envs:Detour-v0"


class Line(gym.Env):
    """A point on a line that must come within 0.3 of a goal: named observations, and a box that is not symmetric."""

    def __init__(self):
        box = gym.spaces.Box(-10.0, 10.0, (1,), np.float64)
        self.observation_space = gym.spaces.Dict({k: box for k in ("observation", "achieved_goal", "desired_goal")})
        self.action_space = gym.spaces.Box(-1.0, 3.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.goal = np.zeros(1), self.np_random.uniform(-5.0, 5.0, 1)
        return self.seen(), {}

    def seen(self):
        return {"observation": self.place.copy(), "achieved_goal": self.place.copy(), "desired_goal": self.goal.copy()}

    def compute_reward(self, achieved, wanted, info):
        return -(np.abs(achieved - wanted)[..., 0] > 0.3).astype(np.float32)

    def step(self, action):
        self.place = np.clip(self.place + action, -10.0, 10.0).astype(np.float64)
        reward = float(self.compute_reward(self.place, self.goal, {}))
        return self.seen(), reward, reward == 0.0, False, {}


class Recorder(gym.Wrapper):
    """Keeps all that happens, an episode a list."""

    def __init__(self, env):
        super().__init__(env)
        self.episodes = []

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.episodes.append({"obs": [obs], "action": [], "reward": [], "end": (False, False)})
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        now = self.episodes[-1]
        now["obs"].append(obs)
        now["action"].append(np.array(action))
        now["reward"].append(reward)
        now["end"] = (terminated, truncated)
        return obs, reward, terminated, truncated, info


def trained(env_id, steps, algorithm="sac", seed=0, **kwargs):
    """All evaluations of a training, and what a recorder saw of it."""
    recorders = []

    def make_env():
        recorders.append(Recorder(gym.wrappers.TimeLimit(Line(), 40) if env_id == "Line" else gym.make(env_id)))
        return recorders[-1]

    settings = {**SMALL, **kwargs.pop("settings", {})}
    checks = list(train_agent(make_env, algorithm, steps, seed, settings=settings, **kwargs))
    return checks, recorders[0].episodes


def assert_equal_number_for_number(replayed, recorded):
    assert len(replayed) == len(recorded)
    for one, other in zip(replayed, recorded, strict=True):
        parts = one.obs if isinstance(one.obs, dict) else {None: one.obs}
        for name, array in parts.items():
            np.testing.assert_array_equal(array, [obs if name is None else obs[name] for obs in other["obs"]])
        np.testing.assert_array_equal(one.action, other["action"])
        np.testing.assert_array_equal(one.reward, np.float32(other["reward"]))


def ended(episodes):
    return [episode for episode in episodes if any(episode["end"])]


def test_200_steps_are_replayed_number_for_number_with_both_kinds_of_end():
    checks, recorded = trained("Line", 200)
    replayed = list(replay_episodes(checks[-1].agent.model))
    assert_equal_number_for_number(replayed, ended(recorded))
    ends = [(episode.terminated, episode.truncated) for episode in replayed]
    assert ends == [episode["end"] for episode in ended(recorded)]
    assert set(ends) == {(True, False), (False, True)}
    assert sorted(replayed[0].obs) == ["achieved_goal", "desired_goal", "observation"]


@pytest.mark.parametrize("algorithm", ["crossq", "ddpg", "td3", "tqc"])
def test_110_steps_of_other_algorithms_are_replayed_number_for_number(algorithm):
    if algorithm in ("crossq", "tqc"):
        pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed: the extra `envs` has it")
    checks, recorded = trained(DETOUR, 110, algorithm)
    assert_equal_number_for_number(list(replay_episodes(checks[-1].agent.model)), ended(recorded))


@pytest.mark.parametrize("env_id", [DETOUR, "Line"])
def test_a_buffer_of_100_that_wrapped_around_gives_the_whole_episodes_among_the_last_100_steps(env_id):
    checks, recorded = trained(env_id, 230, settings={"buffer_size": 100})
    starts = np.cumsum([0, *(len(episode["action"]) for episode in recorded)])
    whole = [episode for episode, start in zip(recorded, starts, strict=False) if start > 230 - 100]
    replayed = list(replay_episodes(checks[-1].agent.model))
    assert_equal_number_for_number(replayed, ended(whole))
    assert 0 < len(replayed) < len(ended(recorded))


def test_pendulum_s_actions_are_in_plus_minus_2_and_play_again_to_the_same_observations():
    checks, recorded = trained("Pendulum-v1", 201, seed=5)
    (first,) = replay_episodes(checks[-1].agent.model)
    assert 1.5 < np.abs(first.action).max() <= 2.0
    env = gym.make("Pendulum-v1")
    obs = [env.reset(seed=5)[0], *(env.step(action)[0] for action in first.action)]
    np.testing.assert_array_equal(first.obs, obs)
    assert (first.terminated, first.truncated) == (False, True)
    assert_equal_number_for_number([first], recorded[:1])


def test_an_agent_trained_with_hindsight_acts_the_same_after_saving_and_loading(tmp_path):
    checks, recorded = trained("Line", 120)
    agent = checks[-1].agent
    assert type(agent.model.replay_buffer).__name__ == "HerReplayBuffer"
    save_agent(agent, tmp_path / "sac-Line" / "Line.zip")
    loaded = load_sb3_agent(tmp_path / "sac-Line", trust_pickle=True)
    obs = {name: np.stack([obs[name] for obs in recorded[0]["obs"]]) for name in recorded[0]["obs"][0]}
    np.testing.assert_array_equal(loaded.predict(obs)[0], agent.predict(obs)[0])


def test_training_stops_at_the_first_evaluation_that_reaches_the_level_and_repeats_itself_to_there():
    checks = trained(DETOUR, 180, check_every=45)[0]
    returns = [check.mean_return for check in checks]
    assert [check.steps for check in checks] == [45, 90, 135, 180]
    level = sorted(returns)[-2]
    stop = int(np.argmax(np.array(returns) >= level))
    again = trained(DETOUR, 180, check_every=45, stop_at_return=level)[0]
    assert [check.mean_return for check in again] == returns[: stop + 1]


def test_evaluations_do_not_change_the_training():
    from stable_baselines3 import SAC

    alone = SAC("MlpPolicy", gym.make(DETOUR), seed=0, buffer_size=101, **deepcopy(SMALL)).learn(100)
    checks, _ = trained(DETOUR, 100, check_every=30)
    sliced = checks[-1].agent.model.replay_buffer
    np.testing.assert_array_equal(alone.replay_buffer.actions[:100], sliced.actions[:100])


def test_a_training_that_is_left_after_20_steps_closes_its_environments():
    closed = []

    def make_env():
        env = gym.make(DETOUR)
        env.close = lambda: closed.append(env)
        return env

    checks = train_agent(make_env, "sac", 1000, 0, check_every=20, settings=SMALL)
    assert next(checks).steps == 20
    checks.close()
    assert len(closed) == 2


def test_the_caller_hears_of_every_step():
    heard = []
    trained(DETOUR, 60, check_every=25, on_step=heard.append)
    assert heard == list(range(1, 61))


def test_uniform_actions_fill_the_box_evenly():
    actor = UniformActor(Line(), seed=0)
    obs = {name: np.zeros((4000, 1)) for name in Line().observation_space}
    actions, _ = actor.predict(obs)
    assert actions.shape == (4000, 1) and actions.dtype == np.float32
    shares = np.histogram(actions, bins=4, range=(-1.0, 3.0))[0] / 4000
    np.testing.assert_allclose(shares, 0.25, atol=0.03)


def test_uniform_actions_of_episode_k_of_seed_s_are_those_of_episode_0_of_seed_s_plus_k():
    env = gym.make("Pendulum-v1")
    batch, one = np.zeros((2, 3), np.float32), np.zeros(3, np.float32)
    actor, starts = UniformActor(env, seed=10), np.array([True, False])
    first, state = actor.predict(batch)
    second, state = actor.predict(batch, state, np.zeros(2, bool))
    third, state = actor.predict(batch, state, starts)  # environment 0 begins episode 2, environment 1 goes on
    alone = {k: UniformActor(env, seed=10 + k) for k in range(3)}
    for k, path in {0: [first[0], second[0]], 1: [first[1], second[1], third[1]], 2: [third[0]]}.items():
        memory = None
        for action in path:
            expected, memory = alone[k].predict(one, memory, np.zeros(1, bool))
            np.testing.assert_array_equal(action, expected)
            assert expected.shape == (1,)


def test_what_cannot_be_trained_is_refused_in_one_sentence():
    with pytest.raises(EnvsError, match="'ppo' cannot be trained here: wanted is one of crossq"):
        next(train_agent(lambda: gym.make(DETOUR), "ppo", 10, 0))
    with pytest.raises(EnvsError, match="steps is 0, check_every 500, seed 0: wanted are"):
        next(train_agent(lambda: gym.make(DETOUR), "sac", 0, 0))
    endless = gym.wrappers.TransformAction(Line(), lambda a: a, gym.spaces.Box(-np.inf, np.inf, (1,)))
    with pytest.raises(EnvsError, match="wanted is a Box with bounds"):
        next(train_agent(lambda: endless, "sac", 10, 0))
    with pytest.raises(EnvsError, match="wanted is a Box with bounds"):
        UniformActor(endless, 0)


def test_models_without_a_buffer_and_buffers_without_ends_are_refused_in_one_sentence():
    from stable_baselines3 import PPO, SAC

    with pytest.raises(EnvsError, match="PPO keeps no replay buffer"):
        next(replay_episodes(PPO("MlpPolicy", gym.make(DETOUR))))
    thrifty = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = SAC("MlpPolicy", gym.make(DETOUR), buffer_size=100, **thrifty)
    with pytest.raises(EnvsError, match="has lost how episodes ended"):
        next(replay_episodes(model))
