"""Training: exact resuming, determinism, honest failure, and learning what is known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from agent_cases import small_bc

from diffpolicy import runs
from diffpolicy.agents.bc import Bc, BcConfig
from diffpolicy.compiler import why_no_compiler
from diffpolicy.data.episodes import Episode, Episodes, from_list, split
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.order import Order, WeightedOrder
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows
from diffpolicy.errors import DatasetError, PolicyError, SpecError, TrainingError
from diffpolicy.learning.descent import clip_gradient
from diffpolicy.nets.norm import GroupNormMish
from diffpolicy.parts import DenoiserConfig, SamplerConfig
from diffpolicy.policy import Policy
from diffpolicy.train import TrainConfig, evaluate_meanwhile, fit, train, validate

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TINY = DenoiserConfig(down_dims=(16, 32), kernel_size=3, step_embed_dim=16)


def make_episodes(seed: int = 0, count: int = 6, steps: int = 20) -> Episodes:
    """Action = a linear map of the observation."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(count):
        obs = rng.uniform(-1, 1, size=(steps + 1, 2)).astype(np.float32)
        action = obs[:-1] @ np.array([[0.5, -1.0], [0.25, 0.5]], dtype=np.float32)
        episodes.append(Episode({"obs": obs}, action, np.zeros(steps, np.float32), False, True))
    return from_list(episodes)


def make_agent(episodes: Episodes, steps: int, device: str = "cpu", config: BcConfig | None = None) -> Bc:
    spec = Spec.from_episodes(episodes, horizon=4, n_obs_steps=1, n_action_steps=2)
    return Bc(spec, Normalizer.fit(episodes), config or BcConfig(TINY), steps, device, seed=0)


def run(agent: Bc, episodes: Episodes, config: TrainConfig, folder, stop: int | None = None) -> None:
    for step, _ in train(agent, episodes, config, folder, {}):
        if step == stop:
            return


