"""Strategies with real policies: what a prefix does to a plan, and what a runner writes."""

from functools import partial

import numpy as np
import pytest
import torch

from diffpolicy.control.clock import VirtualClock, VirtualWorker
from diffpolicy.control.loop import Safety
from diffpolicy.control.plans import Ask, plan_chunks
from diffpolicy.control.runner import Runner
from diffpolicy.control.strategies import Bidirectional, Chunk, Ensemble, RealTime, Synchronous, reach
from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.guidance import Clipped, Pinned, RealTimeChunk, blended
from diffpolicy.diffusion.prefix import Prefix, hard, prefix_weights
from diffpolicy.parts import PREDICTIONS, DenoiserConfig, SamplerConfig, make_denoiser, make_encoder, make_planner
from diffpolicy.policy import Policy

SPEC = Spec({"obs": (3,)}, action_dim=2, horizon=8, n_obs_steps=2, n_action_steps=3)


def make_policy(prediction: str = "v_prediction", network: str = "unet1d", sampler: str = "ddim") -> Policy:
    """An untrained policy; its weights depend on nothing but the sizes."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-2, 5, size=(30, 2)).astype(np.float32)
    obs = {"obs": rng.normal(size=(31, 3)).astype(np.float32)}
    normalizer = Normalizer.fit(from_list([Episode(obs, action, np.zeros(30, dtype=np.float32), False, True)]))
    config = DenoiserConfig(
        network, down_dims=(16, 32), kernel_size=3, step_embed_dim=16, hidden_dim=32, depth=1, prediction=prediction
    )
    torch.manual_seed(0)
    denoiser, encoder = make_denoiser(config, SPEC, normalizer), make_encoder(config, SPEC, normalizer)
    return Policy(SPEC, normalizer, encoder, denoiser, config, SamplerConfig(sampler, 5))


def arguments(policy: Policy, n: int = 4, repeats: int = 1):
    generator = torch.Generator().manual_seed(1)
    history = {"obs": torch.randn(n, 2, 3, generator=generator).to(policy.device)}
    return history, torch.randn(policy.draws(repeats), n, 8, 2, generator=generator).to(policy.device)


def former_chunk(policy: Policy, n: int = 4) -> torch.Tensor:
    """A chunk that the same policy could have made, from other noise."""
    history, noise = arguments(policy, n)
    return policy.plan(history, noise.flip(1).neg())


# --- plan(history, noise, prefix) ---


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("network", ["unet1d", "mlp"])
def test_a_prefix_of_no_weight_leaves_the_plan_as_it_is_for_every_network_and_prediction(device, prediction, network):
    policy = make_policy(prediction, network).to(device)
    history, noise = arguments(policy)
    plain = policy.plan(history, noise)
    for guide in (RealTimeChunk, Pinned, blended):
        prefix = Prefix(former_chunk(policy), torch.zeros(8), guide)
        assert torch.equal(policy.plan(history, noise, prefix), plain)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "flow"])
def test_guidance_brings_the_frozen_actions_nearer_and_stays_in_the_action_box(device, prediction):
    """Without training a noise prediction is clipped everywhere and has no Jacobian; the exact one has its own test."""
    policy = make_policy(prediction).to(device)
    history, noise = arguments(policy)
    former = former_chunk(policy)
    prefix = Prefix(former, prefix_weights(8, start=1, delay=2, end=6))
    guided, plain = policy.plan(history, noise, prefix), policy.plan(history, noise)
    assert (guided - former)[:, :3].square().mean() < 0.9 * (plain - former)[:, :3].square().mean()
    action = policy.normalizer["action"]
    assert bool(((guided >= action.minimum - 1e-4) & (guided <= action.maximum + 1e-4)).all())
    assert guided.isfinite().all()


@pytest.mark.parametrize(("repeats", "guide"), [(1, Pinned), (3, Pinned), (1, blended)])
def test_pinned_actions_come_back_in_physical_units_to_1e_5(repeats: int, guide):
    policy = make_policy()
    history, noise = arguments(policy, repeats=repeats)
    former = former_chunk(policy)
    prefix = Prefix(former, prefix_weights(8, 1, 2, 6, hard), guide, repeats)
    planned = policy.plan(history, noise, prefix)
    torch.testing.assert_close(planned[:, :3], former[:, :3], rtol=0, atol=1e-5)
    assert (planned - former)[:, 3:].abs().max() > 1e-3


def test_each_row_of_a_batch_is_guided_by_its_own_prefix():
    policy = make_policy()
    history, noise = arguments(policy)
    former, weights = former_chunk(policy), torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    together = policy.plan(history, noise, Prefix(former, weights))
    for i in range(4):
        rows = slice(i, i + 1)
        alone = policy.plan({"obs": history["obs"][rows]}, noise[:, rows], Prefix(former[rows], weights[rows]))
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize("guide", [RealTimeChunk, Pinned])
def test_a_rehearsal_is_the_plain_chunk_to_the_bit(guide):
    policy, history = make_policy(), {"obs": np.ones((2, 3), dtype=np.float32)}
    plain, rehearsed = (
        plan_chunks(policy, RealTime(guide), [Ask(history, np.random.default_rng(0), None, 0, 2, rehearse=rehearse)])
        for rehearse in (False, True)
    )
    np.testing.assert_array_equal(rehearsed[0], plain[0])


# --- values ---


def test_the_reach_of_a_chunk_is_what_lies_from_the_current_step_on():
    assert reach(SPEC) == 7


def test_the_ensemble_weighs_with_exp_of_minus_m_i_oldest_first():
    chunks = [Chunk(np.full((4, 1), value), origin, start=0, time=0.0) for value, origin in ((1.0, 0), (5.0, 2))]
    weights = np.exp(-0.5 * np.arange(2)) / np.exp(-0.5 * np.arange(2)).sum()
    assert Ensemble(decay=0.5).action(chunks, 3) == pytest.approx(weights @ [1.0, 5.0])
    assert Ensemble(decay=0.5).action(chunks, 1) == pytest.approx(1.0)
    assert Ensemble(decay=0.5).action(chunks, 5) == pytest.approx(5.0)
    assert Ensemble(decay=0.5).action(chunks, 6) is None


def test_bidirectional_decoding_takes_the_sample_nearest_to_the_former_chunk_where_both_go_on():
    former = Chunk(np.arange(8.0)[:, None], origin=0, start=1, time=0.0)
    near, far = np.arange(3.0, 11.0)[:, None], np.arange(8.0)[:, None]
    near[:1] += 100  # history: it does not count
    assert Bidirectional().choose(np.stack([far, near]), former, origin=3, delay=2) == 1
    assert Bidirectional().choose(np.stack([near, far]), former, origin=3, delay=2) == 0
    assert Bidirectional().choose(np.stack([far, near]), None, origin=3, delay=2) == 0
    assert Bidirectional().choose(np.stack([far, near]), former, origin=9, delay=0) == 0


def test_what_is_done_meanwhile_counts_in_full_in_bidirectional_decoding():
    """Delay 3: three actions off by 1 weigh 3, the next 1, the one after it 1/2; the new chunk's own part nothing."""
    former = Chunk(np.zeros((8, 1)), origin=0, start=0, time=0.0)
    chunks = np.zeros((4, 8, 1))
    chunks[0, :3], chunks[1, 3], chunks[2, 4], chunks[3, 5:] = 1.0, 1.0, 1.0, 9.0
    distance = Bidirectional(decay=0.5)._backward(chunks, former, origin=3, delay=3)
    np.testing.assert_allclose(distance, np.array([3, 1, 0.5, 0]) / 4.5)
    assert (
        Bidirectional().choose(chunks[[0, 3]], former, origin=5, delay=3) == 1
    )  # all that both know is done meanwhile


