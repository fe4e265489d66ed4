"""Policy: its protocol, its state, its files."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from worlds import babble

from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.guidance import Pinned, RealTimeChunk
from diffpolicy.diffusion.prefix import Prefix
from diffpolicy.errors import PolicyError, SpecError
from diffpolicy.guides import ClassifierFreeGuidance, Guidance, ValueGuidance
from diffpolicy.observations import check_spaces
from diffpolicy.parts import (
    MOST_STEPS,
    SAMPLERS,
    CriticConfig,
    DenoiserConfig,
    SamplerConfig,
    Selection,
    SelectionConfig,
    make_critic,
    make_denoiser,
    make_encoder,
    make_noised_value,
)
from diffpolicy.policy import Policy

FORMATS = sorted((Path(__file__).parent / "fixtures").glob("policy_format_*"))


def make_policy(
    device: str = "cpu",
    sampler: str = "ddim",
    steps: int = 4,
    seed: int = 0,
    choice: SelectionConfig | None = None,
    guidance: Guidance | None = None,
) -> Policy:
    """An untrained policy of two named observations, with a critic if it has a choice; its weights are always the same.

    `seed` is of its noise.
    """
    told = 4 if isinstance(guidance, ClassifierFreeGuidance) else 0
    episodes = babble({"pose": 3, "goal": 2}, -2, 5)
    spec = Spec.from_episodes(episodes, horizon=8, n_obs_steps=2, n_action_steps=3)
    normalizer = Normalizer.fit(episodes, {"pose": ("limits", "limits", "angle")})
    config = DenoiserConfig(
        down_dims=(16, 32),
        kernel_size=3,
        step_embed_dim=16,
        obs_embed_dim=8,
        prediction="v_prediction",
        told_embed_dim=told,
    )
    torch.manual_seed(0)
    denoiser = make_denoiser(config, spec, normalizer)
    parts = (spec, normalizer, make_encoder(config, spec, normalizer), denoiser)
    critic_config = CriticConfig((16,), members=3, layer_norm=True, aggregate="lower_bound")
    critic = make_critic(critic_config, spec, normalizer)
    if isinstance(guidance, ValueGuidance):
        critic = make_noised_value(critic_config, config, spec, normalizer)
    selection = None if choice is None else Selection(critic, critic_config, choice)
    return Policy(*parts, config, SamplerConfig(sampler, steps), seed, selection, guidance).to(device)


def observe(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    return {"pose": rng.normal(size=(n, 3)), "goal": rng.normal(size=(n, 2))}


def row(obs: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    return {name: array[i] for name, array in obs.items()}


def arguments(policy: Policy, n: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Histories and noise of n plans."""
    generator = torch.Generator().manual_seed(0)
    history = {name: torch.randn(n, 2, size, generator=generator) for name, size in (("pose", 3), ("goal", 2))}
    return history, policy.draw(n, generator)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in MOST_STEPS])
def test_plan_is_a_function_of_its_arguments_under_every_sampler(device, sampler):
    policy = make_policy(device, sampler)
    rng = np.random.default_rng(1)
    history = {
        k: torch.from_numpy(rng.normal(size=(5, 2, d))).float().to(device) for k, d in (("pose", 3), ("goal", 2))
    }
    noise = torch.randn(policy.planner.draws, 5, 8, 2, generator=torch.Generator().manual_seed(0)).to(device)
    first, second = policy.plan(history, noise), policy.plan(history, noise)
    assert torch.equal(first, second)
    low, high = policy.normalizer["action"].minimum, policy.normalizer["action"].maximum
    assert bool(((first >= low - 1e-4) & (first <= high + 1e-4)).all())
    assert not torch.equal(first, policy.plan(history, noise.flip(1)))


def test_a_batch_of_3_acts_as_3_single_environments(device):
    policy = make_policy(device)
    rng = np.random.default_rng(2)
    steps = [observe(rng, 3) for _ in range(7)]
    state, batch_actions = None, []
    for i, obs in enumerate(steps):
        action, state = policy.predict(obs, state, np.full(3, i == 0))
        batch_actions.append(action)
    for env in range(3):
        state = None
        # Alone, environment 1 of 3 plays what environment 0 of 1 plays as its episode number 1.
        for _ in range(env):
            _, state = policy.predict(row(steps[0], env), state, np.array([True]))
        for i, obs in enumerate(steps):
            action, state = policy.predict(row(obs, env), state, np.array([i == 0]))
            np.testing.assert_allclose(action, batch_actions[i][env], rtol=0, atol=2e-5)


