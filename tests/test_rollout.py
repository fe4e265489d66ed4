"""Rollout: every recorded step is a true one, whoever resets the environments and however many there are."""

import warnings
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from test_policy import make_policy

from diffpolicy.data.episodes import Episodes
from diffpolicy.errors import DiffPolicyError
from diffpolicy.evaluate import summarise
from diffpolicy.rollout import make_env, make_envs, record, rollout


class Line(gymnasium.Env):
    """Observation (start, sum of actions, step): an episode of 3 to 9 steps that its seed decides."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.start = float(self.np_random.uniform())
        self.end = int(self.np_random.integers(3, 10))
        self.total, self.step_number = 0.0, 0
        return self._obs(), {"reached": False}

    def step(self, action):
        self.total += float(action[0])
        self.step_number += 1
        ended = self.step_number >= self.end
        return self._obs(), self.total, ended and self.end % 2 == 0, ended and self.end % 2 == 1, {"reached": ended}

    def _obs(self):
        return np.array([self.start, self.total, self.step_number], dtype=np.float32)


gymnasium.register("Line-v0", entry_point=Line)


class Remembering:
    """Acts by its own count of steps since each episode's start, so a wrong start or a wasted step shows."""

    def predict(self, obs, state=None, episode_start=None, deterministic=True):
        count = np.zeros(len(obs)) if state is None else state
        count = np.where(episode_start, 0, count)
        return (0.1 * (count + 1))[:, None].astype(np.float32), count + 1


def check_true(episodes: Episodes) -> None:
    """The recorded observations follow from the recorded actions, first to last."""
    for i in range(len(episodes)):
        e = episodes[i]
        assert len(e) == e.obs["obs"][-1, 2] == e.obs["obs"][:, 2].max()
        np.testing.assert_allclose(e.action[:, 0], 0.1 * np.arange(1, len(e) + 1), rtol=1e-5)
        np.testing.assert_allclose(e.obs["obs"][1:, 1], np.cumsum(e.action), rtol=1e-5)
        np.testing.assert_allclose(e.reward, np.cumsum(e.action), rtol=1e-5)
        assert np.all(e.obs["obs"][:, 0] == e.obs["obs"][0, 0])
        np.testing.assert_array_equal(e.info["reached"], [0.0] * (len(e) - 1) + [1.0])
        assert e.terminated == (len(e) % 2 == 0)
        assert e.truncated == (len(e) % 2 == 1)


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_no_reset_step_is_recorded_as_an_action_in_any_autoreset_mode(kind, mode):
    envs = kind([Line] * 3, autoreset_mode=mode)
    episodes = rollout(Remembering(), envs, 11, seed=5)
    envs.close()
    assert len(episodes) == 11
    check_true(episodes)


class Terse(Line):
    """Says whether it reached its end as NumPy's own bool, and when it has ended alone; some episodes have one step."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        obs, _ = super().reset(seed=seed, options=options)
        self.end -= 2
        return obs, {}

    def step(self, action):
        *seen, _ = super().step(action)
        return *seen, {"is_success": np.bool_(seen[3])} if seen[2] or seen[3] else {}


@pytest.mark.parametrize("kind", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_what_is_told_at_the_end_alone_is_recorded_in_any_autoreset_mode(kind, mode):
    envs = kind([Terse] * 3, autoreset_mode=mode)
    episodes = rollout(Remembering(), envs, 20, seed=5)
    envs.close()
    assert 1 in episodes.length and max(episodes.length) > 4
    for i in range(len(episodes)):
        e = episodes[i]
        np.testing.assert_array_equal(e.info["is_success"], [0.0] * (len(e) - 1) + [float(e.truncated)])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_episodes_are_those_of_their_seeds_with_1_or_4_environments(asynchronous):
    wanted = []
    for seed in range(20, 30):
        env = Line()
        env.reset(seed=seed)
        wanted.append((env.start, env.end))
    for n in (1, 4):
        envs = make_envs("Line-v0", n, asynchronous=asynchronous)
        episodes = rollout(Remembering(), envs, 10, seed=20)
        envs.close()
        check_true(episodes)
        found = [(episodes[i].obs["obs"][0, 0], len(episodes[i])) for i in range(10)]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


class Named(gymnasium.ObservationWrapper):
    """Line with the two named observations of the test policy."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(pose=box(-9, 9, (3,)), goal=box(-9, 9, (2,)))
        self.action_space = box(-9, 9, (2,))

    def observation(self, observation):
        return {"pose": observation.astype(np.float32), "goal": observation[:2].astype(np.float32)}

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=1, options=options)  # one start: SB3 cannot seed each episode