def test_the_first_actions_count_most_in_bidirectional_decoding():
    former = Chunk(np.zeros((8, 1)), origin=0, start=0, time=0.0)
    early, late = np.zeros((8, 1)), np.zeros((8, 1))
    early[0], late[5] = 1.0, 5.0
    assert Bidirectional(decay=0.5).choose(np.stack([early, late]), former, 0, 0) == 1
    assert Bidirectional(decay=1.0).choose(np.stack([early, late]), former, 0, 0) == 0


def test_with_a_weak_policy_the_choice_is_the_one_computed_by_hand():
    """M = 5 and modes = 2: of the samples the K = 2 nearest to the former chunk at 0.16 are kept, 0.1 and 0.2.

    sample   backward   nearest strong   nearest weak of 0.2, 0.25    sum        of 0.1, 0.05     sum
    0.1      0.06       0.1              0.1                          0.06 *     0                0.16
    0.2      0.04       0.1              0                            0.14       0.1              0.04 *
    """
    former = Chunk(np.full((8, 1), 0.16), origin=0, start=0, time=0.0)

    def constant(*values: float) -> np.ndarray:
        return np.array(values)[:, None, None] * np.ones((1, 8, 1))

    strategy, strong = Bidirectional(5, modes=2), constant(3.0, 0.2, 2.0, 0.1, 4.0)
    assert strategy.choose(strong, former, 0, 0) == 1
    assert strategy.choose(strong, former, 0, 0, constant(0.25, 9.0, 0.2, 8.0, 7.0)) == 3
    assert strategy.choose(strong, former, 0, 0, constant(0.1, 9.0, 0.05, 8.0, 7.0)) == 1


