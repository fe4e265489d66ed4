"""Episodes: the layout of the picture, views that copy nothing, what is refused, and the split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffpolicy.data import episodes as module
from diffpolicy.data.episodes import Episode, Episodes, from_list, split
from diffpolicy.errors import DatasetError


def make_arrays(lengths: tuple[int, ...] = (4, 3)) -> dict:
    """The picture of the module: observation i is the number i, and so is action i, times ten."""
    n, e = sum(lengths), len(lengths)
    return {
        "obs": {"obs": np.arange(n + e, dtype=np.float32)[:, None]},
        "action": 10 * np.arange(n, dtype=np.float32)[:, None],
        "reward": np.arange(n, dtype=np.float32),
        "length": np.array(lengths),
        "terminated": np.arange(e) == 0,
        "truncated": np.arange(e) > 0,
        "info": {"speed": np.arange(n, dtype=np.float32)},
    }


def test_episode_1_of_lengths_4_and_3_has_observations_5_to_8_and_actions_4_to_6():
    data = Episodes(**make_arrays())
    assert (len(data), data.steps, data.start.tolist()) == (2, 7, [0, 4])
    assert data[0].obs["obs"].ravel().tolist() == [0, 1, 2, 3, 4]
    assert data[1].obs["obs"].ravel().tolist() == [5, 6, 7, 8]
    assert data[1].action.ravel().tolist() == [40, 50, 60]
    assert data[1].reward.tolist() == [4, 5, 6]
    assert data[1].info["speed"].tolist() == [4, 5, 6]
    assert (data[0].terminated, data[0].truncated) == (True, False)
    assert (data[1].terminated, data[1].truncated) == (False, True)
    assert (len(data[0]), len(data[1])) == (4, 3)
    assert data[-1].action[0] == data[1].action[0]
    with pytest.raises(IndexError, match="episode 2 of 2"):
        data[2]


def test_an_episode_is_a_view_and_renaming_copies_nothing():
    data = Episodes(**make_arrays())
    episode, renamed = data[1], data.rename({"position": "obs"})
    for view, flat in [
        (episode.obs["obs"], data.obs["obs"]),
        (episode.action, data.action),
        (episode.reward, data.reward),
        (episode.info["speed"], data.info["speed"]),
        (renamed.obs["position"], data.obs["obs"]),
        (renamed.action, data.action),
    ]:
        assert np.shares_memory(view, flat)
    assert list(renamed.obs) == ["position"]
    with pytest.raises(DatasetError, match=r"no observation 'image' in the dataset; it has \['obs'\]"):
        data.rename({"image": "image"})


def test_select_copies_episodes_in_the_order_given_with_everything_that_belongs_to_them():
    data = Episodes(**make_arrays((4, 3, 2)), has_final=np.array([True, False, True]), meta={"who": "me"})
    chosen = data.select([2, 1])
    assert chosen.length.tolist() == [2, 3]
    assert chosen.obs["obs"].ravel().tolist() == [9, 10, 11, 5, 6, 7, 8]
    assert chosen.action.ravel().tolist() == [70, 80, 40, 50, 60]
    assert chosen.info["speed"].tolist() == [7, 8, 4, 5, 6]
    assert chosen.has_final is not None
    assert chosen.has_final.tolist() == [True, False]
    assert chosen.meta == {"who": "me"}
    assert not np.shares_memory(chosen.action, data.action)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_joining_the_single_episodes_gives_the_whole_again(lengths):
    data = Episodes(**make_arrays(tuple(lengths)))
    again = from_list([data[i] for i in range(len(data))])
    np.testing.assert_array_equal(again.obs["obs"], data.obs["obs"])
    for name in ("action", "reward", "length", "terminated", "truncated", "has_final"):
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
    np.testing.assert_array_equal(again.returns, [data[i].reward.sum() for i in range(len(data))])


def test_returns_of_a_million_rewards_of_0_1_are_summed_in_double_precision():
    n = 1_000_000
    arrays = make_arrays((1,)) | {"length": np.array([n]), "reward": np.full(n, 0.1, np.float32), "info": {}}
    arrays |= {"obs": {"obs": np.zeros((n + 1, 1), np.float32)}, "action": np.zeros((n, 1), np.float32)}
    assert Episodes(**arrays).returns[0] == pytest.approx(n * float(np.float32(0.1)), rel=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "row"), [("obs", 8), ("action", 6), ("reward", 5)])
def test_a_number_that_is_not_finite_is_refused_by_array_and_row(monkeypatch, name, row, value):
    monkeypatch.setattr(module, "CHECK_ROWS", 3)  # several blocks
    arrays = make_arrays()
    (arrays["obs"]["obs"] if name == "obs" else arrays[name])[row] = value
    shown = "obs 'obs'" if name == "obs" else name
    with pytest.raises(DatasetError, match=f"{shown} holds {value} in row {row}; wanted finite numbers: remove"):
        Episodes(**arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": np.array([], dtype=np.int64)}, "zero episodes; give at least one"),
        ({"length": np.array([7, 0])}, "episode 1 has 0 steps; wanted at least 1"),
        ({"length": np.array([8, -1])}, "episode 1 has -1 steps; wanted at least 1"),
        ({"length": np.array([4.0, 3.0])}, "length has .* type float64; wanted one whole number an episode"),
        ({"length": np.array([4, 4])}, r"obs 'obs' has shape \(9, 1\); wanted 10 rows"),
        ({"obs": {}}, "no observations; give at least one"),
        ({"obs": {"obs": np.zeros((7, 1))}}, r"obs 'obs' has shape \(7, 1\); wanted 9 rows"),
        ({"obs": {"obs": np.array(["a"] * 9)}}, "obs 'obs' has type <U1; wanted numbers"),
        ({"obs": {"obs": np.array([None] * 9)}}, "obs 'obs' has type object; wanted numbers"),
        ({"action": np.zeros((6, 1))}, r"action has shape \(6, 1\); wanted 7 rows"),
        ({"action": np.zeros(7)}, r"actions have shape \(7,\)"),
        ({"reward": np.zeros(9)}, r"reward has shape \(9,\); wanted 7 rows"),
        ({"reward": np.zeros((7, 1))}, r"reward has shape \(7, 1\); wanted 7 rows, one number a step"),
        ({"info": {"speed": np.zeros(9)}}, r"info 'speed' has shape \(9,\); wanted 7 rows"),
        ({"terminated": np.zeros(7, bool)}, r"terminated has shape \(7,\); wanted 2 rows"),
        ({"truncated": np.zeros((2, 1), bool)}, r"truncated has shape \(2, 1\); wanted 2 rows, one an episode"),
        ({"has_final": np.zeros(3, bool)}, r"has_final has shape \(3,\); wanted 2 rows"),
    ],
)
def test_arrays_that_cannot_be_right_are_refused_by_name_and_shape(changes, message):
    with pytest.raises(DatasetError, match=message):
        Episodes(**(make_arrays() | changes))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool])
def test_actions_of_whole_numbers_are_refused_as_discrete(dtype):
    with pytest.raises(DatasetError, match=r"wanted continuous actions, .* discrete action spaces are not supported"):
        Episodes(**(make_arrays() | {"action": np.zeros((7, 1), dtype)}))


def test_joining_no_episode_is_refused():
    with pytest.raises(DatasetError, match="zero episodes; give at least one"):
        from_list([])


@pytest.mark.parametrize(
    "second",
    [
        {"obs": {"obs": np.zeros((4, 1))}},  # one row too many here could hide one too few elsewhere
        {"obs": {"other": np.zeros((3, 1))}},
        {"obs": {"obs": np.zeros((3, 1)), "other": np.zeros((3, 1))}},
        {"reward": np.zeros(3)},
    ],
)
def test_joining_episodes_whose_names_or_rows_differ_is_refused_by_number(second):
    good = {"obs": {"obs": np.zeros((3, 1))}, "action": np.zeros((2, 1)), "reward": np.zeros(2)}
    first = Episode(**good, terminated=True, truncated=False)
    with pytest.raises(DatasetError, match="episode 1 has 2 actions"):
        from_list([first, Episode(**(good | second), terminated=True, truncated=False)])


@given(count=st.integers(1, 60), fraction=st.floats(0, 1), seed=st.integers(0, 100))
def test_the_split_is_complete_disjoint_seeded_and_always_leaves_something_to_train_on(count, fraction, seed):
    data = Episodes(**make_arrays((1,) * count))
    train, held_out = split(data, fraction, seed)
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(held_out) == min(round(fraction * count), count - 1)
    assert len(train) >= 1
    for first, second in zip((train, held_out), split(data, fraction, seed), strict=True):
        np.testing.assert_array_equal(first, second)


def test_of_100_episodes_a_fifth_held_out_is_20_and_another_seed_holds_out_others():
    data = Episodes(**make_arrays((1,) * 100))
    _, first = split(data, 0.2, 0)
    _, second = split(data, 0.2, 1)
    assert len(first) == len(second) == 20
    assert set(first) != set(second)