def test_resetting_one_environment_touches_no_other():
    policy = make_policy()
    rng = np.random.default_rng(3)
    steps = [observe(rng, 2) for _ in range(8)]
    runs = []
    for reset_at in (None, 4):
        state, actions = None, []
        for i, obs in enumerate(steps):
            action, state = policy.predict(obs, state, np.array([i == 0, i in (0, reset_at)]))
            actions.append(action)
        runs.append(np.array(actions))
    np.testing.assert_allclose(runs[0][:, 0], runs[1][:, 0], rtol=0, atol=2e-5)  # batches of 1 and 2 round apart
    np.testing.assert_array_equal(runs[0][:4, 1], runs[1][:4, 1])
    assert np.abs(runs[0][4:, 1] - runs[1][4:, 1]).max() > 0.1


def test_the_state_is_a_value_that_predict_never_changes():
    policy = make_policy()
    rng = np.random.default_rng(4)
    _, state = policy.predict(observe(rng, 2))
    obs = observe(rng, 2)
    first, _ = policy.predict(obs, state)
    second, _ = policy.predict(obs, state)
    np.testing.assert_array_equal(first, second)


def test_executed_actions_are_chunk_indices_1_to_3_of_the_plan_for_the_current_step():
    policy = make_policy()
    rng = np.random.default_rng(5)
    a, b = observe(rng, 1), observe(rng, 1)
    _, state = policy.predict(a)
    noise = torch.from_numpy(np.random.default_rng([0, 0, 0]).standard_normal((1, 8, 2), dtype=np.float32)[:, None])
    history = {k: torch.from_numpy(np.stack([a[k], a[k]], axis=1)).float() for k in a}
    np.testing.assert_allclose(state.chunk[0], policy.plan(history, noise)[0, 1:4], atol=1e-6)
    state_after = state
    for _ in range(3):
        _, state_after = policy.predict(b, state_after)
    noise = torch.from_numpy(np.random.default_rng([0, 0, 1]).standard_normal((1, 8, 2), dtype=np.float32)[:, None])
    history = {k: torch.from_numpy(np.stack([b[k], b[k]], axis=1)).float() for k in a}
    np.testing.assert_allclose(state_after.chunk[0], policy.plan(history, noise)[0, 1:4], atol=1e-6)


def test_only_environments_that_need_a_plan_are_planned():
    policy = make_policy()
    sizes = []
    plan = policy.plan
    policy.plan = lambda history, noise: (sizes.append(noise.shape[1]), plan(history, noise))[1]
    rng = np.random.default_rng(6)
    state = None
    for i in range(6):
        _, state = policy.predict(observe(rng, 4), state, np.array([i == 0, i == 0, i == 0, i in (0, 2)]))
    assert sizes == [4, 1, 3, 1]


def test_deterministic_repeats_and_stochastic_does_not():
    policy = make_policy()
    obs = observe(np.random.default_rng(7), 2)
    again = [policy.predict(obs)[0] for _ in range(2)]
    fresh = [policy.predict(obs, deterministic=False)[0] for _ in range(2)]
    np.testing.assert_array_equal(*again)
    assert not np.array_equal(*fresh)
    assert not np.array_equal(again[0][0], again[0][1])


def test_a_saved_policy_acts_the_same(tmp_path, device):
    policy = make_policy(device, "dpm++2m", 5, seed=3)
    loaded = Policy.load(policy.save(tmp_path / "p"), device)
    obs = observe(np.random.default_rng(8), 3)
    np.testing.assert_array_equal(policy.predict(obs)[0], loaded.predict(obs)[0])
    assert loaded.sampler_config == SamplerConfig("dpm++2m", 5)
    assert loaded.spec == policy.spec


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_temperature_of_one_half_plans_from_half_the_noise(sampler):
    policy = make_policy(sampler=sampler)
    history, noise = arguments(policy, 5)
    cold = policy.with_sampler(temperature=0.5).plan(history, noise)
    assert torch.equal(cold, policy.plan(history, 0.5 * noise)) and not torch.equal(cold, policy.plan(history, noise))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_saved_policy_of_5_samples_chooses_the_same_one(tmp_path, temperature):
    choice = SelectionConfig(5, temperature)
    policy, obs = make_policy(choice=choice), observe(np.random.default_rng(8), 20)
    loaded = Policy.load(policy.save(tmp_path / "p"))
    action, _ = loaded.predict(obs)
    np.testing.assert_array_equal(policy.predict(obs)[0], action)
    assert loaded.planner.draws == 5 + (temperature > 0)
    once, _ = make_policy().predict(obs)
    np.testing.assert_array_equal(loaded.with_selection(SelectionConfig(1)).predict(obs)[0], once)
    assert np.abs(action - once).max() > 0.1
    assert loaded.with_sampler(SamplerConfig("heun", 3)).planner.draws == loaded.planner.draws


