"""Any agent may prefer good episodes: how often it draws them, beside a mixture's shares, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from agent_cases import make
from worlds import bandit

from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.order import WeightedOrder
from diffpolicy.data.windows import Windows
from diffpolicy.errors import DatasetError, SpecError
from diffpolicy.learning.critics import TdConfig
from diffpolicy.parts import RewardConfig

AGENTS_AND_SETTINGS = [
    ("bc", {}),
    ("idql", {"td": TdConfig(rewards=RewardConfig("plain", scale=-1.0, shift=100.0))}),  # not what R is made of
    ("diffuser", {}),
    ("decision-diffuser", {}),
    ("decision-diffuser", {"whole_episode": True}),
]


@pytest.mark.parametrize(("name", "settings"), AGENTS_AND_SETTINGS)
def test_windows_are_drawn_in_proportion_to_the_exponential_of_an_agents_preference(name, settings):
    rewards = [[0.0], [0.0, 5], [1.0, 2, 3, 4]]  # returns 0, 5, 10
    episodes = from_list(
        [Episode({"obs": np.zeros((len(r) + 1, 1))}, np.ones((len(r), 1)), np.array(r), True, False) for r in rewards]
    )
    agent = make(name, episodes, 1, preference=2.0, **settings)
    windows = agent.windows(episodes)
    drawn = np.concatenate([WeightedOrder(windows, 1000, seed=0)(step).numpy() for step in range(40)])
    expected = np.repeat(np.exp([0.0, 1.0, 2.0]), [1, 2, 4])
    # 40,000 draws: the standard deviation of a share is below 0.0025.
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), expected / expected.sum(), atol=0.01)

    def shares(windows: Windows) -> list[float]:
        assert windows.weight is not None
        return (windows.weight / windows.weight[-1]).tolist()

    known = agent.windows(episodes, only=np.array([0, 1]))  # the best is held out, and still what 1 means
    assert shares(known) == pytest.approx([np.exp(-1.0), 1.0])
    mixed = agent.windows(replace(episodes, weight=np.array([0.0, 1.0, 3.0])))  # a mixture's shares count as well
    assert shares(mixed) == pytest.approx([0.0, np.exp(-1.0) / 3, 1.0])
    assert make(name, episodes, 1, **settings).windows(episodes).weight is None
    with pytest.raises(DatasetError, match="every episode has the return 5, so none can be preferred"):
        agent.windows(episodes.select(np.array([1, 1])))


@pytest.mark.parametrize("name", ["decision-diffuser", "idql"])
@pytest.mark.parametrize("preference", [-1.0, 101.0, float("nan")])
def test_a_preference_that_is_impossible_is_refused(name, preference):
    with pytest.raises(SpecError, match=r"from 0 \(all alike\) to 100"):
        make(name, bandit(count=10), 1, preference=preference)
