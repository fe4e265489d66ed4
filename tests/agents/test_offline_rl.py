"""Offline reinforcement learning on worlds whose answers are known: better than the data, and by the right values."""

from dataclasses import replace
from functools import cache, partialmethod

import numpy as np
import pytest
import torch
from agent_cases import AGENTS, FLOW, GAMMA, MLP, OFFLINE_RL, UNET, WITH_CRITICS, everything, learn, make, shake
from torch._dynamo.utils import counters
from worlds import bandit, chain

from diffpolicy.compiler import why_no_compiler
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Batch
from diffpolicy.errors import SpecError
from diffpolicy.learning.actor_critic import ActorCritic
from diffpolicy.parts import SamplerConfig
from diffpolicy.policy import Policy
from diffpolicy.train import Agent, TrainConfig, train


@pytest.mark.parametrize("name", AGENTS)
def test_of_two_modes_each_agent_takes_the_better_with_0_9_where_imitation_takes_it_with_0_5(name):
    chunk = 2 if name in ("qc", "fql", "idql", "cfgrl", "diffuser") else 1
    steps = 600 if name == "bc" else 250
    episodes = bandit(steps=chunk, gap=5.0)
    agent = make(name, episodes, steps, chunk)
    learn(agent, episodes, steps)
    near = masses(agent)
    assert near[0] + near[1] > 0.9
    if name == "bc":
        assert near[0] == pytest.approx(0.5, abs=0.08)
    else:
        assert near[0] >= 0.9


OTHERWISE = {
    "dql as published": ("dql", 1, 1, {"denoiser": replace(MLP, schedule="vp", prediction="epsilon")}),
    "idql on a linear schedule": ("idql", 1, 1, {"denoiser": replace(MLP, schedule="linear", prediction="sample")}),
    "diffuser of a flow": ("diffuser", 1, 1, {"denoiser": FLOW, "sampler": SamplerConfig("heun", 5)}),
    "edp that plans 4 and executes 2": ("edp", 2, 4, {}),
    "cfgrl that plans 4 and executes 2": ("cfgrl", 2, 4, {}),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_with_other_schedules_predictions_samplers_and_horizons_they_take_the_better_mode_too(case):
    name, chunk, horizon, changes = OTHERWISE[case]
    episodes = bandit(steps=horizon, gap=5.0)
    agent = make(name, episodes, 250, chunk, horizon, **changes)
    learn(agent, episodes, 250)
    assert masses(agent)[0] >= 0.9


def masses(agent: Agent) -> list[float]:
    """Share of the policy's chunks at the better mode, and at the other."""
    _, state = agent.policy().predict(np.zeros((500, 1), np.float32))
    return [float((np.abs(state.chunk[..., 0] - mode) < 0.3).all(-1).mean()) for mode in (0.6, -0.6)]


def test_fqls_student_takes_both_modes_when_being_like_its_teacher_outweighs_the_value():
    episodes = bandit(gap=5.0)
    agent = make("fql", episodes, 400, alpha=1000.0)
    learn(agent, episodes, 400)
    assert masses(agent) == pytest.approx([0.5, 0.5], abs=0.1)


def test_fql_refuses_a_teacher_whose_chunks_no_single_noise_decides_and_to_continue_chunks():
    with pytest.raises(SpecError, match=r"the teacher draws 5 times .* deterministic"):
        make("fql", bandit(count=4), 10, sampler=SamplerConfig("ddpm", 5))
    with pytest.raises(SpecError, match="no chunk that another began"):
        make("fql", bandit(count=4), 10, denoiser=replace(FLOW, max_delay=1))


@cache
def optimal_values(cells: int) -> torch.Tensor:
    """Q of stepping right and left from each place, `(cells, 2)`, by iterating Bellman's equation."""
    return iterate(cells, lambda q: q.max(1))


def iterate(cells: int, value) -> torch.Tensor:
    q = np.zeros((cells, 2))
    for _ in range(500):
        v = value(q)
        q = np.array([[1.0 if c + 1 == cells else GAMMA * v[c + 1], GAMMA * v[max(c - 1, 0)]] for c in range(cells)])
    return torch.from_numpy(q)


def learned_values(agent: ActorCritic, cells: int) -> torch.Tensor:
    cond = torch.eye(cells).repeat_interleave(2, 0)
    action = torch.tensor([1.0, -1.0]).repeat(cells)[:, None, None]
    with torch.no_grad():
        return agent.critics.target.value(cond, action).view(cells, 2).double()


def test_the_closed_form_of_the_chain_is_its_distance():
    expected = [[GAMMA ** (4 - c), GAMMA ** (5 - max(c - 1, 0))] for c in range(5)]
    assert torch.allclose(optimal_values(5), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "changes", "steps"),
    [
        ("dql", {"eta": 20.0}, 600),
        ("dql max-Q", {}, 600),
        ("edp", {"alpha": 100.0}, 600),
        ("qc", {"backup_samples": 16}, 600),
        ("fql", {"alpha": 0.01}, 600),
    ],
)
def test_critics_of_agents_that_improve_reach_the_optimal_values_of_a_chain_of_5_within_2_percent(name, changes, steps):
    episodes = chain()
    agent = make(name, episodes, steps, **changes)
    learn(agent, episodes, steps, batch_size=128)
    assert (learned_values(agent, 5) / optimal_values(5) - 1).abs().max() < 0.02