def test_the_forward_half_prefers_the_mode_that_the_weak_policy_lacks():
    """Strong samples lie at 1 and -1 as often, weak ones at 1 only: without a former chunk -1 is chosen, with one the
    mode that it is in."""
    rng = np.random.default_rng(0)
    strong = np.repeat([1.0, -1.0], 8)[:, None, None] + 0.1 * rng.normal(size=(16, 8, 1))
    weak = 1.0 + 0.1 * rng.normal(size=(16, 8, 1))
    strategy = Bidirectional(16, modes=1)
    assert strategy.choose(strong, None, 0, 0, weak) >= 8
    assert Bidirectional(16, modes=3).choose(strong, Chunk(np.ones((8, 1)), 0, 0, 0.0), 0, 0, weak) < 8


def test_bidirectional_decoding_samples_the_weak_policy_with_the_noise_that_follows_its_own():
    strong, weak = make_policy(), make_policy("flow")
    history = {"obs": np.zeros((2, 3), dtype=np.float32)}

    def ask() -> Ask:
        return Ask(history, np.random.default_rng(7), None, 0, 0)

    stream, seen = np.random.default_rng(7), {}

    class Looking(Bidirectional):
        def choose(self, chunks, former, origin, delay, weak=None):
            seen.update(chunks=chunks, weak=weak)
            return 2

    (chunk,) = plan_chunks(strong, Looking(3, weak=weak), [ask()])
    for policy, samples in ((strong, seen["chunks"]), (weak, seen["weak"])):
        noise = torch.from_numpy(stream.standard_normal((policy.draws(), 3, 8, 2), dtype=np.float32))
        expected = policy.plan({"obs": torch.zeros(3, 2, 3)}, noise)
        np.testing.assert_array_equal(samples, expected.numpy())
    np.testing.assert_array_equal(chunk, seen["chunks"][2])


# --- a policy in a runner ---