GUIDANCE = {"told": ClassifierFreeGuidance(2.0, 0.7), "value": ValueGuidance(20.0, 0.3)}


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_a_guided_policy_of_3_samples_acts_the_same_after_loading_and_keeps_its_guidance_under_other_choices(
    tmp_path, guidance, device
):
    policy = make_policy(device, choice=SelectionConfig(3), guidance=guidance)
    obs = observe(np.random.default_rng(8), 5)
    loaded = Policy.load(policy.save(tmp_path / "p"), device)
    np.testing.assert_array_equal(policy.predict(obs)[0], loaded.predict(obs)[0])
    assert loaded.guidance == guidance
    assert np.abs(loaded.with_guidance(weight=0.0).predict(obs)[0] - policy.predict(obs)[0]).max() > 0.01
    for other in (loaded.with_sampler(SamplerConfig("heun", 3)), loaded.with_selection(SelectionConfig(1))):
        assert other.guidance == guidance
    cold = loaded.with_sampler(SamplerConfig(steps=4, temperature=0.5))
    assert cold.with_sampler(sampler="heun").sampler_config == SamplerConfig("heun", 4, temperature=0.5)
    assert cold.with_selection(SelectionConfig(3)).acting["sampler"]["temperature"] == 0.5
    for wrong, more in (("heun", {}), (None, {"stps": 3})):
        with pytest.raises(SpecError, match="wanted a SamplerConfig, or its settings by name: sampler, steps"):
            loaded.with_sampler(wrong, **more)
    assert Policy.load(cold.save(tmp_path / "cold")).sampler_config.temperature == 0.5
    np.testing.assert_array_equal(
        loaded.with_guidance(weight=2.5).with_guidance(guidance.weight).predict(obs)[0], policy.predict(obs)[0]
    )


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_a_guided_policy_joins_a_prefix(guidance):
    policy = make_policy(choice=SelectionConfig(1), guidance=guidance)
    history = {k: torch.zeros(2, 2, d) for k, d in (("pose", 3), ("goal", 2))}
    noise, known = torch.randn(1, 2, 8, 2, generator=torch.Generator().manual_seed(0)), torch.full((2, 8, 2), 1.5)
    weights = (torch.arange(8) < 3).float()
    free = policy.plan(history, noise)
    pinned = policy.plan(history, noise, Prefix(known, weights, Pinned))
    approached = policy.plan(history, noise, Prefix(known, weights, RealTimeChunk))
    assert (pinned[:, :3] - 1.5).abs().max() < 1e-5
    assert (approached - known)[:, :3].abs().mean() < (free - known)[:, :3].abs().mean()


def test_a_policy_without_a_critic_cannot_choose_and_an_impossible_choice_is_refused():
    with pytest.raises(PolicyError, match="no critic to choose with"):
        make_policy().with_selection(SelectionConfig(5))
    for impossible in (SelectionConfig(0), SelectionConfig(2, -1.0), SelectionConfig(2, float("nan"))):
        with pytest.raises(ValueError, match="at least 1 sample"):
            make_policy(choice=impossible)


@pytest.mark.parametrize("folder", FORMATS, ids=lambda f: f.name)
def test_policies_of_every_former_format_still_act_as_they_did(folder):
    wanted = json.loads((folder / "actions.json").read_text())
    policy = Policy.load(folder)
    action, _ = policy.predict({name: np.array(value) for name, value in wanted["obs"].items()})
    np.testing.assert_allclose(action, wanted["action"], atol=1e-4)


def test_there_is_a_fixture_of_the_current_format():
    from diffpolicy.saved import FORMAT

    assert f"policy_format_{FORMAT}" in [f.name for f in FORMATS]


def edit(**changes: object):
    """Change or drop (None) entries of policy.json."""

    def apply(weights: Path, description: Path) -> None:
        values = {**json.loads(description.read_text()), **changes}
        description.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return apply


