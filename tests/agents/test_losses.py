"""What each agent's losses and targets are made of, by hand: whose weights, which settings, which samples."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from agent_cases import AGENTS, GAMMA, WITH_CRITICS, everything, make, say
from worlds import bandit, two_episodes

from diffpolicy.data.windows import Batch
from diffpolicy.learning.actor import ActorConfig
from diffpolicy.learning.actor_critic import ActorCritic
from diffpolicy.learning.critics import TdConfig
from diffpolicy.learning.imitator import stratified_times
from diffpolicy.nets.encoder import TOLD
from diffpolicy.parts import CriticConfig, RewardConfig


def without_critics(agent: ActorCritic) -> None:
    """Have an update leave the critics alone."""
    agent.critics.update = lambda batch, value: {}
    agent.next_value = lambda batch_or_obs: None


# --- every agent with critics


@pytest.mark.parametrize("name", WITH_CRITICS)
def test_the_averaged_actor_acts_and_is_validated_and_the_target_critics_choose(name):
    agent = make(name, bandit(10), 10, actor=ActorConfig(ema_decay=0.5))
    policy, averaged, batch = agent.policy(), agent.actor.ema.module, everything(agent, bandit(10))
    assert policy.denoiser is averaged.denoiser and policy.encoder is averaged.encoder
    assert policy.critic is agent.critics.target
    assert agent.actor.ema.max_decay == 0.5
    before = agent.validation_loss(batch)
    for weight in agent.imitator.model.parameters():
        weight.data.zero_()
    assert agent.validation_loss(batch) == before


@pytest.mark.parametrize("name", WITH_CRITICS)
def test_critics_do_not_learn_from_a_next_observation_that_was_not_recorded(name):
    episodes = two_episodes(has_final=False)
    assert len(make(name, episodes, 1).windows(episodes)) == 7


def test_hindsight_is_in_units_of_the_rewards_as_the_data_transforms_them():
    """Returns of 10 and 26: the best and the worst are 1000 apart at a scale of 1000 / 16. A chunk has two steps."""
    episodes = two_episodes()
    agent = make("idql", episodes, 1, chunk=2, td=TdConfig(gamma=GAMMA, rewards=RewardConfig("return_range", shift=1)))
    say(agent.critics.target, 7.0)
    reward = 1000 / 16 * np.array([1, 2, 3, 4]) + 1
    returns = [reward[k:] @ GAMMA ** np.arange(4 - k) for k in range(4)]
    for every in (1, 2):
        followed = np.mean(returns[::every])
        found = agent.hindsight(episodes.select([0]), episodes, every)
        assert found == pytest.approx({"overestimation": 7 - followed, "monte_carlo": followed}, rel=1e-5)


@pytest.mark.parametrize("name", ["bc", "diffuser", *WITH_CRITICS])
def test_a_resumed_run_has_its_own_weight_decay_and_the_moments_of_the_former(name):
    former = make(name, bandit(10), 10)
    former.update(everything(former, bandit(10)))
    imitates = name in ("bc", "diffuser")
    changes = {"weight_decay": 0.5} if imitates else {"actor": replace(former.config.actor, weight_decay=0.5)}
    agent = make(name, bandit(10), 10, **changes)
    agent.load_state_dict(former.state_dict())
    ours, theirs = (each if imitates else each.actor for each in (agent, former))
    assert [group["weight_decay"] for group in ours.optimizer.param_groups] == [0.5]
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(ours.optimizer.state[one]["exp_avg"], theirs.optimizer.state[other]["exp_avg"])


# --- idql and cfgrl


@pytest.mark.parametrize(
    ("aggregate", "rho", "said"), [("min", 1.0, 3.0), ("mean", 1.0, 4.0), ("lower_bound", 2.0, 2.0)]
)
def test_v_learns_from_what_the_target_members_say_together(aggregate, rho, said):
    episodes = two_episodes()
    agent = make("idql", episodes, 10, chunk=2, critic=CriticConfig((8,), aggregate=aggregate, rho=rho))
    say(agent.critics.target, 3.0, 5.0)
    say(agent.critics.critic, -3.0, -5.0)
    say(agent.value.value, 0.0)
    _, advantage = agent.update_critics(everything(agent, episodes))
    assert advantage.tolist() == pytest.approx([said] * 8)


def test_v_does_not_learn_from_the_chunk_that_the_time_limit_cuts():
    """Of eight chunks of two steps the last is one: seven errors of 1, at tau 0.7."""
    episodes = two_episodes()
    agent = make("idql", episodes, 10, chunk=2)
    batch, seen = everything(agent, episodes), []
    agent.value.update = lambda cond, q, weight: (seen.append(weight), ({}, q))[1]
    agent.update_critics(batch)
    assert seen[0].tolist() == [1] * 7 + [0]
    agent = make("idql", episodes, 10, chunk=2)
    say(agent.value.value, 0.0)
    metrics, _ = agent.value.update(agent.critics.cond(batch.obs), torch.tensor([1.0] * 7 + [9]), seen[0])
    assert float(metrics["value_loss"]) == pytest.approx(0.7)


def test_cfgrls_loss_of_the_better_and_of_the_others_add_up_to_that_of_all_and_beta_weighs_the_plain_one():
    norms = []
    for beta in (0.1, 0.2):
        agent = make("cfgrl", bandit(20), 10, beta=beta)
        agent.conditional = lambda batch, better: torch.zeros(())
        norms.append(float(agent.update(everything(agent, bandit(20)))["grad_norm"]))
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)
    agent = make("cfgrl", bandit(20), 10)
    batch, better = everything(agent, bandit(20)), torch.arange(20) % 4 == 1

    def loss(of: torch.Tensor) -> float:
        agent.generator.manual_seed(0)
        return agent.conditional(batch, of).item()

    assert loss(better) + loss(~better) == pytest.approx(loss(better | ~better), rel=1e-5)


# --- dql, edp, fql


@pytest.mark.parametrize("name", ["dql", "dql max-Q", "edp"])
def test_next_actions_are_the_averaged_actors(name):
    values = []
    for spoil in (1.0, 2.0):
        agent = make(name, bandit(10), 10)
        for weight in agent.actor.model.parameters():
            weight.data.mul_(spoil)
        agent.generator.manual_seed(0)
        agent.critics.update = lambda batch, value: (values.append(value), {})[1]
        agent.update(everything(agent, bandit(10)))
    assert torch.equal(*values)


@pytest.mark.parametrize(("name", "weight"), [("dql", "eta"), ("edp", "alpha")])
def test_with_a_weight_of_0_the_actors_step_is_that_of_imitation(name, weight):
    agent, alone = make(name, bandit(20), 10, **{weight: 0.0}), make(name, bandit(20), 10)
    without_critics(agent)
    batch = everything(agent, bandit(20))
    agent.generator.manual_seed(0)
    agent.update(batch)
    alone.generator.manual_seed(0)
    alone.actor.descend(alone.actor.model.loss(batch, alone.generator))
    for ours, theirs in zip(agent.actor.model.parameters(), alone.actor.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_edps_guess_is_of_the_datas_chunk_noised_as_the_schedule_says():
    agent = make("edp", bandit(20), 10)
    batch, seen = everything(agent, bandit(20)), []
    denoiser, generator = agent.actor.model.denoiser, torch.Generator().manual_seed(0)
    denoiser.network.register_forward_pre_hook(lambda network, given: seen.append(given))
    agent.generator.manual_seed(0)
    agent.guess(batch)
    t = stratified_times(20, generator, batch.action.device)
    eps = torch.randn(batch.action.shape, generator=generator)
    alpha, sigma = denoiser.schedule(t[:, None, None])
    torch.testing.assert_close(seen[0][0], alpha * batch.action + sigma * eps)
    assert torch.equal(seen[0][1], t)


@pytest.mark.parametrize("name", ["edp", "fql"])
def test_critics_are_climbed_within_the_box(name):
    agent = make(name, bandit(20), 10)
    without_critics(agent)
    for weight in agent.actor.model.parameters():
        weight.data *= 10
    seen = []
    agent.critics.critic.register_forward_pre_hook(lambda critic, given: seen.append(given[1]))
    agent.update(everything(agent, bandit(20)))
    (chunk,) = seen
    assert chunk.abs().max() == 1


@pytest.mark.parametrize(("normalize", "size"), [(True, 1.0), (False, 4.0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_fql_climbs_the_mean_of_the_members_over_its_own_size(normalize, size, sign):
    agent = make("fql", bandit(20), 10, normalize_q=normalize)
    say(agent.critics.critic, 3.0 * sign, 5.0 * sign)
    batch = everything(agent, bandit(20))
    assert agent.q_loss(batch, batch.action).item() == pytest.approx(-sign * size)


# --- diffuser and decision-diffuser


@pytest.mark.parametrize("name", ["decision-diffuser", "diffuser"])
def test_returns_to_go_are_discounted(name):
    episodes = two_episodes()
    agent = make(name, episodes, 10, gamma=0.5)
    rewards = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    g = np.stack([rewards[:, k:] @ 0.5 ** np.arange(4 - k) for k in range(4)], axis=1).flatten()
    wanted = (g - g.mean()) / g.std() if name == "diffuser" else (g - g.min()) / np.ptp(g)
    assert agent.windows(episodes).gather(torch.arange(8)).reward.tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_loss_of_diffusers_value_leaves_encoder_and_denoiser_alone():
    agent = make("diffuser", bandit(20), 10, denoiser=replace(AGENTS["diffuser"][1].denoiser, obs_embed_dim=4))
    model = agent.model
    model.value_loss(everything(agent, bandit(20)), torch.Generator().manual_seed(0)).backward()
    assert all(weight.grad is None for part in (model.encoder, model.denoiser) for weight in part.parameters())
    assert any(weight.grad is not None for weight in model.value.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_decision_diffuser_leaves_the_return_out_as_often_as_it_is_told_to(dropout):
    agent = make("decision-diffuser", bandit(4000), 10, dropout=dropout)
    batch, told = everything(agent, bandit(4000)), []

    def loss(batch: Batch, generator: torch.Generator, bf16: bool) -> torch.Tensor:
        told.append(batch.obs[TOLD])
        return torch.zeros(())

    agent.loss(SimpleNamespace(loss=loss), batch, torch.Generator().manual_seed(0))
    left_out = told[0].isnan()
    assert left_out.float().mean() == pytest.approx(dropout, abs=0.03)
    assert torch.equal(told[0][~left_out], batch.reward[~left_out])