def play(runner: Runner, beats: int, delay: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Observations are smooth; inference takes `delay` periods."""
    clock = VirtualClock()
    loop = runner.start(VirtualWorker(clock, lambda: delay * runner.period))
    observed = [np.sin(0.05 * i + np.arange(3)).astype(np.float32) for i in range(beats)]
    written = []
    for i, obs in enumerate(observed):
        clock.time = i * runner.period
        written.append(loop.step(clock.now(), obs))
    return np.array([action for action in written if action is not None]), observed


def test_without_a_delay_the_synchronous_runner_writes_what_predict_does_to_the_bit():
    """One episode: the same history, the same noise, the same chunks; To = 2, Ta = 3."""
    policy = make_policy()
    written, observed = play(Runner(policy, 50, Synchronous(), warm_up=0), 20, delay=0.0)
    state, predicted = None, []
    for obs in observed:
        action, state = policy.predict(obs, state)
        predicted.append(action)
    np.testing.assert_array_equal(written, np.array(predicted))


@pytest.mark.parametrize(
    "strategy",
    [
        RealTime(),
        RealTime(Pinned, hard, repeats=3),
        RealTime(partial(RealTimeChunk, beta=10.0)),
        Bidirectional(16),
        Ensemble(),
    ],
    ids=["guided", "pinned", "guided_10", "bidirectional", "ensemble"],
)
def test_joined_chunks_step_less_at_their_borders_than_chunks_taken_as_they_come(strategy):
    """Inference takes 2 of Ta 3 actions. An untrained policy follows its noise, so chunks disagree as much as they can:
    every way of joining makes the mean step of the arm smaller than that of taking chunks as they come."""
    from diffpolicy.control.strategies import Switch

    policy = make_policy()
    steps = []
    for one in (Switch(), strategy):
        written, _ = play(Runner(policy, 50, one, Safety(stop_after=None), delay=2, warm_up=0), 90, delay=1.5)
        steps.append(np.abs(np.diff(written, axis=0))[3::3].mean())
    assert steps[1] < 0.9 * steps[0]


def test_strategies_are_values():
    assert RealTime() == RealTime() and RealTime(decay=hard) != RealTime()
    assert len({Synchronous(), Synchronous(), Ensemble()}) == 2


def test_a_prefix_is_imposed_on_the_clipped_denoiser_and_the_result_is_clipped_again():
    policy = make_policy("epsilon")
    history, noise = arguments(policy)
    former, weights, noise = former_chunk(policy), (torch.arange(8) < 4).float(), 3 * noise
    found = policy.plan(history, noise, Prefix(former, weights))
    known, cond = policy.normalizer["action"].encode(former), policy.encoder(policy.normalizer.encode_obs(history))
    by_hand = make_planner(RealTimeChunk(Clipped(policy.denoiser), known, weights), 1.0, policy.sampler_config)
    with torch.inference_mode():
        torch.testing.assert_close(found, policy.normalizer.decode_action(by_hand(cond, noise)), rtol=0, atol=1e-4)


def test_the_forward_half_compares_what_will_be_executed_alone():
    """Index 1 is done meanwhile (To = 2, d = 1): from 2 on the samples are 0, 1, 3 and 6 and the weak ones 100. Nearest
    others less the weak ones: 2 - 100, 1.5 - 99, 2.5 - 97, 4 - 94."""
    chunks = np.repeat(np.array([0.0, 1, 3, 6])[:, None, None], 6, 1)
    weak, former = np.full((4, 6, 1), 100.0), Chunk(np.zeros((6, 1)), 0, 1, 0.0)
    chunks[0, 1] = weak[:, 1] = 1000.0
    origin = 10  # of which the former chunk knows nothing
    assert Bidirectional(4, modes=1).choose(chunks, former, origin, 1, weak) == 0


def ask(seed, former=None, origin=0, delay=0):
    history = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
    return Ask({"obs": history}, np.random.default_rng(seed), former, origin, delay)


def test_plans_made_together_are_those_made_alone_where_each_has_several_samples():
    former = Chunk(np.zeros((8, 2)), 0, 1, 0.0)
    together = plan_chunks(make_policy(), Bidirectional(3), [ask(i, former, 3, 1) for i in range(3)])
    for i, chunk in enumerate(together):
        (alone,) = plan_chunks(make_policy(), Bidirectional(3), [ask(i, former, 3, 1)])
        np.testing.assert_allclose(chunk, alone, rtol=0, atol=1e-4)


def test_rows_of_prefixes_of_other_delays_keep_their_own_weights():
    former, policy = Chunk(np.ones((8, 2)), 0, 1, 0.0), make_policy()
    strategy = RealTime(Pinned, lambda c: torch.zeros_like(c))
    together = plan_chunks(policy, strategy, [ask(0, former, 2, 0), ask(1, former, 2, 3)])
    for chunk, known in zip(together, (1, 4), strict=True):
        assert (np.abs(chunk - 1).max(1) < 1e-4).tolist() == [True] * known + [False] * (8 - known)


def test_a_choice_is_told_the_former_chunk_the_origin_and_the_delay():
    told = []

    class Choosing(Bidirectional):
        def choose(self, chunks, former, origin, delay, weak=None):
            told.append((len(chunks), former, origin, delay))
            return 1

    former = Chunk(np.zeros((8, 2)), 0, 1, 0.0)
    plan_chunks(make_policy(), Choosing(3), [ask(0, former, 5, 2)])
    assert told == [(3, former, 5, 2)]
