"""MIP against its formula, and on data where its two regressions are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpolicy.agents.bc import Bc, BcConfig
from diffpolicy.agents.mip import Mip, MipConfig
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.errors import PolicyError, SpecError
from diffpolicy.parts import DenoiserConfig, SamplerConfig
from diffpolicy.tables import settings_for, straightened
from diffpolicy.tasks import TASKS
from diffpolicy.train import TrainConfig, fit

MLP = DenoiserConfig("mlp", hidden_dim=64, depth=2, step_embed_dim=16, schedule="flow", prediction="sample")


def two_bumps(count: int = 200) -> Episodes:
    """One action an episode, 1 in three of four, -1 in the fourth; what is observed is always the same."""
    episodes = []
    for i in range(count):
        action = np.full((1, 1), -1 if i % 4 == 0 else 1, np.float32)
        episodes.append(Episode({"obs": np.zeros((2, 1), np.float32)}, action, np.zeros(1, np.float32), False, True))
    return from_list(episodes)


def make(episodes: Episodes, steps: int = 1, **changes) -> Mip:
    spec = Spec.from_episodes(episodes, horizon=1, n_obs_steps=1, n_action_steps=1)
    normalizer = Normalizer.fit(episodes, {"obs": "none"})
    return Mip(spec, normalizer, MipConfig(MLP, **{"learning_rate": 3e-3, "warmup_steps": 10, **changes}), steps)


def test_the_loss_is_the_papers_sum_of_two_squared_errors_at_0_and_at_0_9_of_the_way():
    agent = make(two_bumps())
    batch = agent.normalizer.encode(agent.windows(two_bumps()).gather(torch.arange(32)))
    network, cond = agent.model.denoiser.network, agent.model.encoder(batch.obs)
    loss = agent.loss(agent.model, batch, torch.Generator().manual_seed(5))
    z = torch.randn(batch.action.shape, generator=torch.Generator().manual_seed(5))
    a, ones = batch.action, torch.ones(32)
    first = network(torch.zeros_like(a), ones, cond)
    second = network(0.9 * a + 0.1 * z, 0.1 * ones, cond)
    assert torch.allclose(loss, (first - a).square().mean() + (second - a).square().mean())


def test_it_acts_by_the_second_regression_fed_0_9_of_the_first_whatever_the_noise():
    agent = make(two_bumps())
    policy, cond = agent.policy(), torch.tensor([[0.3], [-0.2]])
    network, ones = policy.denoiser.network, torch.ones(2)
    first = network(torch.zeros(2, 1, 1), ones, cond).clamp(-1, 1)
    second = network(0.9 * first, 0.1 * ones, cond).clamp(-1, 1)
    for seed in (0, 1):
        noise = torch.randn((1, 2, 1, 1), generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(policy.planner(cond, noise), second)
    assert policy.planner.evaluations == 2
    assert torch.allclose(policy.with_sampler(SamplerConfig("mip", 1)).planner(cond, noise), first)


def test_trained_its_two_regressions_are_the_mean_and_the_posterior_mean_of_the_data():
    """Of +-1 with weights 3/4 and 1/4: E[a] = 0.5, and E[a | 0.9 a + 0.1 z = 0.45] = 1 to 1e-35."""
    episodes = two_bumps()
    agent = make(episodes, 300)
    for _ in fit(agent, agent.windows(episodes), TrainConfig(steps=300, batch_size=64)):
        pass
    policy, cond = agent.policy(), torch.zeros(1, 1)
    noise = torch.zeros(1, 1, 1, 1)
    regression = policy.with_sampler(SamplerConfig("mip", 1)).planner(cond, noise)
    assert (regression - 0.5).abs() < 0.05
    assert (policy.planner(cond, noise) - 1.0).abs() < 0.1


def test_what_is_not_its_own_is_refused():
    episodes = two_bumps(8)
    policy = make(episodes).policy()
    for sampler in (SamplerConfig("ddim", 10), SamplerConfig("euler", 2), SamplerConfig("one_step", 1)):
        with pytest.raises(PolicyError, match="choose from mip"):
            policy.with_sampler(sampler)
    with pytest.raises(PolicyError, match="at most 2 steps, not 3"):
        policy.with_sampler(SamplerConfig("mip", 3))
    with pytest.raises(SpecError, match="leave out --flow"):
        MipConfig(DenoiserConfig("mlp"))
    with pytest.raises(SpecError, match=r"leave out --denoiser\.max-delay"):
        MipConfig(replace(MLP, max_delay=1))
    with pytest.raises(SpecError, match="not trained for the sampler 'mip'"):
        Bc(policy.spec, policy.normalizer, BcConfig(MLP, SamplerConfig("mip", 2)), 1)
    with pytest.raises(SpecError, match="choose from mip"):
        make(episodes, sampler=SamplerConfig("ddim", 2))


def test_a_tasks_preset_serves_mip_and_distillation_with_the_network_and_training_of_its_imitation():
    preset = TASKS["pointmaze-umaze"].preset
    bc, mip, distill = (settings_for(name, preset) for name in ("bc", "mip", "distill"))
    assert mip.denoiser == replace(bc.denoiser, schedule="flow", prediction="sample")
    assert (mip.sampler, distill.sampler) == (SamplerConfig("mip", 2), SamplerConfig("one_step", 1))
    for name in ("learning_rate", "betas", "weight_decay", "warmup_steps", "ema_power"):
        assert getattr(mip, name) == getattr(bc, name)
    assert distill.learning_rate == pytest.approx(0.4 * bc.learning_rate)
    flow = straightened(bc)
    assert (flow.denoiser.schedule, flow.denoiser.prediction, flow.sampler) == (
        "flow",
        "flow",
        SamplerConfig("euler", 10),
    )
