"""The encoder's order is its own: a policy that is loaded elsewhere must read the same numbers in the same place."""

import pytest
import torch

from diffpolicy.nets.encoder import TOLD, EmbeddingEncoder, FlattenEncoder, ToldEncoder


def test_two_names_over_two_steps_lie_step_by_step_and_within_a_step_in_the_given_order():
    obs = {"a": torch.tensor([[[1.0, 2.0], [5.0, 6.0]]]), "b": torch.tensor([[[3.0], [7.0]]])}
    assert FlattenEncoder(["a", "b"])(obs).tolist() == [[1.0, 2.0, 3.0, 5.0, 6.0, 7.0]]
    assert FlattenEncoder(["b", "a"])(obs).tolist() == [[3.0, 1.0, 2.0, 7.0, 5.0, 6.0]]


def test_the_order_of_the_mapping_and_names_not_asked_for_do_not_matter():
    obs = {name: torch.randn(4, 2, size) for name, size in {"a": 3, "b": 1, "c": 2}.items()}
    backwards = dict(reversed(obs.items()))
    assert list(obs) != list(backwards)
    assert torch.equal(FlattenEncoder(["a", "c"])(obs), FlattenEncoder(["a", "c"])(backwards))


def test_histories_of_matrices_are_flattened_row_by_row():
    grid = torch.arange(12.0).reshape(1, 2, 2, 3)
    assert FlattenEncoder(["grid"])({"grid": grid}).tolist() == [list(range(12))]


def test_with_one_step_of_one_name_it_is_the_observation():
    obs = torch.randn(5, 1, 20)
    assert torch.equal(FlattenEncoder(["obs"])({"obs": obs}), obs[:, 0])


def test_a_missing_name_is_an_error_that_names_it():
    with pytest.raises(KeyError, match="goal"):
        FlattenEncoder(["obs", "goal"])({"obs": torch.zeros(1, 2, 3)})


def test_it_has_no_weights_and_no_state():
    assert FlattenEncoder(["obs"]).state_dict() == {}


def test_the_embedding_stands_behind_the_flat_history_and_is_two_layers_of_it():
    torch.manual_seed(0)
    encoder, obs = EmbeddingEncoder(["b", "a"], 6, 4), {"a": torch.randn(3, 2, 1), "b": torch.randn(3, 2, 2)}
    flat = FlattenEncoder(["b", "a"])(obs)
    first, _, second = encoder.net
    hidden = torch.nn.functional.linear(flat, first.weight, first.bias)
    hidden = hidden * torch.tanh(torch.log1p(hidden.exp()))
    wanted = torch.cat([flat, torch.nn.functional.linear(hidden, second.weight, second.bias)], dim=-1)
    torch.testing.assert_close(encoder(obs), wanted)


def test_what_is_told_is_beside_the_condition_and_nothing_told_is_zeros():
    encoder = ToldEncoder(EmbeddingEncoder(["obs"], 3, 4), 5)
    obs = {"obs": torch.randn(2, 1, 3)}
    silent, told = encoder(obs), encoder({**obs, TOLD: torch.tensor([torch.nan, 0.7])})
    assert torch.equal(silent[:, :7], encoder.encoder(obs))
    assert not silent[:, 7:].any()
    assert torch.equal(told[0], silent[0])
    assert torch.equal(told[1], encoder.tell(silent, 0.7)[1])
    assert (told[1, 7:] - encoder.tell(silent, 0.2)[1, 7:]).abs().max() > 1e-3


def test_where_nothing_is_told_no_gradient_is_not_a_number():
    encoder = ToldEncoder(FlattenEncoder(["obs"]), 5)
    encoder({"obs": torch.zeros(2, 1, 3), TOLD: torch.tensor([torch.nan, 0.7])}).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in encoder.net[2].parameters())
