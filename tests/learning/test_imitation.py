"""Imitation: settings reach what they are for, one step of descent, whose weights act."""

import numpy as np
import pytest
import torch
from agent_cases import everything, small_bc
from test_train import make_episodes

from diffpolicy.learning.imitator import stratified_times


def test_what_acts_and_what_is_validated_is_the_average_of_the_weights():
    episodes = make_episodes()
    agent = small_bc(episodes, learning_rate=0.1, warmup_steps=0)
    for _ in range(4):
        agent.update(everything(agent, episodes))
    averaged, raw = agent.ema.module, agent.model
    policy = agent.policy()
    assert policy.denoiser is averaged.denoiser and policy.encoder is averaged.encoder
    batch, g = everything(agent, episodes), lambda: torch.Generator().manual_seed(0)
    with torch.no_grad():
        wanted, other = (agent.loss(m, batch, g()).item() for m in (averaged, raw))
    assert agent.validation_loss(batch) == agent.validation_loss(batch) == wanted != other


def test_settings_of_imitation_reach_the_optimizer_the_average_and_the_policy():
    agent = small_bc(make_episodes(), seed=5, betas=(0.8, 0.9), weight_decay=0.25, ema_power=0.5)
    (group,) = agent.optimizer.param_groups
    assert (group["betas"], group["weight_decay"], agent.ema.power) == ((0.8, 0.9), 0.25, 0.5)
    assert agent.policy().seed == 5


def test_the_gradient_of_an_update_is_shortened_and_its_norm_before_is_told():
    episodes = make_episodes()
    for limit in (1e9, 1e-3):
        agent = small_bc(episodes, grad_clip=limit)
        told = float(agent.update(everything(agent, episodes))["grad_norm"])
        left = torch.nn.utils.get_total_norm([p.grad for p in agent.model.parameters()]).item()
        assert told > 0.01 and left == pytest.approx(min(told, limit), rel=1e-3)


def test_an_update_takes_the_scheduled_rate_from_fresh_gradients_and_then_moves_the_average():
    """AdamW's first step is the rate, up to its epsilon; the average after one update is the weights."""
    episodes = make_episodes()
    agent = small_bc(episodes, steps=100, learning_rate=1e-2, warmup_steps=10, weight_decay=0.0)
    before = [p.clone() for p in agent.model.parameters()]
    batch = everything(agent, episodes)
    assert agent.update(batch)["learning_rate"] == pytest.approx(1e-3)
    moved = max((a - b).abs().max().item() for a, b in zip(before, agent.model.parameters(), strict=True))
    assert moved == pytest.approx(1e-3, rel=0.01)
    for a, b in zip(agent.ema.module.parameters(), agent.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert agent.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_a_gradient_is_of_its_own_batch_alone():
    episodes = make_episodes()
    norms = []
    for updates in (1, 2):
        agent = small_bc(episodes, learning_rate=0.0, weight_decay=0.0)
        state = agent.generator.get_state()
        for _ in range(updates):
            agent.generator.set_state(state)
            norms.append(float(agent.update(everything(agent, episodes))["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] == pytest.approx(norms[2], rel=1e-5)


def test_warm_up_is_at_most_a_tenth_of_a_run():
    agent = small_bc(make_episodes(), steps=100, learning_rate=1.0, warmup_steps=500)
    assert [agent.learning_rate(s) for s in (0, 4, 9, 10, 55)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5])


def test_agents_of_other_seeds_have_other_weights_noise_and_policies_and_leave_the_global_generator_alone():
    episodes = make_episodes()
    state = torch.random.get_rng_state()
    a, b, again = small_bc(episodes, seed=0), small_bc(episodes, seed=1), small_bc(episodes, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    first = [next(p for p in x.model.parameters() if p.ndim > 1) for x in (a, b, again)]
    assert not torch.equal(first[0], first[1]) and torch.equal(first[1], first[2])
    assert not torch.equal(a.generator.get_state(), b.generator.get_state())
    assert (a.policy().seed, b.policy().seed) == (0, 1)


def test_times_are_one_in_each_of_n_equal_parts_in_any_order():
    t = stratified_times(64, torch.Generator().manual_seed(0), torch.device("cpu"))
    place = ((1 - t) / 0.995 * 64).long().tolist()
    assert sorted(place) == list(range(64)) and place != sorted(place)


def test_judged_windows_have_the_number_of_their_first_step_alone():
    episodes, judged = make_episodes(count=2, steps=5), np.arange(10.0)
    windows = small_bc(episodes).judged_windows(episodes, judged, "cpu", np.array([1]))
    assert windows.gather(torch.arange(len(windows))).reward.tolist() == [5, 6, 7, 8, 9]
