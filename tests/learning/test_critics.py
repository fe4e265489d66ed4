"""What critics learn from: targets and masks by hand, expectiles, the scale of values, and honest failure."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from agent_cases import say
from worlds import two_episodes

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows
from diffpolicy.errors import TrainingError
from diffpolicy.learning.critics import (
    Critics,
    TdConfig,
    climbing_loss,
    early,
    polyak_update,
    whole_chunks,
)
from diffpolicy.learning.implicit import expectile_loss
from diffpolicy.parts import CriticConfig, make_critic

GAMMA = 0.9


def batch_of(episodes: Episodes, chunk: int, gamma: float = GAMMA):
    spec = Spec.from_episodes(episodes, horizon=chunk, n_obs_steps=1, n_action_steps=chunk)
    windows = Windows(episodes, spec, gamma, require_next=True)
    return spec, windows.gather(torch.arange(len(windows)))


def critics_for(episodes: Episodes, spec: Spec, **settings: float) -> Critics:
    torch.manual_seed(0)
    normalizer = Normalizer.fit(episodes, {"obs": "none"})
    return Critics(make_critic(CriticConfig((16,)), spec, normalizer), spec, TdConfig(**{"gamma": GAMMA, **settings}))


def test_targets_of_chunks_of_2_with_next_value_10_by_hand_at_a_true_end_and_a_time_limit():
    episodes = two_episodes()
    spec, batch = batch_of(episodes, chunk=2)
    y = critics_for(episodes, spec).targets(batch, torch.full((8,), 10.0))
    ended = [1 + 0.9 * 2 + 8.1, 2 + 0.9 * 3 + 8.1, 3 + 0.9 * 4, 4.0]
    cut = [5 + 0.9 * 6 + 8.1, 6 + 0.9 * 7 + 8.1, 7 + 0.9 * 8 + 8.1, 8 + 9.0]
    assert y.tolist() == pytest.approx(ended + cut)
    # The last chunk of the cut episode is half a chunk; that of the ended one is complete in effect.
    assert whole_chunks(batch, spec).tolist() == [1, 1, 1, 1, 1, 1, 1, 0]


def test_without_the_last_observation_the_last_chunk_that_counts_ends_one_step_earlier():
    spec, batch = batch_of(two_episodes(has_final=False), chunk=2)
    assert batch.reward.tolist() == pytest.approx([2.8, 4.7, 6.6, 4.0, 10.4, 12.3, 7.0])
    assert whole_chunks(batch, spec).tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_which_chunks_count_does_not_hang_on_the_discount():
    for gamma in (0.5, 1.0):
        spec, batch = batch_of(two_episodes(has_final=False), chunk=2, gamma=gamma)
        assert whole_chunks(batch, spec).tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_a_masked_step_ends_the_return_of_a_chunk_of_3_and_the_chunk_counts():
    spec, batch = batch_of(two_episodes(mask=[True, False, True, True]), chunk=3)
    assert batch.reward[:2].tolist() == pytest.approx([1 + 0.9 * 2, 2.0])
    assert batch.discount[:2].tolist() == [0, 0]
    assert whole_chunks(batch, spec).tolist() == [1, 1, 1, 1, 1, 1, 0, 0]


def test_chunks_of_1_all_count():
    spec, batch = batch_of(two_episodes(), chunk=1)
    assert whole_chunks(batch, spec).tolist() == [1] * 8
    assert batch.discount.tolist() == pytest.approx([0.9, 0.9, 0.9, 0, 0.9, 0.9, 0.9, 0.9])


def test_chunks_that_do_not_count_have_no_effect_on_the_loss():
    episodes = two_episodes()
    spec, batch = batch_of(episodes, chunk=2)
    critics = critics_for(episodes, spec)
    q = critics.critic(critics.cond(batch.obs), batch.action)
    y, weight = critics.targets(batch, torch.zeros(8)), whole_chunks(batch, spec)
    expected = (q[:, :7] - y[:7]).square().sum(0).mean()
    assert critics.loss(q, y, weight).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("name", "value"), [("min", 1.0), ("mean", 2.5), ("lower_bound", -0.5)])
def test_members_4_and_1_say_together_what_the_name_says(name, value):
    spec, _ = batch_of(two_episodes(), chunk=2)
    critic = make_critic(CriticConfig((8,), aggregate=name, rho=2.0), spec, Normalizer.fit(two_episodes()))
    assert critic.aggregate(torch.tensor([[4.0], [1.0]])).item() == pytest.approx(value)


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_the_expectile_of_0_and_1_is_tau(tau):
    v = torch.zeros(1, requires_grad=True)
    for _ in range(300):
        (slope,) = torch.autograd.grad(expectile_loss(torch.tensor([0.0, 1.0]) - v, tau).sum(), v)
        v.data -= 0.1 * slope
    assert v.item() == pytest.approx(tau, abs=1e-4)


def test_a_polyak_share_of_0_25_moves_1_towards_5_to_2():
    target, source = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for module, value in ((target, 1.0), (source, 5.0)):
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, value)
    polyak_update(target, source, 0.25)
    assert [p.item() for p in target.parameters()] == [2.0, 2.0]


@pytest.mark.parametrize("members", [1, 2, 5])
def test_the_actors_loss_is_the_same_for_values_10_times_larger(members):
    x = torch.randn(64, requires_grad=True)
    slopes = []
    for scale in (1.0, 10.0):
        q = scale * torch.stack([(k + 1) * torch.sin(x) + k for k in range(members)])
        loss = climbing_loss(q, torch.Generator().manual_seed(3))
        slopes.append(torch.cat([loss[None], torch.autograd.grad(loss, x)[0]]))
    assert slopes[0][1:].abs().max() > 1e-3
    assert (slopes[0] - slopes[1]).abs().max() < 1e-6


def test_one_member_climbs_and_its_neighbour_sets_the_scale():
    q = torch.tensor([[2.0, 4.0], [-10.0, 20.0]])
    seen = {round(climbing_loss(q, torch.Generator().manual_seed(s)).item(), 4) for s in range(20)}
    assert seen == {round(-3 / 15, 4), round(-5 / 3, 4)}


def test_a_critic_that_diverges_is_one_sentence_that_says_what_to_do():
    episodes = two_episodes()
    spec, batch = batch_of(episodes, chunk=2)
    critics = critics_for(episodes, spec)
    critics.update(batch, torch.full((8,), 12.3 / (1 - 0.81)))  # as much as these rewards could return
    critics.check(100)
    for value in (1e5, float("nan")):
        critics.update(batch, torch.full((8,), value))
        with pytest.raises(TrainingError, match=r"diverged at step 200: .* lower --td.learning-rate"):
            critics.check(200)


def test_values_that_leave_on_both_sides_diverge_too():
    spec, batch = batch_of(two_episodes(), chunk=2)
    critics = critics_for(two_episodes(), spec)
    critics.update(batch, 1e5 * torch.tensor([1.0, -1, 0, 0, 1, -1, 0, 0]))  # ended chunks have none
    with pytest.raises(TrainingError, match="diverged"):
        critics.check(1)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_resumed_run_knows_the_largest_reward_of_either_sign(sign):
    spec, batch = batch_of(two_episodes(), chunk=2)
    critics, resumed = critics_for(two_episodes(), spec), critics_for(two_episodes(), spec)
    critics.update(replace(batch, reward=sign * batch.reward), torch.zeros(8))
    resumed.load_state_dict(critics.state_dict())
    assert float(resumed.largest_reward) == float(critics.largest_reward) == pytest.approx(7 + 0.9 * 8)


def test_the_gradient_is_clipped_where_the_settings_say_so():
    spec, batch = batch_of(two_episodes(), chunk=2)
    for limit in (None, 0.01):
        critics = critics_for(two_episodes(), spec, grad_clip=limit)
        critics.update(batch, torch.full((8,), 100.0))
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in critics.critic.parameters()]))
        assert norm > 1 if limit is None else norm == pytest.approx(limit, rel=1e-3)


def test_small_rewards_allow_small_values():
    """Chunks of at most 0.142 (7 and 0.9 times 8, in hundredths) return 0.747 at most; ten times that and 10: 17.5."""
    episodes = two_episodes()
    spec, batch = batch_of(episodes, chunk=2)
    critics = critics_for(episodes, spec)
    critics.update(replace(batch, reward=batch.reward / 100), torch.zeros(8))
    critics.magnitude = torch.tensor(17.4)
    critics.check(100)
    critics.magnitude = torch.tensor(17.6)
    with pytest.raises(TrainingError, match=r"average 17\.6 in size and no return of these rewards exceeds 0\.747"):
        critics.check(100)


def test_statistics_of_known_values_are_their_means_and_quantiles():
    episodes = two_episodes()
    spec, batch = batch_of(episodes, chunk=2)
    critics = critics_for(episodes, spec)
    say(critics.target, 3.0, 5.0)
    found = critics.statistics(batch, batch.action)
    assert found.pop("advantage").tolist() == [0.0] * 8
    assert found == pytest.approx(
        {"q_data": 3, "q_policy": 3, "q_spread": 1, "advantage/05": 0, "advantage/50": 0, "advantage/95": 0}
    )


def test_steps_are_compared_where_a_time_limit_hides_at_most_half_of_what_follows():
    """A true end after 4 steps and a time limit of 4: `0.7^(4 - step)` is at most 0.5 before step 3."""
    assert early(two_episodes(), 0.7, every=1).tolist() == [True, True, True, False] * 2
    assert early(two_episodes(), 0.7, every=2).tolist() == [True, False, True, False] * 2
    assert early(two_episodes().select([0]), 0.7, every=1).all()
    assert not early(two_episodes(), 0.9, every=1).any()


def test_critics_that_say_7_of_chunks_that_return_2_8_to_6_6_overestimate_by_the_difference():
    episodes = two_episodes().select([0])
    spec, _ = batch_of(episodes, chunk=2)
    critics = critics_for(episodes, spec)
    say(critics.target, 7.0)
    found = critics.overestimation(episodes, 2, Normalizer.fit(episodes, {"obs": "none"}))
    followed = (1 + GAMMA * (2 + GAMMA * (3 + GAMMA * 4)) + 3 + GAMMA * 4) / 2
    assert found == pytest.approx({"overestimation": 7 - followed, "monte_carlo": followed})


@pytest.mark.parametrize("gamma", [0.7, 0.99])
def test_behind_a_time_limit_the_last_whole_chunk_says_what_would_have_followed(gamma):
    """Rewards 5 to 8, then cut, and every value is 7: `5 + gamma 6 + gamma^2 7` at step 0, `6 + gamma 7` at step 1."""
    episodes = two_episodes().select([1])
    spec, _ = batch_of(episodes, chunk=2)
    critics = critics_for(episodes, spec, gamma=gamma)
    say(critics.target, 7.0)
    found = critics.overestimation(episodes, 1, Normalizer.fit(episodes, {"obs": "none"}))
    if gamma == 0.99:
        assert found == {}
        return
    followed = np.mean([5 + gamma * (6 + gamma * 7), 6 + gamma * 7, 7])
    assert found == pytest.approx({"overestimation": 7 - followed, "monte_carlo": followed})


def test_where_a_mask_ends_the_task_in_the_last_chunk_nothing_is_estimated():
    """Rewards 5 to 8 and a mask at the last: all of it followed, although the recording is one that was cut."""
    episodes = two_episodes(mask=[True, True, True, False]).select([1])
    spec, _ = batch_of(episodes, chunk=2)
    critics = critics_for(episodes, spec, gamma=0.7)
    say(critics.target, 7.0)
    found = critics.overestimation(episodes, 1, Normalizer.fit(episodes, {"obs": "none"}))
    followed = np.mean([5 + 0.7 * (6 + 0.7 * (7 + 0.7 * 8)), 6 + 0.7 * (7 + 0.7 * 8), 7 + 0.7 * 8])
    assert found == pytest.approx({"overestimation": 7 - followed, "monte_carlo": followed})
