"""Agents whose policy is guided when it acts: what the weight does, what is learned for it, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from agent_cases import AGENTS, everything, learn, make
from worlds import bandit, chain

from diffpolicy.agents.cfgrl import Cfgrl
from diffpolicy.agents.diffuser import ValuedImitator
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.diffusion.exact import Mixture
from diffpolicy.errors import PolicyError, SpecError
from diffpolicy.guides import ClassifierFreeGuidance, ValueGuidance
from diffpolicy.learning.critics import TdConfig
from diffpolicy.nets.encoder import TOLD
from diffpolicy.parts import DenoiserConfig, SelectionConfig
from diffpolicy.policy import Policy
from diffpolicy.train import Agent


@pytest.fixture(scope="module", params=["cfgrl", "diffuser", "decision-diffuser"])
def trained(request) -> tuple[str, Agent, Episodes]:
    episodes = bandit(gap=5.0)
    agent = make(request.param, episodes, 250)
    learn(agent, episodes, 250)
    return request.param, agent, episodes


def good_share(policy: Policy) -> float:
    """How much of its mass a policy of the bandit has near 0.6, of 400 episodes."""
    _, state = policy.predict(np.zeros((400, 1), np.float32))
    return float((np.abs(state.chunk[:, 0, 0] - 0.6) < 0.3).mean())


def test_the_more_weight_the_more_mass_on_the_better_mode_from_what_imitation_has_to_all(trained):
    name, agent, _ = trained
    policy = agent.policy().with_sampler(replace(agent.policy().sampler_config, temperature=1.0))
    share = [good_share(policy.with_guidance(weight=w)) for w in (0.0, 0.4, 1.0, 2.0)]
    assert share[0] == pytest.approx(0.5, abs=0.15)
    assert all(a <= b + 0.02 for a, b in pairwise(share))
    assert share[1] - share[0] > 0.1
    assert share[-1] > 0.95
    if name == "diffuser":  # e^(w G) with G of 1 and -1
        assert share[2] == pytest.approx(np.exp(2) / (1 + np.exp(2)), abs=0.05)


def test_diffuser_says_how_much_better_its_chunks_are_than_the_datas():
    """Returns of the two modes are 1 and -1 in standard deviations: 0 on average, and 1 of the better."""
    episodes = bandit(gap=5.0)
    agent = make("diffuser", episodes, 250)
    learn(agent, episodes, 250)
    found = agent.statistics(agent.normalizer.encode(agent.windows(episodes).gather(torch.arange(600))))
    assert (found["q_data"], found["q_policy"]) == pytest.approx((0.0, 1.0), abs=0.1)
    assert found["advantage"].mean() == pytest.approx(found["q_data"] - found["q_policy"], abs=1e-5)


def test_with_weight_0_it_is_the_unconditional_policy_and_with_1_the_conditional_to_the_bit(trained):
    name, agent, _ = trained
    policy = agent.policy()
    obs, noise = torch.zeros(20, 1, 1), torch.randn(policy.draws(), 20, 1, 1)
    with torch.inference_mode():
        cond = policy.encoder({"obs": obs})
        free = policy._planner(policy.denoiser)(cond, noise)
    if name != "diffuser":
        with torch.inference_mode():
            cond = policy.encoder({"obs": obs, TOLD: torch.full((20,), policy.guidance.goal)})
            told = policy.normalizer.decode_action(policy._planner(policy.denoiser)(cond, noise))
        assert torch.equal(policy.with_guidance(weight=1.0).plan({"obs": obs}, noise), told)
        assert (told - free).abs().max() > 0.1
    plan = policy.with_guidance(weight=0.0).plan({"obs": obs}, noise)
    assert torch.equal(plan, policy.normalizer.decode_action(free))


def test_the_weight_chosen_when_acting_is_saved_with_the_policy(trained, tmp_path):
    name, agent, _ = trained
    policy = agent.policy().with_guidance(weight=1.7, goal=0.8 if name == "decision-diffuser" else None)
    loaded = Policy.load(policy.save(tmp_path / "policy"))
    obs = np.zeros((20, 1), np.float32)
    np.testing.assert_array_equal(loaded.predict(obs)[0], policy.predict(obs)[0])
    assert loaded.guidance == policy.guidance
    assert loaded.guidance.weight == 1.7
    assert np.abs(loaded.with_guidance(weight=0.0).predict(obs)[0] - policy.predict(obs)[0]).max() > 0.1
    if name == "cfgrl":
        with pytest.raises(SpecError, match="knows only better, 1; give it a weight alone"):
            loaded.with_guidance(goal=0.8)
    if name == "diffuser":
        assert (loaded.guidance.until, loaded.planner.draws) == (0.1, policy.sampler_config.steps)
        with pytest.raises(SpecError, match="climbs a value; give it a weight alone"):
            loaded.with_guidance(goal=1.0)
        assert good_share(loaded.with_guidance(weight=0.0).with_selection(SelectionConfig(8))) > 0.95


def test_asked_for_the_lowest_return_decision_diffuser_takes_the_worse_mode():
    episodes = bandit(gap=5.0)
    agent = make("decision-diffuser", episodes, 250)
    learn(agent, episodes, 250)
    assert good_share(agent.policy().with_guidance(goal=0.0)) < 0.02
    returns = agent.windows(episodes).gather(torch.arange(600)).reward
    assert returns.unique().tolist() == [0.0, 1.0]


def test_told_of_whole_episodes_each_step_of_decision_diffuser_has_the_return_of_its_episode():
    rewards = [[1.0, 0, 0], [0.0, 5], [2.0, 2, 1, 6]]
    episodes = from_list(
        [Episode({"obs": np.zeros((len(r) + 1, 1))}, np.ones((len(r), 1)), np.array(r), True, False) for r in rewards]
    )
    agent = make("decision-diffuser", episodes, 1, whole_episode=True)
    told = agent.windows(episodes).gather(torch.arange(9)).reward
    assert told.tolist() == pytest.approx([0.0] * 3 + [0.4] * 2 + [1.0] * 4)


def test_the_value_of_noised_chunks_is_the_expected_return_of_the_bandit_given_the_noised_action():
    """`E[G | x_t] = p(0.6 | x_t) - p(-0.6 | x_t)` with the standardised returns 1 and -1."""
    episodes = bandit(count=1000, gap=5.0)
    agent = make("diffuser", episodes, 500)
    learn(agent, episodes, 500, batch_size=128)
    model, normalizer = agent.ema.module, agent.normalizer
    assert isinstance(model, ValuedImitator)
    modes, std = normalizer["action"].encode(torch.tensor([[[0.6]], [[-0.6]]])), 0.05 * normalizer["action"].scale
    mixture, x_t = Mixture(model.denoiser.schedule, modes, float(std)), torch.linspace(-2, 2, 81)
    for time in (0.05, 0.3, 0.5, 0.7, 0.9):
        good, bad = densities(mixture, x_t, time).unbind(1)
        value = model.value.noised(x_t.view(81, 1, 1), torch.full((81,), time), torch.zeros(81, 1)).detach()
        seen = good + bad
        error = (value - (good - bad) / seen.clamp(min=1e-12)).abs()
        assert (error * seen).sum() / seen.sum() < 0.1


def test_diffusers_values_are_the_returns_of_what_they_learned_from_and_with_0_3_added_overestimate_by_that():
    """Steps 0 and 2 of walks of 4 are looked at; their G is on average above that of all steps, 0."""
    steps, actions = np.arange(4), np.random.default_rng(0).uniform(-1, 1, (400, 4, 1))
    walks = [Episode({"obs": np.arange(5.0)[:, None]}, walk, walk[:, 0] + 1, False, True) for walk in actions]
    episodes = from_list(walks)
    agent = make("diffuser", episodes, 400, gamma=0.5)
    learn(agent, episodes, 400, batch_size=128)
    reward = np.asarray(episodes.reward, dtype=np.float64).reshape(400, 4)
    returns = np.stack([reward[:, k:] @ 0.5 ** steps[: 4 - k] for k in steps], axis=1)
    standard = (returns - returns.mean()) / returns.std()
    found = agent.hindsight(episodes, episodes, 2)
    assert found["monte_carlo"] == pytest.approx(standard[:, [0, 2]].mean()) and found["monte_carlo"] > 0.1
    assert abs(found["overestimation"]) < 0.1
    agent.ema.module.value.body[-1].bias.data += 0.3
    assert agent.hindsight(episodes, episodes, 2)["overestimation"] - found["overestimation"] == pytest.approx(0.3)


def densities(mixture: Mixture, x_t: torch.Tensor, time: float) -> torch.Tensor:
    """Of `x_t (B,)` under each component, `(B, M)`, up to a factor."""
    alpha, sigma = mixture.schedule(time)
    std = (alpha**2 * mixture.variance + sigma**2).sqrt().flatten()
    return torch.exp(-0.5 * ((x_t[:, None] - alpha * mixture.means.flatten()) / std) ** 2)


def test_cfgrl_tells_o_for_the_better_actions_alone_and_nothing_of_the_others_reaches_its_loss():
    episodes = bandit(count=20)
    agent = make("cfgrl", episodes, 10)
    assert isinstance(agent, Cfgrl)
    batch, better = everything(agent, episodes), torch.arange(20) % 2 == 1
    losses = []
    for action in (batch.action, torch.where(better[:, None, None], batch.action, 0.123)):
        agent.generator.manual_seed(0)
        losses.append(agent.conditional(replace(batch, action=action), better).item())
    assert losses[0] == losses[1] > 0
    assert agent.conditional(batch, torch.zeros(20, dtype=torch.bool)).item() == 0


def test_of_a_chunk_cut_short_cfgrl_says_nothing():
    episodes = replace(bandit(count=20, steps=3), terminated=np.zeros(20, bool), truncated=np.ones(20, bool))
    agent = make("cfgrl", episodes, 10, chunk=3)
    told = []
    agent.conditional = lambda batch, better: (told.append(better), batch.action.sum() * 0)[1]
    for bias in agent.value.value.body[-1].parameters():
        torch.nn.init.constant_(bias, -100.0)  # every action is better than expected
    agent.losses(everything(agent, episodes))
    assert told[0].view(20, 3).sum(0).tolist() == [20, 0, 0]


def test_impossible_guidance_is_refused_in_one_sentence():
    for build, words in (
        (lambda: ClassifierFreeGuidance(weight=-1.0), "weight of the guidance is -1.0; give a finite number"),
        (lambda: ValueGuidance(weight=float("nan")), "weight of the guidance is nan"),
        (lambda: ClassifierFreeGuidance(goal=float("inf")), "goal of the guidance is inf"),
        (lambda: replace(AGENTS["decision-diffuser"][1], dropout=1.0), "got dropout 1.0"),
        (lambda: make("cfgrl", bandit(4), 1, denoiser=DenoiserConfig("mlp")), "--denoiser.told-embed-dim"),
    ):
        with pytest.raises(SpecError, match=words) as error:
            build()
        assert "\n" not in str(error.value)
    with pytest.raises(PolicyError, match="no guidance to weigh"):
        make("bc", bandit(4), 1).policy().with_guidance(weight=2.0)


def test_idqls_critics_of_the_mean_overestimate_a_random_walk_by_nothing_and_with_0_3_added_by_nearly_that():
    """With tau 0.5 their values are those of the data's own actions: what follows them is what they say, on average."""
    episodes = chain(count=200)
    agent = make("idql", episodes, 250, tau=0.5, td=TdConfig(gamma=0.5, polyak=0.05, learning_rate=2e-3))
    for batch in [everything(agent, episodes)] * 250:
        agent.update_critics(batch)
    found = agent.hindsight(episodes, episodes, 1)
    assert found["monte_carlo"] > 0.05
    assert abs(found["overestimation"]) < 0.01
    agent.critics.target.body[-1].bias.data += 0.3
    more = agent.hindsight(episodes, episodes, 1)["overestimation"] - found["overestimation"]
    assert 0.25 < more < 0.3  # the last chunks of walks that were cut say 0.3 more of what follows, too
