"""Normalizer: the two directions are inverses, the numbers are the data's, and what cannot be right is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpolicy.data import normalizer as module
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.normalizer import KINDS, ArrayNormalizer, Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows
from diffpolicy.errors import DatasetError

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def make_episodes(rows: np.ndarray, action: np.ndarray | None = None, name: str = "obs") -> Episodes:
    """One episode with these observations."""
    n = len(rows) - 1
    action = np.linspace(-1, 1, n)[:, None] if action is None else action
    return from_list([Episode({name: rows}, action, np.zeros(n), terminated=False, truncated=True)])


def fit(rows: np.ndarray, kinds: str | tuple[str, ...] = "limits") -> ArrayNormalizer:
    """The encoding of observations fitted to these rows."""
    return Normalizer.fit(make_episodes(rows), {"obs": kinds})["obs"]


dimension = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from([0.0, 1.0, -3.7, 1e3, -1e6]),  # where it lies
    st.sampled_from([0.0, 1e-9, 1e-5, 1e-2, 1.0, 50.0, 1e5]),  # how far it reaches: constant to wide
)


@settings(max_examples=150, deadline=None)
@given(
    dimensions=st.lists(dimension, min_size=1, max_size=6),
    rows=st.integers(2, 20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_decode_is_the_inverse_of_encode_up_to_rounding_for_any_mix_of_kinds(dimensions, rows, dtype, seed):
    kinds, offsets, ranges = map(list, zip(*dimensions, strict=True))
    unit = np.random.default_rng(seed).uniform(-1, 1, size=(2 * rows, len(kinds)))
    data = torch.from_numpy(unit * ranges + offsets).to(dtype)
    array = fit(data[:rows].numpy(), tuple(kinds)).to(dtype)
    encoded = array.encode(data)  # the second half was not seen when fitting
    assert encoded.dtype == dtype
    assert encoded.shape == (2 * rows, array.encoded_dim)
    assert array.encoded_dim == len(kinds) + kinds.count("angle")
    decoded, data = array.decode(encoded).double(), data.double()
    error = abs(decoded - data)[:, array.linear]
    # A product, a sum and their inverses, each rounded once: relative to the number and to where its zero lies.
    zero = abs(array.offset / array.scale).double()
    assert (error <= 4 * EPS[dtype] * (abs(data)[:, array.linear] + zero)).all()
    # An angle may come back some turns away: the same point of the circle.
    for function in (torch.cos, torch.sin):
        assert (abs(function(decoded) - function(data))[:, array.angles] <= 64 * EPS[dtype]).all()


def test_encoding_a_decoded_chunk_gives_the_chunk_again_to_1e_5():
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, size=(50, 3)) * [1, 200, 0.01] + [0, 300, -0.1]
    normalizer = Normalizer.fit(make_episodes(np.zeros((51, 1)), action))
    chunk = torch.rand(64, 16, 3) * 2 - 1
    torch.testing.assert_close(normalizer["action"].encode(normalizer.decode_action(chunk)), chunk, atol=1e-5, rtol=0)


def test_limits_from_minus_2_to_6_are_scale_a_quarter_and_offset_minus_a_half_exactly():
    array = fit(np.array([[-2.0], [3.0], [6.0]]))
    assert (array.scale.item(), array.offset.item()) == (0.25, -0.5)
    assert (array.minimum.item(), array.maximum.item()) == (-2.0, 6.0)
    assert array.encode(torch.tensor([[-2.0], [2.0], [6.0]])).ravel().tolist() == [-1.0, 0.0, 1.0]
    assert array.decode(torch.tensor([[-1.0], [0.0], [1.0]])).ravel().tolist() == [-2.0, 2.0, 6.0]


@settings(max_examples=100, deadline=None)
@given(low=st.integers(-512, 512), power=st.integers(-4, 9))
def test_limits_map_the_extremes_to_exactly_minus_1_and_1_where_floats_can_hold_the_numbers(low, power):
    array = fit(np.array([[low], [low + 2.0**power], [low + 2.0 ** (power - 1)]]))
    assert array.encode(torch.tensor([[low], [low + 2.0**power]])).ravel().tolist() == [-1.0, 1.0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=3, max_size=20))
def test_limits_map_all_data_into_the_unit_box_up_to_rounding(values):
    rows = np.array(values, dtype=np.float32)[:, None]
    array = fit(rows)
    encoded = array.encode(torch.from_numpy(rows)).numpy()
    slack = 2 * EPS[torch.float32] * (1 + abs(array.offset.item()))
    assert abs(encoded).max() <= 1 + slack
    if array.scale.item() != 1.0:  # not constant
        assert encoded.max() == pytest.approx(1, abs=slack)
        assert encoded.min() == pytest.approx(-1, abs=slack)


@pytest.mark.parametrize("kind", ["limits", "standard"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 12345.678])
def test_a_constant_dimension_maps_to_0_and_moves_by_as_much_as_the_robot_does(kind, value):
    rows = np.full((10, 1), value, dtype=np.float32)
    array = fit(rows, kind)
    assert array.scale.item() == 1.0
    assert (array.encode(torch.from_numpy(rows)) == 0).all()
    moved = torch.tensor([[value + 0.1]])
    # Dividing by the range plus 1e-8, as others do, would give 2e7.
    assert array.encode(moved).item() == pytest.approx(0.1, abs=2 * EPS[torch.float32] * abs(value) + 1e-7)
    assert array.decode(array.encode(moved)).item() == pytest.approx(moved.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("middle", "reach", "constant"),
    [
        (0.5, 1e-7, True),
        (0.5, 1e-4, False),
        (1e6, 1.0, True),
        (1e6, 100.0, False),
        (0.0, 4e-7, True),
        (0.0, 1e-5, False),
    ],
)
def test_a_dimension_is_constant_if_it_moves_less_than_1e_5_of_its_size_or_1e_6(middle, reach, constant):
    array = fit(np.array([[middle - reach], [middle], [middle + reach]]))
    assert array.scale.item() == pytest.approx(1.0 if constant else 1 / reach, rel=1e-6)


def test_standard_divides_by_numpys_standard_deviation_and_multiplies_by_the_same():
    rows = np.random.default_rng(0).normal([5, -100], [0.01, 30], size=(1000, 2))
    array = fit(rows, "standard").double()
    np.testing.assert_allclose(array.scale, 1 / rows.std(0), rtol=1e-7)
    encoded = array.encode(torch.from_numpy(rows))
    # The two numbers are kept in single precision, and the first dimension lies 500 deviations from zero.
    np.testing.assert_allclose(encoded.mean(0), 0, atol=5e-5)
    np.testing.assert_allclose(encoded.std(0, correction=0), 1, rtol=1e-7)
    np.testing.assert_allclose(array.decode(encoded), rows, rtol=1e-13)
    one_deviation_up = array.decode(encoded + 1) - array.decode(encoded)
    np.testing.assert_allclose(one_deviation_up, np.broadcast_to(rows.std(0), rows.shape), rtol=1e-6)


def test_none_changes_nothing_to_the_bit():
    rows = torch.randn(50, 3)
    array = fit(rows.numpy(), "none")
    assert torch.equal(array.encode(rows), rows)
    assert torch.equal(array.decode(rows), rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 2e-14)])
@pytest.mark.parametrize("turns", [1, -1, 5])
def test_an_angle_and_the_angle_some_turns_on_encode_alike(dtype, tolerance, turns):
    angle = torch.linspace(-4, 4, 101, dtype=dtype)[:, None]
    array = fit(angle.numpy(), "angle").to(dtype)
    further = array.encode(angle + turns * 2 * math.pi)
    torch.testing.assert_close(further, array.encode(angle), atol=tolerance, rtol=0)
    assert abs(further).max() <= 1


def test_decoded_angles_lie_within_pi_and_the_wrap_is_no_jump():
    array = fit(np.linspace(-1, 1, 5)[:, None], "angle")
    decoded = array.decode(torch.randn(1000, 2))  # any pair, as a network would give
    assert abs(decoded).max() <= torch.tensor(math.pi)
    before, after = array.encode(torch.tensor([[math.pi - 1e-3], [-math.pi + 1e-3]]))
    assert torch.dist(before, after) == pytest.approx(2e-3, abs=1e-5)


def test_encoded_rows_are_the_linear_dimensions_then_cosines_then_sines():
    rows = np.array([[0.0, 0.0, 0.0, 10.0, 5.0], [1.0, 4.0, 2.0, 20.0, 5.0]])
    array = fit(rows, ("angle", "limits", "angle", "none", "limits"))
    encoded = array.encode(torch.tensor([1.0, 3.0, 2.0, 15.0, 5.5]))
    wanted = [0.5, 15.0, 0.5, math.cos(1), math.cos(2), math.sin(1), math.sin(2)]
    np.testing.assert_allclose(encoded, wanted, rtol=1e-6)
    np.testing.assert_allclose(array.decode(encoded), [1.0, 3.0, 2.0, 15.0, 5.5], rtol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 23, 1 << 18])
def test_statistics_over_blocks_of_any_size_equal_numpys_over_the_whole(monkeypatch, block):
    monkeypatch.setattr(module, "CHECK_ROWS", block)
    rows = np.random.default_rng(0).normal([0, 1e4, -3], [1, 1e-1, 50], size=(23, 3))
    limits, standard = fit(rows), fit(rows, "standard")
    np.testing.assert_array_equal(limits.minimum, rows.min(0).astype(np.float32))
    np.testing.assert_array_equal(limits.maximum, rows.max(0).astype(np.float32))
    np.testing.assert_array_equal(limits.scale, (2 / (rows.max(0) - rows.min(0))).astype(np.float32))
    np.testing.assert_allclose(standard.scale, 1 / rows.std(0), rtol=1e-6)
    np.testing.assert_allclose(standard.offset, -rows.mean(0) / rows.std(0), rtol=1e-6)


def test_every_array_of_a_batch_is_encoded_by_its_own_numbers():
    rows = np.linspace(0, 10, 21, dtype=np.float32)[:, None]
    data = make_episodes(rows, np.linspace(-4, 4, 20, dtype=np.float32)[:, None])
    batch = Windows(data, Spec.from_episodes(data, 4, 2, 2)).gather(torch.arange(20))
    encoded = Normalizer.fit(data).encode(batch)
    torch.testing.assert_close(encoded.obs["obs"], batch.obs["obs"] / 5 - 1)
    torch.testing.assert_close(encoded.next_obs["obs"], batch.next_obs["obs"] / 5 - 1)
    torch.testing.assert_close(encoded.action, batch.action / 4)
    for name in ("valid", "reward", "discount"):
        assert torch.equal(getattr(encoded, name), getattr(batch, name))


@pytest.mark.parametrize("name", ["obs", "observation.state", "agent/pos", "keys", "type", "a b"])
def test_a_normalizer_of_any_name_is_rebuilt_from_its_json_and_state_dict(name):
    rows = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    data = make_episodes(rows, name=name)
    normalizer = Normalizer.fit(data, {name: ("limits", "standard", "angle")})
    again = Normalizer(normalizer.to_json())
    again.load_state_dict(normalizer.state_dict())
    assert again.names == (name,)
    assert again.to_json() == {name: ["limits", "standard", "angle"], "action": ["limits"]}
    obs = {name: torch.from_numpy(rows)}
    assert torch.equal(again.encode_obs(obs)[name], normalizer.encode_obs(obs)[name])
    assert torch.equal(again[name].maximum, torch.from_numpy(rows.max(0)))
    chunk = torch.randn(4, 8, 1)
    assert torch.equal(again.decode_action(chunk), normalizer.decode_action(chunk))


def test_a_normalizer_without_its_numbers_is_refused_by_load_state_dict():
    normalizer = Normalizer.fit(make_episodes(np.random.default_rng(0).normal(size=(30, 3))))
    state = normalizer.state_dict()
    del state["arrays.array_obs.scale"]
    with pytest.raises(RuntimeError, match="scale"):
        Normalizer(normalizer.to_json()).load_state_dict(state)


@pytest.mark.parametrize("kind", ["standard", "none", ("limits", "standard")])
def test_actions_that_are_not_limits_are_refused_together_with_clipping_and_only_then(kind):
    data = make_episodes(np.zeros((11, 1)), np.random.default_rng(0).normal(size=(10, 2)))
    with pytest.raises(DatasetError, match="cut by clipping to the unit box; use limits, or sample without clipping"):
        Normalizer.fit(data, {"action": kind})
    assert Normalizer.fit(data, {"action": kind}, clipped_actions=False)["action"].encoded_dim == 2


@pytest.mark.parametrize("clipped", [True, False])
def test_actions_as_angles_are_refused(clipped):
    data = make_episodes(np.zeros((11, 1)), np.zeros((10, 2)))
    with pytest.raises(DatasetError, match="actions cannot be normalised as angle"):
        Normalizer.fit(data, {"action": ("limits", "angle")}, clipped_actions=clipped)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"pose": "limits"}, r"kinds name \['pose'\]; the dataset has \['action', 'obs'\]"),
        ({"obs": "minmax"}, r"'obs' are \['minmax', 'minmax', 'minmax'\]; wanted 3 of limits, standard, angle, none"),
        ({"obs": ("limits", "angle")}, r"'obs' are \['limits', 'angle'\]; wanted 3 of"),
        ({"obs": ("limits",) * 4}, "wanted 3 of"),
    ],
)
def test_unknown_names_and_kinds_and_wrong_lengths_are_refused_with_what_there_is(kinds, message):
    with pytest.raises(DatasetError, match=message):
        Normalizer.fit(make_episodes(np.zeros((11, 3))), kinds)


def test_observations_that_are_no_rows_of_numbers_are_refused_with_their_shape():
    with pytest.raises(DatasetError, match=r"'obs' has shape \(11, 9, 2\); wanted rows of numbers"):
        Normalizer.fit(make_episodes(np.zeros((11, 9, 2))))


def test_an_observation_called_action_is_refused_since_it_would_hide_the_actions():
    with pytest.raises(DatasetError, match="rename it"):
        Normalizer.fit(make_episodes(np.zeros((11, 3)), name="action"))
