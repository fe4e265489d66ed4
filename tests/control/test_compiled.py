"""Compiled plans: every backend that is installed plans what the policy plans, from the same noise."""

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from pretended_cuda import PretendedCuda
from worlds import babble

from diffpolicy.control.compiled import backends
from diffpolicy.control.compiled.backends import BACKENDS, Job, usable_on
from diffpolicy.control.compiled.chain import Bodies, times_of
from diffpolicy.control.compiled.plan import CompiledPlan, Measured, build, compile_plan, example, share_of_range
from diffpolicy.control.compiled.runtimes import eight_bits
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.guidance import Pinned, RealTimeChunk, Trained
from diffpolicy.diffusion.prefix import Prefix, hard, prefix_weights
from diffpolicy.errors import MissingExtraError, PolicyError
from diffpolicy.guides import ClassifierFreeGuidance
from diffpolicy.nets.product import Compressed, Exact, WindowProduct, least_large, with_products
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
)
from diffpolicy.policy import Policy

NETWORKS = {"unet1d": DenoiserConfig(down_dims=(16, 32), kernel_size=3), "mlp": DenoiserConfig("mlp", hidden_dim=32)}
QUICK = [name for name in usable_on("cpu") if name != "inductor"]  # which takes half a minute to compile
DENOISING = [name for name in SAMPLERS if name not in MOST_STEPS]
EXACT = [name for name in QUICK if "-" not in name]
TOLERANCE = {name: 0.01 if "-" in name else 1e-4 for name in BACKENDS}
TOLERANCE["onnxruntime-int8"] = 0.012  # it rounds activations too, and this network is small and untrained


@cache
def make_policy(
    network: str = "unet1d", sampler: str = "ddim", steps: int = 3, eta: float = 0.0, **denoiser: int
) -> Policy:
    """An untrained policy of two named observations, one with an angle; it predicts the velocity of the schedule."""
    episodes = babble({"pose": 3, "goal": 2}, -2, 5)
    spec = Spec.from_episodes(episodes, horizon=8, n_obs_steps=2, n_action_steps=3)
    normalizer = Normalizer.fit(episodes, {"pose": ("limits", "limits", "angle")})
    given = NETWORKS[network]
    config = DenoiserConfig(
        given.network, given.down_dims, given.kernel_size, step_embed_dim=16, obs_embed_dim=8,
        hidden_dim=given.hidden_dim, prediction="v_prediction", **denoiser,
    )  # fmt: skip
    torch.manual_seed(0)
    parts = make_denoiser(config, spec, normalizer), config, SamplerConfig(sampler, steps, eta)
    return Policy(spec, normalizer, make_encoder(config, spec, normalizer), *parts)


@cache
def job(network: str, batch_size: int) -> Job:
    """Exports are the slow part: once for all backends."""
    return Job(make_policy(network), batch_size)


@cache
def compiled(backend: str, network: str = "unet1d", batch_size: int = 1) -> CompiledPlan:
    """A plan of the backend, compiled once for all tests; skips where it cannot run."""
    try:
        BACKENDS[backend].check(backend, make_policy(network))
    except (MissingExtraError, PolicyError) as error:
        pytest.skip(str(error))
    return build(job(network, batch_size), backend)


def assert_equal_plans(plan: CompiledPlan, policy: Policy, batch_size: int) -> None:
    for seed in range(3):
        case = example(policy, batch_size, seed)
        assert share_of_range(policy, plan(*case), policy.plan(*case)) <= TOLERANCE[plan.backend]


@pytest.mark.parametrize(
    "config", [*(SamplerConfig(name, 3) for name in DENOISING), SamplerConfig("ddim", 5, 0.7)], ids=str
)
@pytest.mark.parametrize("backend", QUICK)
def test_a_plan_of_the_u_net_equals_the_policys_under_every_sampler_around_one_compiled_body(backend, config):
    plan = compiled(backend).with_sampler(config)
    assert_equal_plans(plan, make_policy().with_sampler(config), 1)


@pytest.mark.parametrize(("sampler", "steps"), [("mip", 2), ("mip", 1), ("one_step", 1)])
def test_a_plan_of_one_or_two_steps_equals_the_policys(sampler, steps):
    policy = make_policy(sampler=sampler, steps=steps)
    assert_equal_plans(build(Job(policy, 1), "eager"), policy, 2)