def test_critics_of_chunks_of_2_reach_the_optimal_values_of_two_steps_of_the_chain_within_2_percent():
    """`r_0 + gamma r_1 + gamma^2 V(s_2)` of each pair of steps from each place; a pair that ends early has no `V`.

    Nobody turns round after the end: of the data's pairs only that one, from place 4, is not known.
    """

    def value(place: int, steps: tuple[float, float]) -> float:
        for k, step in enumerate(steps):
            place = place + 1 if step > 0 else max(place - 1, 0)
            if place == 5:
                return GAMMA**k
        return GAMMA ** (2 + 4 - place)

    episodes, pairs = chain(), [(a, b) for a in (1.0, -1.0) for b in (1.0, -1.0)]
    agent = make("qc", episodes, 1600, chunk=2, backup_samples=16)
    learn(agent, episodes, 1600, batch_size=128)
    cond, chunks = torch.eye(5).repeat_interleave(4, 0), torch.tensor(pairs).repeat(5, 1)[..., None]
    with torch.no_grad():
        found = agent.critics.target.value(cond, chunks).view(5, 4)
    expected = torch.tensor([[value(place, pair) for pair in pairs] for place in range(5)])
    known = torch.ones(5, 4, dtype=torch.bool)
    known[4, pairs.index((1.0, -1.0))] = False
    assert (found / expected - 1)[known].abs().max() < 0.02


def test_max_q_backup_is_the_smallest_of_the_members_best():
    """One member says x, the other 0.2 - x: the best of M samples are max x and 0.2 - min x."""
    episodes = chain(count=10)
    agent = make("dql max-Q", episodes, 10)
    batch = some_batch(agent, episodes)
    noise = agent.actor.noise(5 * 16, torch.Generator().manual_seed(3))
    agent.generator.manual_seed(3)
    agent.critics.target.forward = lambda cond, chunk: torch.stack([chunk[:, 0, 0], 0.2 - chunk[:, 0, 0]])
    found = agent.next_value(batch.next_obs)
    samples = noise.unflatten(1, (5, 16)).unbind(1)  # of the whole batch, one after the other
    x = torch.stack([agent.actor.sample_averaged(batch.next_obs, each)[:, 0, 0] for each in samples])
    assert (x.amax(0) - x.amin(0)).min() > 0.1
    torch.testing.assert_close(found, torch.minimum(x.amax(0), 0.2 - x.amin(0)))


@pytest.mark.parametrize(("name", "tau"), [("idql", 0.7), ("idql", 0.9), ("cfgrl", 0.7)])
def test_implicit_critics_reach_the_expectile_values_of_the_same_chain_within_2_percent(name, tau):
    """The expectile of the data's two actions, taken as often as the data takes them, in place of the maximum."""
    episodes = chain(count=40)
    agent = make(name, episodes, 800, tau=tau)
    batch = everything(agent, episodes)
    place, right = batch.obs["obs"][:, 0].argmax(-1), batch.action[:, 0, 0] > 0
    p = np.array([float(right[place == c].float().mean()) for c in range(5)])

    def expectile(q: np.ndarray) -> np.ndarray:
        share = np.where(q[:, 0] > q[:, 1], p, 1 - p)
        up, down = tau * share, (1 - tau) * (1 - share)
        return (up * q.max(1) + down * q.min(1)) / (up + down)

    for _ in range(800):
        agent.update_critics(batch)
    q = iterate(5, expectile)
    assert (learned_values(agent, 5) / q - 1).abs().max() < 0.02
    known = q - torch.from_numpy(expectile(q.numpy()))[:, None]
    found = agent.statistics(batch)["advantage_over_v"]
    assert (found - known[place, (~right).long()]).abs().max() < 0.02


