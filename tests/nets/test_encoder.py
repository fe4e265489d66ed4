"""The encoder's order is its own: a policy that is loaded elsewhere must read the same numbers in the same place."""

import pytest
import torch

from diffpolicy.nets.encoder import EmbeddingEncoder, FlattenEncoder


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
