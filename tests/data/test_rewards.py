"""Reward transforms by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.rewards import returns_to_go
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows
from diffpolicy.errors import DatasetError
from diffpolicy.parts import RewardConfig, make_rewards


def episodes(*rewards: list[float]) -> Episodes:
    return from_list(
        [
            Episode({"obs": np.zeros((len(r) + 1, 1), np.float32)}, np.zeros((len(r), 1)), np.array(r), True, False)
            for r in rewards
        ]
    )


CASES = {
    "plain": (RewardConfig(), [1.0, 3.0, -2.0]),
    "antmaze": (RewardConfig(scale=4.0, shift=-2.0), [2.0, 10.0, -10.0]),
    "returns 4 and -2 are 1000 apart": (RewardConfig("return_range"), [1000 / 6, 500.0, -1000 / 3]),
    "standard": (RewardConfig("standard"), [x / np.std([1, 3, -2]) for x in (1 - 2 / 3, 3 - 2 / 3, -2 - 2 / 3)]),
    "standard, doubled, plus 1": (
        RewardConfig("standard", 2.0, 1.0),
        [2 * x / np.std([1, 3, -2]) + 1 for x in (1 - 2 / 3, 3 - 2 / 3, -2 - 2 / 3)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rewards_1_3_and_minus_2_of_two_episodes(case):
    config, expected = CASES[case]
    given = episodes([1.0, 3.0], [-2.0])
    np.testing.assert_allclose(make_rewards(config, given).reward, expected, rtol=1e-6)
    np.testing.assert_allclose(given.reward, [1.0, 3.0, -2.0])


@pytest.mark.parametrize(("kind", "words"), [("return_range", "the return 2"), ("standard", "every reward is 1")])
def test_rewards_that_do_not_differ_are_refused(kind, words):
    with pytest.raises(DatasetError, match=words):
        make_rewards(RewardConfig(kind), episodes([1.0, 1.0], [1.0, 1.0]))


def test_returns_to_go_by_hand_of_episodes_of_different_length_and_of_one_that_goes_on_after_its_goal():
    two = episodes([1.0, 2.0, 3.0], [4.0])
    assert returns_to_go(two, 0.5).tolist() == [1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3, 4]
    masked = replace(two, info={"mask": np.array([True, False, True, True])})
    assert returns_to_go(masked, 0.5).tolist() == [1 + 0.5 * 2, 2, 3, 4]


def test_rewards_that_are_all_0_are_refused_as_nothing_to_value():
    with pytest.raises(DatasetError, match=r"every reward is 0.*--relabel"):
        make_rewards(RewardConfig(), episodes([0.0, 0.0], [0.0]))


def test_a_reward_in_the_last_step_that_no_critic_would_see_is_refused_until_the_data_say_what_ends_an_episode():
    """As LeRobot's demonstrations with a reward at success: nothing follows their last step, and no end is known."""
    given = replace(
        episodes([0.0, 0.0, 1.0], [0.0, 0.0]),
        terminated=np.zeros(2, dtype=bool),
        truncated=np.ones(2, dtype=bool),
        has_final=np.zeros(2, dtype=bool),
        info={"success": np.array([0.0, 0.0, 1.0, 0.0, 0.0])},
    )
    with pytest.raises(DatasetError, match=r"every reward but 0 is in a last step .*--ends.* of \['success'\]"):
        make_rewards(RewardConfig(), given)
    ended = given.ended_by("success")
    assert (ended.terminated.tolist(), ended.truncated.tolist()) == ([True, False], [False, True])
    spec = Spec.from_episodes(ended, horizon=1, n_obs_steps=1, n_action_steps=1)
    windows = Windows(make_rewards(RewardConfig(), ended), spec, gamma=0.9, require_next=True)
    batch = windows.gather(torch.arange(len(windows)))
    np.testing.assert_allclose(batch.reward, [0, 0, 1, 0])
    np.testing.assert_allclose(batch.discount, [0.9, 0.9, 0, 0.9])
    with pytest.raises(DatasetError, match=r"no info value 'done' in the dataset; it has \['success'\]"):
        given.ended_by("done")