def test_qc_with_chunks_of_1_has_the_single_step_targets():
    """`r + gamma (1 - terminated) Q_target(s', the best of N actions by Q)`, from the raw arrays of the episodes."""
    episodes = chain(count=20)
    agent = make("qc", episodes, 10, backup_samples=5)  # to act, 8
    batch = everything(agent, episodes)
    for part in (agent.critics.target, agent.actor.model):  # the current actor, not the average
        shake(part)
    noise = agent.actor.noise(len(batch.action), torch.Generator().manual_seed(0), times=5)
    agent.generator.manual_seed(0)
    y = agent.critics.targets(batch, agent.next_value(batch.next_obs))
    row = 0
    for episode in (episodes[i] for i in range(len(episodes))):
        for step in range(len(episode)):
            cond = torch.from_numpy(episode.obs["obs"][step + 1])[None].expand(5, -1)
            with torch.no_grad():
                actions = agent.actor.planner(cond, noise[None, :, row])
                best = agent.critics.critic.value(cond, actions).argmax()
                value = agent.critics.target.value(cond[:1], actions[best : best + 1])
            over = episode.terminated and step + 1 == len(episode)
            assert float(y[row]) == pytest.approx(episode.reward[step] + GAMMA * (not over) * float(value), abs=1e-5)
            row += 1
    assert row == len(batch.action)


@pytest.mark.parametrize("name", ["dql", "edp", "fql"])
def test_the_actor_does_not_change_the_critics_nor_leave_gradients_on_them(name):
    episodes = bandit(count=20)
    agent = make(name, episodes, 10)
    batch = some_batch(agent, episodes)
    agent.critics.update = lambda batch, value: {}
    before = [p.clone() for p in agent.critics.critic.parameters()]
    agent.update(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.critics.critic.parameters(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in agent.critics.critic.parameters())


def test_dqls_actor_takes_the_same_step_when_every_value_is_10_times_larger():
    episodes = bandit(count=20)
    after = []
    for scale in (1.0, 10.0):
        agent = make("dql", episodes, 10)
        agent.critics.update = lambda batch, value: {}
        for parameter in agent.critics.critic.body[-1].parameters():
            parameter.data *= scale
        agent.update(some_batch(agent, episodes))
        after.append(torch.cat([p.detach().flatten() for p in agent.actor.model.parameters()]))
    assert (after[0] - after[1]).abs().max() < 1e-5  # a step moves weights by 3e-3


@pytest.mark.skipif(why_no_compiler() != "", reason=why_no_compiler())
@pytest.mark.parametrize("name", WITH_CRITICS)
def test_compiled_updates_end_where_the_others_do(name, monkeypatch):
    """Both ways are traced, as for every compiler; the code that one of them makes is PyTorch's to test."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    episodes = bandit(count=20)
    sampler = SamplerConfig("ddim" if name == "fql" else "ddpm", 2)
    agents = [make(name, episodes, 10, sampler=sampler, compile=c) for c in (False, True)]
    for agent in agents:
        for _ in range(3):
            agent.update(some_batch(agent, episodes))
    assert counters["stats"]["unique_graphs"] >= 3
    for plain, compiled in zip(*(tensors(agent.state_dict()) for agent in agents), strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=2e-5)


def some_batch(agent: Agent, episodes: Episodes) -> Batch:
    return agent.normalizer.encode(agent.windows(episodes, torch.device("cpu")).gather(torch.arange(16)))


@pytest.mark.parametrize("denoiser", [MLP, UNET], ids=["mlp", "unet1d"])
@pytest.mark.parametrize("name", OFFLINE_RL)
def test_with_a_history_and_chunks_train_4_is_train_2_and_resume_2_and_the_saved_policy_acts_the_same(
    tmp_path, name, denoiser
):
    episodes = bandit(count=30, steps=7)
    agent_type, config = AGENTS[name]
    denoiser = replace(denoiser, obs_embed_dim=4, told_embed_dim=config.denoiser.told_embed_dim)
    config = replace(config, denoiser=denoiser, sampler=SamplerConfig("ddim", 2))
    spec = Spec.from_episodes(episodes, horizon=4, n_obs_steps=2, n_action_steps=3)
    length = TrainConfig(steps=4, batch_size=8, log_every=1, validate_every=4, checkpoint_every=2)

    def run(folder: str, stop: int) -> Agent:
        agent = agent_type(spec, Normalizer.fit(episodes), config, 4, "cpu", 0)
        for step, _metrics in train(agent, episodes, length, tmp_path / folder, {}):
            if step == stop:
                break
        return agent

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4)
    for a, b in zip(tensors(whole.state_dict()), tensors(parts.state_dict()), strict=True):
        assert torch.equal(a, b)
    obs = np.random.default_rng(0).normal(size=(5, 1)).astype(np.float32)
    action, _ = whole.policy().predict(obs)
    loaded = Policy.load(tmp_path / "whole")
    np.testing.assert_array_equal(loaded.predict(obs)[0], action)
    assert (loaded.selection is None) == (name == "decision-diffuser")
    assert loaded.selection is None or loaded.selection.config == config.selection
    assert loaded.guidance == whole.policy().guidance


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in tensors(item)] if isinstance(value, list | tuple) else []