@pytest.mark.parametrize("backend", EXACT)
def test_a_plan_of_the_mlp_equals_the_policys_under_ddpm_with_3_draws(backend):
    config = SamplerConfig("ddpm", 3)
    plan = compiled(backend, "mlp").with_sampler(config)
    assert_equal_plans(plan, make_policy("mlp").with_sampler(config), 1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
@pytest.mark.parametrize("backend", EXACT)
def test_a_plan_compiled_for_3_plans_1_2_3_and_7(backend, batch_size):
    assert_equal_plans(compiled(backend, batch_size=3), make_policy(), batch_size)


@pytest.mark.slow
def test_torch_compile_equals_the_policys_plan():
    assert_equal_plans(compiled("inductor"), make_policy(), 1)


@pytest.mark.parametrize("backend", QUICK)
def test_every_draw_of_the_noise_changes_the_chunk(backend):
    policy = make_policy().with_sampler(SamplerConfig("ddpm", 3))
    plan = compiled(backend).with_sampler(policy.sampler_config)
    history, noise = example(policy, 1, 0)
    chunk = plan(history, noise)
    assert torch.equal(chunk, plan(history, noise))
    for draw in range(3):
        other = noise.clone()
        other[draw] = -other[draw]
        assert share_of_range(policy, plan(history, other), chunk) > 0.01


@pytest.mark.parametrize("backend", ["eager", "openvino"])
def test_predict_through_a_compiled_plan_acts_as_without_over_9_steps_of_2_environments(backend):
    policy = make_policy()
    fast, rng = policy.with_plan(compiled(backend)), np.random.default_rng(0)
    states: list = [None, None]
    for step in range(9):
        obs = {"pose": rng.normal(size=(2, 3)), "goal": rng.normal(size=(2, 2))}
        start = np.array([step == 0, step in (0, 4)])
        actions = []
        for i, actor in enumerate((policy, fast)):
            action, states[i] = actor.predict(obs, states[i], start)
            actions.append(action)
        np.testing.assert_allclose(*actions, atol=7e-4)  # the range is 7 wide


def test_another_sampler_of_a_compiled_policy_is_not_planned_by_the_old_one():
    policy = make_policy()
    fast = policy.with_plan(compiled("eager"))
    assert fast.compiled is not None and policy.compiled is None
    assert fast.with_sampler(SamplerConfig("heun", 3)).compiled is None


@pytest.mark.parametrize(("sampler", "steps", "count"), [("ddim", 10, 10), ("heun", 5, 5), ("dpm++2m", 4, 4)])
def test_a_plan_keeps_the_share_of_each_time_that_its_sampler_evaluates(sampler, steps, count):
    times = times_of(make_policy(sampler=sampler, steps=steps))
    assert times == pytest.approx([1 - i / steps for i in range(count)])


def test_large_matrices_have_8_bits_within_1_over_254_of_a_rows_largest_weight_and_small_ones_are_exact():
    network = make_policy().denoiser.network
    large = 0.01 * sum(weight.numel() for weight in network.parameters())
    pairs = [
        (a.product.weight, b.product)
        for a, b in zip(
            with_products(network, Exact).modules(), with_products(network, Compressed).modules(), strict=True
        )
        if type(a) is WindowProduct
    ]
    kinds = [(a.numel() >= large, type(b)) for a, b in pairs]
    assert sorted(set(kinds), key=str) == [(False, Exact), (True, Compressed)] and len(kinds) == 23
    for a, b in pairs:
        limit = a.abs().amax(1, keepdim=True) / 254 * 1.001 if type(b) is Compressed else 0.0
        assert bool(((a - b.weight).abs() <= limit).all())


def test_onnx_runtimes_products_with_large_matrices_have_8_bits():
    job = Job(make_policy(), 1)
    compressed = eight_bits(job.exported(Exact), least_large(job.network))
    found = [node.op_type for node in compressed.graph.node if node.op_type.startswith("MatMul")]
    body = [module for module in with_products(job.network, Compressed).modules() if type(module) is WindowProduct]
    openvinos = [type(module.product) for module in body]
    assert 0 < found.count("MatMulNBits") == openvinos.count(Compressed)
    assert 0 < found.count("MatMul") == openvinos.count(Exact)


def test_auto_says_what_it_measured_and_keeps_the_fastest_within_the_limit(monkeypatch):
    policy = make_policy()
    wrong = backends.Backend(lambda job: Bodies(lambda x_t, modulation: 0 * x_t, job.network.body))
    monkeypatch.setattr("diffpolicy.control.compiled.backends.find_spec", lambda name: None)
    for name in ("inductor", "cudagraph"):
        monkeypatch.delitem(BACKENDS, name)
    monkeypatch.setitem(BACKENDS, "wrong", wrong)
    plan = compile_plan(policy)
    assert plan.backend == "eager"
    found = {measured.backend: measured for measured in plan.measured}
    assert found["eager"].left_out == "" and found["eager"].difference < 1e-4 and found["eager"].p50_ms > 0
    assert "differs from the policy" in found["wrong"].left_out and found["wrong"].difference > 0.01
    assert "openvino is not installed" in found["openvino"].left_out.replace(", onnx, onnxscript", "")
    assert "is not installed" in str(found["onnxruntime"])
    with pytest.raises(PolicyError, match="choose another, or raise the limit"):
        compile_plan(policy, backend="wrong")
    assert compile_plan(policy, backend="wrong", limit=10.0).backend == "wrong"


def test_a_backend_that_fails_is_left_out_with_its_reason():
    def fail(job: Job) -> Bodies:
        raise RuntimeError("no kernel\nfor this machine")

    policy = make_policy()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in BACKENDS if name != "eager"]:
            patch.delitem(BACKENDS, name)
        patch.setitem(BACKENDS, "broken", backends.Backend(fail))
        plan = compile_plan(policy)
    assert plan.measured[1] == Measured("broken", left_out="failed here: RuntimeError: no kernel")