DAMAGE = {
    "cut short": lambda weights, _: weights.write_bytes(weights.read_bytes()[:-100]),
    "pickle": lambda weights, _: weights.write_bytes(pickle.dumps({"weights": [1, 2]})),
    "torch pickle": lambda weights, _: torch.save({"weights": torch.zeros(2)}, weights),
    "no weights": lambda weights, _: weights.unlink(),
    "no description": lambda _, description: description.unlink(),
    "description cut": lambda _, description: description.write_text(description.read_text()[:40]),
    "no normalizer": edit(normalizer=None),
    "newer": edit(format=999),
    "unknown sampler": edit(sampler={"sampler": "magic", "steps": 3, "eta": 0.0}),
    "critic without weights": edit(
        selection={"critic": {"hidden": [4]}, "samples": 2, "temperature": 0.0},
    ),
    "critic of unknown make": edit(
        selection={"critic": {"activation": "magic"}, "samples": 2, "temperature": 0.0},
    ),
    "unknown guidance": edit(guidance={"kind": "magic", "weight": 1.0}),
    "guidance without an encoder for it": edit(guidance={"kind": "classifier_free", "weight": 2.0, "goal": 1.0}),
    "guidance by a critic of clean chunks": edit(guidance={"kind": "value", "weight": 2.0, "until": 0.1}),
    "other sizes": edit(normalizer={"pose": ["none"] * 3, "goal": ["none"] * 2, "action": ["limits"] * 2}),
}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cut short", "cut short"),
        ("pickle", "pickle"),
        ("torch pickle", "pickle"),
        ("no weights", "there is no"),
        ("no description", "policy.json is missing"),
        ("description cut", "cannot be read"),
        ("no normalizer", "does not describe a policy"),
        ("newer", "update diffpolicy"),
        ("unknown sampler", "wanted one of"),
        ("critic without weights", "does not fit"),
        ("critic of unknown make", "'magic'; wanted at least"),
        ("unknown guidance", "does not describe a policy"),
        ("guidance without an encoder for it", "told-embed-dim a size above 0"),
        ("guidance by a critic of clean chunks", "needs a value of noised chunks"),
        ("other sizes", "does not fit"),
    ],
)
def test_a_damaged_policy_is_refused_in_one_sentence(tmp_path, what, words):
    folder = make_policy().save(tmp_path / "p")
    DAMAGE[what](folder / "policy.safetensors", folder / "policy.json")
    with pytest.raises(ValueError, match=words) as error:
        Policy.load(folder)
    assert "\n" not in str(error.value)


def test_bad_observations_are_refused_in_one_sentence():
    policy = make_policy()
    good = observe(np.random.default_rng(0), 2)
    for bad, words in (
        ({"pose": good["pose"]}, "the policy needs"),
        ({**good, "goal": np.zeros((2, 5))}, "has shape"),
        ({**good, "goal": np.full((2, 2), np.nan)}, "not finite"),
        (np.zeros((2, 5)), "the policy needs"),
    ):
        with pytest.raises(PolicyError, match=words):
            policy.predict(bad)


def test_spaces_of_another_environment_are_refused():
    policy, box = make_policy(), gymnasium.spaces.Box
    action = box(-1, 1, (2,))
    good = gymnasium.spaces.Dict({"pose": box(-1, 1, (3,)), "goal": box(-1, 1, (2,))})
    check_spaces(policy.spec, good, action)
    with pytest.raises(PolicyError, match="trained on"):
        check_spaces(policy.spec, box(-1, 1, (5,)), action)
    with pytest.raises(PolicyError, match="takes actions"):
        check_spaces(policy.spec, good, box(-1, 1, (3,)))


def test_a_policy_is_sampled_only_as_it_was_trained_and_never_in_one_step_of_a_noise_prediction(tmp_path):
    policy = make_policy()
    assert policy.with_sampler(SamplerConfig("heun", 1)).planner.evaluations == 1  # v_prediction: the mean of the data
    with pytest.raises(PolicyError, match="not trained for the sampler 'mip'; choose from ddpm, ddim, euler, heun"):
        policy.with_sampler(SamplerConfig("mip", 2))
    description = json.loads((policy.save(tmp_path) / "policy.json").read_text())
    description["denoiser"]["prediction"] = "epsilon"
    (tmp_path / "policy.json").write_text(json.dumps(description))
    loaded = Policy.load(tmp_path)
    with pytest.raises(PolicyError, match="divides by alpha, almost 0 there"):
        loaded.with_sampler(SamplerConfig("ddim", 1))
    description["sampler"]["steps"] = 1
    (tmp_path / "policy.json").write_text(json.dumps(description))
    with pytest.raises(PolicyError, match="take 2 steps or more"):
        Policy.load(tmp_path)