def test_train_40_equals_train_20_and_resume_20_to_the_bit(tmp_path):
    episodes = make_episodes()
    config = TrainConfig(steps=40, batch_size=16, log_every=10, validate_every=20, checkpoint_every=20)
    run(make_agent(episodes, 40), episodes, config, tmp_path / "whole")
    run(make_agent(episodes, 40), episodes, config, tmp_path / "parts", stop=20)
    run(make_agent(episodes, 40), episodes, config, tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint" / "state.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert whole["step"] == parts["step"] == 40
    assert whole["ema"]["updates"] == parts["ema"]["updates"] == 40
    for key in ("model", "ema", "optimizer", "generator"):
        assert repr_tensors(whole[key]) == repr_tensors(parts[key])
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for a, b in zip(*lines, strict=True):
        assert {k: v for k, v in a.items() if k != "samples_per_s"} == {
            k: v for k, v in b.items() if k != "samples_per_s"
        }


def repr_tensors(value: object) -> object:
    """Nested containers with tensors as bytes, which compare exactly."""
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy().tobytes()
    if isinstance(value, dict):
        return {k: repr_tensors(v) for k, v in value.items()}
    return [repr_tensors(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow"])
def test_every_prediction_learns_a_linear_policy_to_an_error_of_0_1(device, prediction):
    torch.manual_seed(0)
    episodes = make_episodes(count=20)
    denoiser = DenoiserConfig(network="mlp", hidden_dim=64, depth=2, step_embed_dim=16, prediction=prediction)
    config = BcConfig(denoiser, SamplerConfig("ddim", 10), learning_rate=3e-3, warmup_steps=50)
    spec = Spec.from_episodes(episodes, horizon=1, n_obs_steps=1, n_action_steps=1)
    agent = Bc(spec, Normalizer.fit(episodes), config, 600, device)
    for _ in fit(agent, Windows(episodes, spec, device=device), TrainConfig(steps=600, batch_size=128)):
        pass
    held_out = make_episodes(seed=1)
    obs = np.concatenate([held_out[i].obs["obs"][:-1] for i in range(len(held_out))])
    action, _ = agent.policy().predict(obs)
    assert np.abs(action - held_out.action).mean() < 0.1


def test_each_epoch_shows_every_window_once_and_orders_differ():
    order = Order(n=50, batch_size=8, seed=0)
    seen = torch.cat([order(step) for step in range(50)])
    for epoch in range(8):
        assert sorted(seen[epoch * 50 : (epoch + 1) * 50].tolist()) == list(range(50))
    assert not torch.equal(seen[:50], seen[50:100])
    assert torch.equal(Order(50, 8, 0)(31), order(31))
    assert not torch.equal(Order(50, 8, 1)(31), order(31))


def test_a_run_goes_on_with_other_settings_and_keeps_those_it_had_but_not_with_other_data(tmp_path):
    episodes, rates = make_episodes(), (1e-3, 2e-3, 2e-3)
    for steps, rate in zip((4, 8, 12), rates, strict=True):
        config = BcConfig(TINY, learning_rate=rate)
        agent = make_agent(episodes, 12, config=config)
        for _ in train(agent, episodes, TrainConfig(steps=steps, batch_size=4), tmp_path, {"rate": rate}):
            pass
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["rate"] == 2e-3
    (resumed,) = found["resumed"]
    assert (resumed["step"], resumed["before"]["rate"]) == (4, 1e-3)
    other, before = make_episodes(seed=1), (tmp_path / "policy.safetensors").read_bytes()
    with pytest.raises(DatasetError, match="resume with the same data"):
        next(train(make_agent(other, 20), other, TrainConfig(steps=20), tmp_path, {}))
    assert (tmp_path / "policy.safetensors").read_bytes() == before


@pytest.mark.parametrize(("every", "steps"), [((3, 4, 5, 7), 12), ((50, 50, 50, 50), 6), ((1, 2, 2, 0), 3)])
def test_what_is_due_happens_at_its_own_steps_and_at_the_last(tmp_path, every, steps):
    log, validate, checkpoint, evaluate = every
    config = TrainConfig(
        steps=steps,
        batch_size=4,
        log_every=log,
        validate_every=validate,
        checkpoint_every=checkpoint,
        evaluate_every=evaluate,
    )
    episodes, played, saved = make_episodes(), [], []
    agent = make_agent(episodes, steps)

    def play(policy: Policy, count: int) -> Episodes:
        played.append(agent.step)
        return episodes

    state = tmp_path / "checkpoint" / "state.pt"
    validated = []
    for step, metrics in train(agent, episodes, config, tmp_path, {}, play):
        validated += [step] if "validation/loss" in metrics else []
        saved += [step] if state.exists() and torch.load(state, weights_only=True)["step"] == step else []

    def due(interval: int) -> list[int]:
        return [step for step in range(1, steps + 1) if interval and (step % interval == 0 or step == steps)]

    assert (validated, saved, played) == (due(validate), due(checkpoint), due(evaluate))


def test_the_policy_that_played_best_is_kept_apart_from_the_last(tmp_path):
    episodes, obs, played = make_episodes(), np.full((9, 2), 0.2, np.float32), []

    def play(policy: Policy, count: int) -> Episodes:
        """Return 1, 3, 2 and 3 in all."""
        played.append(policy.predict(obs)[0])
        episode = episodes[0]
        return from_list(
            [replace(episode, reward=np.eye(len(episode), dtype=np.float32)[0] * [1, 3, 2, 3][len(played) - 1])]
        )

    config = TrainConfig(steps=40, batch_size=16, log_every=10, evaluate_every=10, checkpoint_every=10)
    agent = make_agent(episodes, 40, config=BcConfig(TINY, warmup_steps=0))
    for _ in train(agent, episodes, config, tmp_path, {"arguments": {}}, play):
        pass
    assert json.loads((tmp_path / "best" / "evaluation.json").read_text())["step"] == 20
    found = [Policy.load(folder).predict(obs)[0] for folder in (tmp_path / "best", tmp_path)]
    np.testing.assert_array_equal(found[0], played[1])
    assert not np.array_equal(found[0], found[1])
    assert (tmp_path / "best" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_a_loss_that_is_not_a_number_stops_the_run_and_saves_its_batch(tmp_path):
    episodes = make_episodes()
    agent = make_agent(episodes, 10)
    with torch.no_grad():
        next(agent.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="not a number at step 1"):
        list(fit(agent, Windows(episodes, agent.spec), TrainConfig(steps=10, batch_size=8), tmp_path))
    with np.load(tmp_path / "nan_batch.npz", allow_pickle=False) as batch:
        assert batch["action"].shape == (8, 4, 2)
        assert batch["obs.obs"].shape == (8, 1, 2)


def test_a_gradient_that_is_infinite_stops_the_run_before_its_weights_are_saved(tmp_path):
    """The weights are spoilt one step before any loss is."""
    episodes = make_episodes()
    agent = make_agent(episodes, 10)
    config = TrainConfig(steps=10, batch_size=8, log_every=3, checkpoint_every=3)
    weight = next(agent.model.parameters())
    weight.register_hook(lambda gradient: gradient * (float("inf") if agent.step == 5 else 1))
    with pytest.raises(TrainingError, match="its gradient became not a number at step 6"):
        run(agent, episodes, config, tmp_path)
    assert all(torch.isfinite(p).all() for p in Policy.load(tmp_path).denoiser.parameters())
    restored = make_agent(episodes, 10)
    run(restored, episodes, config, tmp_path)
    assert restored.step == 10


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_a_gradient_longer_than_the_limit_is_shortened_to_it_and_another_is_left(limit):
    ours, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    for module in (ours, theirs):
        module.weight.grad = torch.arange(6.0).view(2, 3)  # the bias has none
    norm = clip_gradient(ours, limit)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit))
    assert norm == pytest.approx(55**0.5) and ours.bias.grad is None
    assert ours.weight.grad.norm() == pytest.approx(min(limit, 55**0.5), rel=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.skipif(why_no_compiler() != "", reason=why_no_compiler())
def test_a_compiled_training_ends_where_the_other_does(tmp_path):
    episodes, config = make_episodes(), TrainConfig(steps=5, batch_size=16)
    agents = [make_agent(episodes, 5, config=BcConfig(TINY, warmup_steps=0, compile=c)) for c in (False, True)]
    for agent, name in zip(agents, ("plain", "compiled"), strict=True):
        run(agent, episodes, config, tmp_path / name)
        assert all(norm.fused == (name == "compiled") for norm in norms_of(agent))
    for plain, compiled in zip(*(agent.model.parameters() for agent in agents), strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=2e-5)


def norms_of(agent: Bc) -> list[GroupNormMish]:
    return [module for module in agent.model.modules() if isinstance(module, GroupNormMish)]


def test_compiling_without_a_compiler_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr("diffpolicy.compiler.shutil.which", lambda name: None)
    with pytest.raises(SpecError, match="needs a C\\+\\+ compiler and finds no"):
        make_agent(make_episodes(), 5, config=BcConfig(TINY, compile=True))


def test_a_checkpoint_of_another_network_is_refused_in_one_sentence(tmp_path):
    episodes = make_episodes()
    config = TrainConfig(steps=2, batch_size=8)
    run(make_agent(episodes, 2), episodes, config, tmp_path)
    (tmp_path / "config.json").write_text("what made it")
    other = make_agent(episodes, 2, config=BcConfig(DenoiserConfig(down_dims=(8, 16), kernel_size=3)))
    with pytest.raises(PolicyError, match="cannot be resumed") as error:
        run(other, episodes, config, tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_text() == "what made it"


def test_padded_actions_do_not_count_in_the_loss():
    episodes = make_episodes(count=1, steps=3)
    agent = make_agent(episodes, 10)
    batch = agent.normalizer.encode(Windows(episodes, agent.spec).gather(torch.tensor([2])))
    assert batch.valid.tolist() == [[True, False, False, False]]
    total = agent.loss(agent.model, batch, seeded()).item()
    t = 1 - 0.995 * torch.rand(1, generator=after_permutation(seeded()))
    eps = torch.randn(batch.action.shape, generator=advanced(seeded()))
    elementwise = agent.model.denoiser.loss(batch.action, t, eps, agent.model.encoder(batch.obs))
    assert total == pytest.approx(elementwise[0, 0].mean().item(), rel=1e-5)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def after_permutation(generator: torch.Generator) -> torch.Generator:
    torch.randperm(1, generator=generator)
    return generator


def advanced(generator: torch.Generator) -> torch.Generator:
    torch.rand(1, generator=after_permutation(generator))
    return generator


def test_learning_rate_warms_up_to_its_peak_and_ends_at_zero():
    agent = make_agent(make_episodes(), 1000, config=BcConfig(TINY, learning_rate=1.0, warmup_steps=100))
    assert [agent.learning_rate(s) for s in (0, 49, 99, 100)] == pytest.approx([0.01, 0.5, 1.0, 1.0])
    assert agent.learning_rate(550) == pytest.approx(0.5)
    assert agent.learning_rate(1000) == pytest.approx(0.0)


def marked(count: int = 10) -> Episodes:
    """Episodes of 4 steps; number i has only the action i."""
    obs = np.random.default_rng(0).uniform(-1, 1, (count, 5, 2)).astype(np.float32)
    actions = [np.full((4, 1), i, np.float32) for i in range(count)]
    none = np.zeros(4, np.float32)
    return from_list([Episode({"obs": o}, a, none, False, True) for o, a in zip(obs, actions, strict=True)])


def test_training_never_sees_a_held_out_episode_and_validation_sees_no_other(tmp_path):
    episodes = marked()
    agent, seen = small_bc(episodes, steps=30), {"trained": set(), "validated": set()}
    action = agent.normalizer["action"]

    def note(name, batch):
        return seen[name].update(action.decode(batch.action)[..., 0].round().int().unique().tolist())

    update, loss, looked = agent.update, agent.validation_loss, []
    agent.hindsight = lambda played, data, every: (
        looked.append((set(played.action[:, 0].tolist()), len(data), every)) or {}
    )
    agent.update = lambda batch: (note("trained", batch), update(batch))[1]
    agent.validation_loss = lambda batch: (note("validated", batch), loss(batch))[1]
    config = TrainConfig(30, batch_size=16, validation_fraction=0.3, validate_every=30, checkpoint_every=30, seed=4)
    list(train(agent, episodes, config, tmp_path, {}))
    kept, held_out = (set(part.tolist()) for part in split(episodes, 0.3, 4))
    assert seen == {"trained": kept, "validated": held_out} and len(held_out) == 3
    assert looked == [(held_out, 10, 1)]


def test_the_order_of_a_run_is_that_of_its_seed():
    episodes, taken = make_episodes(), {}
    for seed in (0, 1):
        agent = small_bc(episodes)
        windows = agent.windows(episodes)
        gather, taken[seed] = windows.gather, []
        windows.gather = lambda index, seed=seed, gather=gather: (taken[seed].append(index), gather(index))[1]
        list(fit(agent, windows, TrainConfig(4, batch_size=8, seed=seed)))
        wanted = Order(len(windows), 8, seed)
        assert all(torch.equal(index, wanted(step)) for step, index in enumerate(taken[seed]))
    assert not torch.equal(taken[0][0], taken[1][0])


def test_the_epochs_of_neighbouring_seeds_are_not_each_others():
    """Seed 1 does not begin with the second epoch of seed 0."""
    assert not torch.equal(Order(50, 50, 0)(1), Order(50, 50, 1)(0))


def test_windows_of_a_weight_are_drawn_by_it_in_a_run():
    episodes = replace(marked(4), weight=np.array([0.0, 0.0, 1.0, 0.0]))
    agent, seen = small_bc(episodes, 5), []
    update = agent.update
    agent.update = lambda batch: (seen.append(agent.normalizer["action"].decode(batch.action)), update(batch))[1]
    list(fit(agent, agent.windows(episodes), TrainConfig(5, batch_size=16)))
    assert (torch.cat(seen) - 2).abs().max() < 1e-4


def test_a_weighted_order_draws_by_windows_anew_at_each_step_and_seed():
    """Episodes of 1 and 3 windows of weights 3 and 1 are drawn as often, and the windows of one alike."""
    rows = [Episode({"obs": np.zeros((n + 1, 1))}, np.zeros((n, 1)), np.zeros(n), True, False) for n in (1, 3)]
    windows = Windows(replace(from_list(rows), weight=np.array([3.0, 1.0])), Spec({"obs": (1,)}, 1, 1, 1, 1))
    order = WeightedOrder(windows, 4000, 0)
    share = np.bincount(order(0), minlength=4) / 4000
    np.testing.assert_allclose(share, [1 / 2, 1 / 6, 1 / 6, 1 / 6], atol=0.04)
    assert not torch.equal(order(0), order(1)) and not torch.equal(order(0), WeightedOrder(windows, 4000, 1)(0))
    assert torch.equal(order(1), WeightedOrder(windows, 4000, 0)(1))


def test_the_weight_of_windows_is_their_own_episodes_where_some_are_left_out():
    episodes = replace(marked(4), weight=np.array([1.0, 2.0, 3.0, 4.0]))
    windows = Windows(episodes, small_bc(episodes).spec, only=np.array([1, 3]))
    assert windows.weight.tolist() == [2.0, 4.0]
    assert windows.rows.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_validations_action_error_is_of_real_actions_alone():
    """Plans are wrong by 0.25 at the first action, by 0.5 at the second, and by 0.5 wherever the chunk is padded."""
    episodes = make_episodes(count=1, steps=6)
    agent = small_bc(episodes)
    windows = agent.windows(episodes)
    batch = windows.gather(torch.arange(6))
    policy, scale = agent.policy(), agent.normalizer["action"].scale
    wrong = torch.where(batch.valid, 0.0, 0.5)
    wrong[:, 0] += 0.25
    wrong[:, 1] += torch.where(batch.valid[:, 1], 0.5, 0.0)

    class Stub:
        normalizer = policy.normalizer
        draw = staticmethod(policy.draw)
        plan = staticmethod(lambda obs, noise: batch.action + wrong[..., None] / scale)

    agent.policy = lambda: Stub
    metrics, _, _ = validate(agent, windows)
    assert metrics["validation/action_error"] == pytest.approx((6 * 0.25 + 5 * 0.5) / 18, rel=1e-4)
    assert [metrics[f"validation/action_error_by_index/{k:02d}"] for k in range(4)] == pytest.approx(
        [0.25, 0.5, 0, 0], abs=1e-5
    )


def test_episodes_played_meanwhile_succeed_if_they_ever_did():
    def one(reward, success):
        return Episode(
            {"obs": np.zeros((4, 2), np.float32)},
            np.zeros((3, 2), np.float32),
            np.array(reward, np.float32),
            False,
            True,
            {"success": np.array(success, np.float32)},
        )

    played = from_list([one([1, 2, 3], [0, 1, 0]), one([1, 1, 1], [0, 0, 0])])
    found = evaluate_meanwhile(small_bc(make_episodes()), played, make_episodes())
    assert found == {"evaluation/return": 4.5, "evaluation/length": 3.0, "evaluation/success": 0.5}


def test_more_successes_are_better_than_a_higher_return_and_equals_keep_the_first(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    agent, kept = small_bc(make_episodes()), []
    for step, (success, value) in enumerate([(0.5, 9.0), (0.6, 1.0), (0.5, 99.0), (0.6, 1.0), (0.6, 2.0)]):
        runs.keep_best(agent, tmp_path, step, {"evaluation/success": success, "evaluation/return": value})
        kept.append(json.loads((tmp_path / "best" / "evaluation.json").read_text())["step"])
    assert kept == [0, 1, 1, 1, 4]


@pytest.mark.parametrize(("step", "there"), [(19, False), (20, True), (21, True)])
def test_a_best_policy_from_beyond_the_checkpoint_is_forgotten_and_no_other(tmp_path, step, there):
    (tmp_path / "config.json").write_text("{}")
    runs.keep_best(small_bc(make_episodes()), tmp_path, 20, {"evaluation/return": 1.0})
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"ste')
    runs.forget_after(tmp_path, step)
    assert (tmp_path / "best").exists() == there
    kept = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == ([10, 20] if there else [10])