def test_what_cannot_be_compiled_is_refused_in_one_sentence(monkeypatch):
    policy = make_policy()
    monkeypatch.setattr("diffpolicy.control.compiled.backends.find_spec", lambda name: None)
    monkeypatch.setattr("diffpolicy.compiler.shutil.which", lambda name: None)
    for arguments, error, words in (
        ({"backend": "openvino"}, MissingExtraError, "pip install 'diffpolicy\\[export\\]'"),
        ({"backend": "cudagraph"}, PolicyError, "the policy is on cpu .* load the policy with device='cuda'"),
        ({"backend": "inductor"}, PolicyError, "needs a C\\+\\+ compiler"),
        ({"backend": "tensorrt"}, PolicyError, "choose auto or one of eager"),
        ({"batch_size": 0}, PolicyError, "batch_size is 0"),
    ):
        with pytest.raises(error, match=words) as caught:
            compile_plan(policy, **arguments)
        assert "\n" not in str(caught.value)


def choosing(heat: float) -> Policy:
    """A policy that takes the best of 4 samples, or one by chance."""
    policy, critic = make_policy("mlp"), CriticConfig(hidden=(16,))
    parts = policy.spec, policy.normalizer, policy.encoder, policy.denoiser, policy.denoiser_config
    torch.manual_seed(1)
    choice = Selection(make_critic(critic, *parts[:2]), critic, SelectionConfig(4, heat))
    return Policy(*parts, policy.sampler_config, selection=choice)


@pytest.mark.parametrize("heat", [0.0, 0.5])
@pytest.mark.parametrize("backend", EXACT)
def test_a_compiled_plan_takes_the_best_of_4_samples_as_the_policy_does(backend, heat):
    policy = choosing(heat)
    compiled(backend, "mlp")  # skips where it cannot run
    assert_equal_plans(build(Job(policy, 2), backend), policy, 3)