def test_the_noise_of_a_plan_is_that_of_seed_episode_and_plan_with_episodes_numbered_over_all_environments():
    """Environment 1 of 3 begins its second episode: the fourth after 0 to 3 is number 4."""
    policy, rng, state = make_policy(seed=3), np.random.default_rng(0), None
    for start in ([True] * 3, [False, True, False]):
        state, _ = policy.observe(observe(rng, 3), state, np.array(start))
    _, noise = policy.wanted(state, np.array([0, 1]))
    for found, episode in zip(noise.swapaxes(0, 1), (0, 4), strict=True):
        wanted = np.random.default_rng([3, episode, 0]).standard_normal((1, 8, 2), dtype=np.float32)
        np.testing.assert_array_equal(found, wanted)


def test_every_other_way_of_acting_keeps_the_seed():
    policy = make_policy(seed=3, choice=SelectionConfig(2), guidance=ValueGuidance(20.0, 0.3))
    for other in (policy.with_sampler(steps=3), policy.with_selection(SelectionConfig(1)), policy.with_guidance(1.0)):
        assert other.seed == 3


def test_a_prefix_of_no_weight_leaves_the_plan_of_a_guided_policy_as_it_is():
    for guidance in (ClassifierFreeGuidance(2.0, 0.7), ValueGuidance(20.0, 0.3)):
        policy = make_policy(choice=SelectionConfig(1), guidance=guidance)
        history, noise = arguments(policy, 2)
        prefix = Prefix(torch.full((2, 8, 2), 1.5), torch.zeros(8), Pinned)
        torch.testing.assert_close(policy.plan(history, noise, prefix), policy.plan(history, noise), rtol=0, atol=1e-5)


def test_each_row_is_pinned_to_its_own_prefix_where_a_policy_chooses_among_samples():
    policy = make_policy(choice=SelectionConfig(2))
    history, noise = arguments(policy, 3)
    values, ends = torch.tensor([1.5, -0.5, 0.5]), torch.tensor([3, 5, 2])
    weights = (torch.arange(8) < ends[:, None]).float()
    chunk = policy.plan(history, noise, Prefix(values.view(3, 1, 1).expand(3, 8, 2), weights, Pinned))
    for row, value, end in zip(chunk, values, ends, strict=True):
        pinned = ((row - value).abs() < 1e-5).all(1)
        assert pinned.tolist() == [k < end for k in range(8)]


def test_a_new_weight_keeps_the_goal_and_where_guidance_ends():
    assert ClassifierFreeGuidance(2.0, 0.7).changed(3.0, None) == ClassifierFreeGuidance(3.0, 0.7)
    assert ClassifierFreeGuidance(2.0, 0.7).changed(None, 0.5) == ClassifierFreeGuidance(2.0, 0.5)
    assert ValueGuidance(20.0, 0.3).changed(2.0, None) == ValueGuidance(2.0, 0.3)


def test_every_setting_of_a_policy_comes_back_from_its_files(tmp_path):
    policy = make_policy(seed=7, choice=SelectionConfig(5, 0.5), guidance=ValueGuidance(20.0, 0.3))
    policy = policy.with_sampler(sampler="ddim", steps=3, eta=0.5, temperature=0.25)
    loaded = Policy.load(policy.save(tmp_path))
    assert loaded.acting == policy.acting and loaded.seed == 7
    assert loaded.sampler_config == SamplerConfig("ddim", 3, 0.5, 0.25)
    assert (loaded.spec, loaded.denoiser_config) == (policy.spec, policy.denoiser_config)
    assert loaded.selection.critic_config == policy.selection.critic_config


def test_a_policy_trained_without_clipping_is_not_clipped():
    made = make_policy()
    config = replace(made.denoiser_config, clip=None)
    free = Policy(made.spec, made.normalizer, made.encoder, made.denoiser, config, made.sampler_config)
    history, noise = arguments(made, 5)
    low, high = made.normalizer["action"].minimum, made.normalizer["action"].maximum
    chunk = free.plan(history, 9 * noise)
    assert bool(((chunk < low - 0.1) | (chunk > high + 0.1)).any())


@pytest.mark.parametrize(("pose", "goal"), [((4, 3), (2, 2)), ((3,), (1, 2))])
def test_parts_of_an_observation_that_differ_in_their_number_of_rows_are_refused(pose, goal):
    with pytest.raises(PolicyError, match=r"'pose' has .*, 'goal' has . rows; give every part for the same"):
        make_policy().predict({"pose": np.zeros(pose), "goal": np.zeros(goal)}, None)