gymnasium.register("Named-v0", entry_point=lambda: Named(Line()))


@pytest.mark.parametrize("n", [1, 3])
def test_stable_baselines3_evaluate_policy_sees_the_actions_of_our_rollout(n):
    policy = make_policy()
    envs = make_envs("Named-v0", n)
    ours = rollout(policy, envs, 6, seed=0).returns
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for a Monitor, which would only log
        theirs, _ = evaluate_policy(
            policy, make_vec_env("Named-v0", n), n_eval_episodes=6, deterministic=True, return_episode_rewards=True
        )
    assert np.ptp(ours) > 0.01
    np.testing.assert_allclose(sorted(theirs), sorted(ours), atol=1e-3)


def test_a_policy_plays_5_episodes_the_same_in_1_2_and_5_environments():
    """In two, environments play several episodes each."""
    one, two, five = (rollout(make_policy(), make_envs("Named-v0", n), 5, seed=0).returns for n in (1, 2, 5))
    assert len(set(np.round(one, 3))) == 5
    np.testing.assert_allclose(two, one, atol=1e-3)
    np.testing.assert_allclose(five, one, atol=1e-3)


def test_an_unknown_environment_and_a_discrete_one_are_refused_in_one_sentence():
    for name, words in (("Nowhere-v0", "Nowhere"), ("CartPole-v1", "continuous Box")):
        with pytest.raises(DiffPolicyError, match=words) as error:
            make_env(name)
        assert "\n" not in str(error.value)


class Told:
    """Notes what it is told of each step."""

    def __init__(self):
        self.told = []

    def predict(self, obs, state=None, episode_start=None, deterministic=True):
        self.told.append((np.array(episode_start).tolist(), deterministic, state))
        return np.zeros((1,) if np.ndim(obs) == 1 else (len(obs), 1), np.float32), len(self.told)


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_actor_is_told_whether_to_be_deterministic(deterministic):
    actor = Told()
    rollout(actor, make_envs("Line-v0", 2), 3, seed=0, deterministic=deterministic)
    assert {told for _, told, _ in actor.told} == {deterministic}


def test_a_film_is_of_one_episode_of_its_seed_that_starts_once():
    class Film(Line):
        metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 7}

        def __init__(self, render_mode=None):
            self.render_mode = render_mode

        def render(self):
            return np.full((2, 2, 3), self.step_number, np.uint8)

    gymnasium.register("Film-v0", entry_point=Film)
    for seed in (3, 4, 5, 6):
        actor, line = Told(), Line()
        line.reset(seed=seed)
        frames, rate = record(actor, "Film-v0", None, seed)
        assert [int(frame.max()) for frame in frames] == list(range(line.end + 1)) and rate == 7
        assert [start for start, _, _ in actor.told] == [[True]] + [[False]] * (line.end - 1)
        assert [state for _, _, state in actor.told] == [None, *range(1, line.end)]


def test_an_environments_arguments_reach_it():
    """MountainCarContinuous with a goal velocity; its attribute says so."""
    (velocity,) = make_envs("MountainCarContinuous-v0", 1, {"goal_velocity": 0.5}).get_attr("goal_velocity")
    assert velocity == 0.5


def test_a_report_says_how_often_the_network_is_asked():
    """Heun asks twice a step but for the last."""
    policy = make_policy().with_sampler(sampler="heun", steps=3)
    episodes = rollout(policy, make_envs("Named-v0", 1), 1, seed=0)
    assert summarise(policy, episodes, {}).nfe == policy.planner.evaluations == 5