@pytest.mark.parametrize("guide", [Pinned, RealTimeChunk])
@pytest.mark.parametrize("backend", QUICK)
def test_a_compiled_plan_of_3_joins_5_former_chunks_as_the_policy_does_with_each_step_taken_twice(backend, guide):
    policy, plan = make_policy(), compiled(backend, batch_size=3)
    history, _ = example(policy, 5, 0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(policy.draws(2), 5, 8, 2, generator=generator)
    former = torch.rand(5, 8, 2, generator=generator) * 7 - 2
    for weights in (prefix_weights(8, 1, 2, 6), torch.rand(5, 8, generator=generator)):
        prefix = Prefix(former, weights, guide, repeats=2)
        joined = policy.with_plan(plan).plan(history, noise, prefix)
        assert share_of_range(policy, joined, policy.plan(history, noise, prefix)) <= TOLERANCE[backend]
        assert share_of_range(policy, joined, plan(history, noise)) > 0.05


def test_a_compiled_plan_continues_chunks_as_a_network_that_learnt_it():
    policy = make_policy(max_delay=2)
    history, noise = example(policy, 2, 0)
    prefix = Prefix(torch.rand(2, 8, 2) * 7 - 2, prefix_weights(8, 1, 2, 6, hard), Trained)
    joined = build(Job(policy, 1), "eager")(history, noise, prefix)
    assert share_of_range(policy, joined, policy.plan(history, noise, prefix)) < TOLERANCE["eager"]
    assert share_of_range(policy, joined[:, :3], prefix.chunk[:, :3]) < 1e-6
    assert share_of_range(policy, joined[:, 3:], prefix.chunk[:, 3:]) > 0.1


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow), "onnxruntime"])
def test_a_plan_keeps_the_weights_of_the_moment_it_was_compiled(backend):
    compiled(backend)  # skips where it cannot run
    policy = deepcopy(make_policy())
    plan, case = compile_plan(policy, 1, backend), example(policy, 1, 0)
    before = plan(*case)
    with torch.no_grad():
        for parameter in (*policy.denoiser.parameters(), *policy.encoder.parameters()):
            parameter.mul_(1.2)
    assert torch.equal(plan(*case), before)
    assert share_of_range(policy, before, policy.plan(*case)) > 0.02


def test_a_prefix_of_another_batch_and_a_guided_policy_are_refused_in_one_sentence():
    policy, plan = make_policy(), compiled("eager")
    history, noise = example(policy, 2, 0)
    guided = deepcopy(make_policy(told_embed_dim=4))
    guided.guidance = ClassifierFreeGuidance()
    for refused, words in (
        (lambda: plan(history, noise, Prefix(noise[0, :1], prefix_weights(8, 1, 2, 6))), "one known chunk a plan"),
        (lambda: compile_plan(guided, backend="eager"), "this policy is guided"),
    ):
        with pytest.raises(PolicyError, match=words) as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_arguments_of_other_shapes_are_refused_in_one_sentence():
    plan, policy = compiled("eager"), make_policy()
    history, noise = example(policy, 2, 0)
    for bad_history, bad_noise in (
        ({**history, "goal": history["goal"][:1]}, noise),
        ({"pose": history["pose"]}, noise),
        ({**history, "pose": history["pose"][:, :1]}, noise),
        (history, noise[:, :, :4]),
        (history, noise[:0]),
        (history, noise[0]),
    ):
        with pytest.raises(PolicyError, match="this plan wants histories") as caught:
            plan(bad_history, bad_noise)
        assert "\n" not in str(caught.value)
    assert torch.equal(plan({**history, "unused": noise}, torch.cat([noise, noise])), plan(history, noise))


CAPTURED = {
    **{name: lambda name=name: make_policy(sampler=name) for name in DENOISING},
    "drawing": lambda: make_policy(eta=0.7),
    "choosing": lambda: choosing(0.0),
    "choosing by chance": lambda: choosing(0.5),
}


@pytest.mark.parametrize("make", CAPTURED.values(), ids=CAPTURED)
def test_a_plan_on_a_gpu_neither_waits_for_it_nor_sends_it_anything_or_it_could_not_be_captured(make):
    expected = build(Job(make(), 2), "eager")(*example(make(), 2, 0))
    with PretendedCuda() as cuda:
        policy = deepcopy(make()).to("cuda")
        plan, case = build(Job(policy, 2), "eager"), example(policy, 2, 0)
        cuda.waits.clear()
        chunk = plan(*case)
        assert not cuda.waits
        torch.testing.assert_close(chunk.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["cudagraph", "cudagraph-bf16"])
@pytest.mark.parametrize("config", [SamplerConfig(name, 3) for name in DENOISING], ids=str)
def test_a_captured_plan_equals_the_policys_and_keeps_its_results(backend, config):
    policy = deepcopy(make_policy().with_sampler(config)).to("cuda")
    plan = compile_plan(policy, 3, backend)
    assert_equal_plans(plan, policy, 5)
    case, other = example(policy, 3, 0), example(policy, 3, 1)
    first = plan(*case)
    kept = first.clone()
    plan(*other)
    assert torch.equal(first, kept)
