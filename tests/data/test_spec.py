"""Spec: which sizes work together, and that the advice given for the others is right."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.spec import Spec
from diffpolicy.errors import SpecError

size = st.integers(1, 12)


@given(horizon=size, n_obs_steps=size, n_action_steps=size)
def test_a_spec_exists_if_and_only_if_the_executed_part_fits_into_the_chunk(horizon, n_obs_steps, n_action_steps):
    def make(**changes: int) -> Spec:
        sizes = {"horizon": horizon, "n_obs_steps": n_obs_steps, "n_action_steps": n_action_steps} | changes
        return Spec({"obs": (3,)}, 2, **sizes)

    if n_obs_steps - 1 + n_action_steps <= horizon:
        assert len(range(horizon)[make().executed]) == n_action_steps
        return
    with pytest.raises(SpecError) as caught:
        make()
    raise_to = re.search(r"raise horizon to at least (\d+)", str(caught.value))
    lower_to = re.search(r"lower (n_\w+) to at most (\d+)", str(caught.value))
    assert raise_to
    assert lower_to
    make(horizon=int(raise_to[1]))
    with pytest.raises(SpecError):
        make(horizon=int(raise_to[1]) - 1)
    # With a history as long as the chunk there is no room for any action: the advice then concerns the history.
    make(**{"n_action_steps": 1, lower_to[1]: int(lower_to[2])})
    with pytest.raises(SpecError):
        make(**{"n_action_steps": 1, lower_to[1]: int(lower_to[2]) + 1})


def test_history_2_and_8_actions_in_a_horizon_of_8_are_refused_in_one_sentence_with_the_numbers_and_what_to_do():
    with pytest.raises(SpecError) as caught:
        Spec({"obs": (5,)}, 2, horizon=8, n_obs_steps=2, n_action_steps=8)
    assert str(caught.value) == (
        "n_obs_steps 2 - 1 + n_action_steps 8 = 9 exceeds horizon 8; raise horizon to at least 9 or lower "
        "n_action_steps to at most 7"
    )


def test_with_history_2_and_8_actions_the_executed_part_is_1_to_9():
    spec = Spec({"obs": (5,)}, 2, horizon=16, n_obs_steps=2, n_action_steps=8)
    assert list(range(16)[spec.executed]) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("name", ["action_dim", "horizon", "n_obs_steps", "n_action_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_1_is_refused_by_name(name, value):
    sizes = {"action_dim": 2, "horizon": 4, "n_obs_steps": 1, "n_action_steps": 2} | {name: value}
    with pytest.raises(SpecError, match=f"{name} is {value}; give a whole number of at least 1"):
        Spec({"obs": (5,)}, **sizes)


def test_observations_without_a_name_are_refused():
    with pytest.raises(SpecError, match="give at least one named array"):
        Spec({}, 2)


@pytest.mark.parametrize("period", [None, 0.05])
def test_a_spec_survives_json(period):
    spec = Spec({"pose": (3,), "camera.front": (96, 96, 3)}, 7, 12, 3, 4, control_period=period)
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_sizes_and_the_control_period_come_from_the_episodes():
    episode = Episode(
        {"pose": np.zeros((4, 3), np.float32), "goal": np.zeros((4, 2), np.float32)},
        np.zeros((3, 6), np.float32),
        np.zeros(3, np.float32),
        False,
        True,
    )
    spec = Spec.from_episodes(from_list([episode], {"control_period": 0.1}), 8, 2, 4)
    assert spec == Spec({"pose": (3,), "goal": (2,)}, 6, 8, 2, 4, control_period=0.1)
