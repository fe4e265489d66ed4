"""Agents of stable-baselines3: nothing is unpickled without consent, and a loaded agent acts as well as it did."""

import pickle
import sys

import gymnasium as gym
import numpy as np
import pytest

from diffpolicy_envs import EnvsError, load_sb3_agent


@pytest.fixture
def agents(shared_data):
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed: the extra `envs` has it")
    return shared_data / "sb3_agents"


class Trap:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def episode_return(env, agent, seed):
    obs, _ = env.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        obs, reward, terminated, truncated, _ = env.step(agent.predict(obs)[0])
        total, ended = total + reward, terminated or truncated
    return total


def test_without_trust_pickle_nothing_is_unpickled_and_the_error_names_file_and_flag(tmp_path):
    folder = tmp_path / "ppo-Trap"
    folder.mkdir()
    (folder / "Trap-v0.zip").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    (folder / "vecnormalize.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(EnvsError, match=r"Trap-v0\.zip holds pickles.*trust_pickle=True"):
        load_sb3_agent(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_an_unknown_algorithm_and_a_broken_zip_are_one_sentence_each(tmp_path):
    pytest.importorskip("stable_baselines3")
    with pytest.raises(EnvsError, match="holds 0 zips of agents"):
        load_sb3_agent(tmp_path / "nothing", trust_pickle=True)
    broken = tmp_path / "magic-Hopper.zip"
    broken.write_bytes(b"PK no zip")
    with pytest.raises(EnvsError, match="'dreams' is not a known algorithm: pass algorithm= one of a2c, ars"):
        load_sb3_agent(broken, trust_pickle=True, algorithm="dreams")
    with pytest.raises(EnvsError, match="is not a PPO agent that can be read"):
        load_sb3_agent(broken, trust_pickle=True, algorithm="PPO")


def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tqc-Hopper").mkdir()
    (tmp_path / "tqc-Hopper" / "Hopper-v3.zip").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(EnvsError, match="needs sb3-contrib, which is not installed: pip install sb3-contrib"):
        load_sb3_agent(tmp_path / "tqc-Hopper", trust_pickle=True)


@pytest.mark.filterwarnings("ignore")
def test_tqc_hopper_returns_about_3600_and_ppo_hopper_2400_with_its_normalizer(agents):
    env = gym.make("Hopper-v4")
    tqc = load_sb3_agent(agents / "tqc-Hopper", trust_pickle=True)
    ppo = load_sb3_agent(agents / "ppo-Hopper", trust_pickle=True)
    assert tqc.normalizer is None and ppo.normalizer is not None
    assert episode_return(env, tqc, seed=0) == pytest.approx(3600, abs=200)
    assert episode_return(env, ppo, seed=0) == pytest.approx(2400, abs=150)


@pytest.mark.filterwarnings("ignore")
def test_a_zip_acts_as_its_folder_does_on_one_observation_and_on_a_batch(agents):
    folder = load_sb3_agent(agents / "ppo-Hopper", trust_pickle=True)
    file = load_sb3_agent(agents / "ppo-Hopper" / "Hopper-v3.zip", trust_pickle=True, algorithm="ppo")
    obs = np.random.default_rng(0).normal(size=(5, 11))
    actions = folder.predict(obs)[0]
    assert actions.shape == (5, 3)
    np.testing.assert_array_equal(actions, file.predict(obs)[0])
    np.testing.assert_allclose(actions[2], folder.predict(obs[2])[0], atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_loading_leaves_the_modules_named_gym_as_they_were(agents):
    load_sb3_agent(agents / "ppo-Hopper", trust_pickle=True)  # imports what it imports
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "gym"}
    load_sb3_agent(agents / "ppo-Hopper", trust_pickle=True)
    assert before == {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "gym"}
