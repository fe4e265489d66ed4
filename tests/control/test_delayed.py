"""Plans that come late: the actor for environments writes what the control loop writes, and jumps are what they say."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from diffpolicy.control.clock import VirtualClock, VirtualWorker
from diffpolicy.control.delayed import Delayed
from diffpolicy.control.delays import Borders, Trial, World, action_range, cell_of, evaluate_late, is_of
from diffpolicy.control.loop import Safety
from diffpolicy.control.runner import Runner
from diffpolicy.control.strategies import Bidirectional, Ensemble, RealTime, Switch, Synchronous
from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.guidance import Pinned, RealTimeChunk, Trained
from diffpolicy.diffusion.prefix import hard
from diffpolicy.errors import ControlError, SpecError
from diffpolicy.evaluate import summarise
from diffpolicy.parts import DenoiserConfig, SamplerConfig, make_denoiser, make_encoder
from diffpolicy.policy import Policy
from diffpolicy.report import Execution

SPEC = Spec({"obs": (3,)}, action_dim=2, horizon=12, n_obs_steps=2, n_action_steps=4)
STRATEGIES = {
    "synchronous": Synchronous(),
    "switch": Switch(),
    "ensemble": Ensemble(keeps=3),
    "guided": RealTime(partial(RealTimeChunk, beta=10.0)),
    "pinned": RealTime(Pinned, hard, repeats=2),
    "trained": RealTime(Trained, hard),
    "bidirectional": Bidirectional(4),
}


def make_policy(max_delay: int = 7, spec: Spec = SPEC) -> Policy:
    """An untrained policy: it follows its noise, so chunks disagree as much as they can."""
    rng = np.random.default_rng(0)
    action = rng.uniform(-2, 2, size=(30, spec.action_dim)).astype(np.float32)
    obs = {"obs": rng.normal(size=(31, 3)).astype(np.float32)}
    normalizer = Normalizer.fit(from_list([Episode(obs, action, np.zeros(30, dtype=np.float32), False, True)]))
    config = DenoiserConfig(
        "mlp", hidden_dim=16, depth=1, step_embed_dim=8, prediction="v_prediction", max_delay=max_delay
    )
    torch.manual_seed(0)
    denoiser, encoder = make_denoiser(config, spec, normalizer), make_encoder(config, spec, normalizer)
    return Policy(spec, normalizer, encoder, denoiser, config, SamplerConfig(steps=3))


POLICY = make_policy()


def pendulum_policy() -> Policy:
    return make_policy(spec=replace(SPEC, action_dim=1))


def responding(action: np.ndarray | None, step: int) -> np.ndarray:
    """What a world shows that answers to what was done."""
    done = np.zeros(2, dtype=np.float32) if action is None else action.astype(np.float32)
    return np.array([np.sin(0.1 * step), *np.tanh(done)], dtype=np.float32)


def played_by_the_loop(strategy, delay: int, steps: int) -> np.ndarray:
    clock, written, obs = VirtualClock(), [], responding(None, 0)
    runner = Runner(POLICY, 50.0, strategy, Safety(stop_after=None), delay=delay, warm_up=0, seed=POLICY.seed)
    loop = runner.start(VirtualWorker(clock, lambda: max(0.0, delay - 0.5) * runner.period))
    for beat in range(steps + delay):
        clock.time = beat * runner.period
        action = loop.step(clock.now(), obs)
        if action is not None:  # before the first chunk nothing is written, and the world stands still
            written.append(action)
            obs = responding(action, len(written))
    return np.array(written)


def played(actor, steps: int) -> np.ndarray:
    state, written, obs = None, [], responding(None, 0)
    for step in range(1, steps + 1):
        action, state = actor.predict(obs, state)
        written.append(action)
        obs = responding(action, step)
    return np.array(written)


@pytest.mark.parametrize("delay", [0, 1, 3, 7])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_late_plans_write_what_the_control_loop_writes_on_a_virtual_clock(strategy, delay: int):
    expected = played_by_the_loop(strategy, delay, 40)
    np.testing.assert_allclose(played(Delayed(POLICY, strategy, delay), 40), expected[:40], rtol=0, atol=1e-6)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_plans_on_a_gpu_are_those_of_the_cpu(device, strategy):
    here, there = POLICY, deepcopy(POLICY).to(device)
    assert there.device.type == device
    np.testing.assert_allclose(
        played(Delayed(there, strategy, 3), 20), played(Delayed(here, strategy, 3), 20), rtol=0, atol=1e-5
    )


def test_without_a_delay_the_synchronous_way_is_predict_to_the_bit():
    np.testing.assert_array_equal(played(Delayed(POLICY), 30), played(POLICY, 30))


def test_environments_do_not_see_each_other_and_a_restart_begins_the_next_episode():
    """Two at once, the second started over at step 9: rows equal those of an arm alone with that episode's noise."""
    actor, state, rows = Delayed(POLICY, RealTime(Pinned, hard), 3), None, []
    for step in range(20):
        start = np.array([step == 0, step in (0, 9)])
        obs = np.stack([responding(None, step), responding(None, step if step < 9 else step - 9)])
        action, state = actor.predict(obs, state, start)
        rows.append(action)
    alone, chosen = None, []
    for step in range(11):
        both = np.stack([responding(None, step)] * 4)
        action, alone = actor.predict(both, alone)
        chosen.append(action[3])  # episode 3 is the second one's second of two environments
    np.testing.assert_allclose(np.array(rows)[9:, 1], chosen, rtol=0, atol=1e-6)


def test_the_synchronous_way_repeats_its_last_action_for_the_delay():
    """Ta = 4 and d = 3: of 7 steps the last 4 are one action."""
    written = played(Delayed(POLICY, Synchronous(), 3), 28)
    still = (np.diff(written, axis=0) == 0).all(1)
    assert still.tolist() == [k % 7 in (3, 4, 5) for k in range(27)]


def test_wall_time_counts_in_whole_steps_and_the_largest_of_the_last_ten_is_expected():
    """Plans of 0.05, 0.11 and 0.02 s at 20 Hz: one step (the first: there at once), three, one. The one before them,
    which compiles and loads, is not timed."""
    seconds, clock, heard = iter([0.05, 0.11, 0.02] + [0.02] * 40), [0.0], []
    calls = iter(range(10**6))

    def now() -> float:
        clock[0] += next(seconds) if next(calls) % 2 else 0.0
        return clock[0]

    actor = Delayed(POLICY, Switch(), rate_hz=20.0, on_chunk=lambda *told: heard.append(told), now=now)
    played(actor, 20)
    assert heard == [(0, 0, 0, 0), (0, 7, 3, 0), (0, 9, 1, 0), (0, 13, 1, 0), (0, 17, 1, 0)]


def test_the_first_plan_of_every_episode_is_timed_as_those_that_follow_it():
    """A plan with a prefix takes 0.22 s at 20 Hz, 5 steps, one without none; an episode begins at step 12."""
    policy, clock, prefixes = make_policy(), [0.0], []
    plain = policy.with_plan(lambda history, noise, prefix: noise[0] * 0)

    def plan(history, noise, prefix):
        prefixes.append(prefix)
        clock[0] += 0.0 if prefix is None else 0.22
        return noise[0] * 0

    actor, state = Delayed(plain.with_plan(plan), RealTime(), rate_hz=20.0, now=lambda: clock[0]), None
    for step in range(24):
        _, state = actor.predict(responding(None, step), state, np.array([step in (0, 12)]))
    guided = [prefix.weights[0] for prefix in prefixes if prefix.weights.any()]
    assert len(prefixes) - len(guided) == 3  # one thrown away, one an episode
    assert len(guided) >= 4 and {int((weights == 1).sum()) - 1 for weights in guided} == {5}


@pytest.mark.parametrize("delay", [-1, 8])
def test_a_delay_for_which_chunks_are_too_short_is_refused_at_the_door(delay: int):
    with pytest.raises(ControlError, match="delay"):
        Delayed(POLICY, Switch(), delay)


def test_a_policy_that_was_not_trained_to_continue_chunks_is_refused_at_the_door():
    with pytest.raises(ControlError, match="trained to continue chunks for delays up to 2 and the delay is 3"):
        Delayed(make_policy(2), RealTime(Trained, hard), 3)
    with pytest.raises(ControlError, match="up to 0"):
        Delayed(make_policy(0), RealTime(Trained, hard), 0)


# --- what is reported ---


def test_a_jump_is_the_change_of_velocity_at_a_border_as_a_share_of_the_range():
    """Velocities 1 1 | 4 4 | 0 of a range of 10, borders at actions 3 and 5: 0.3 and 0.4; other bends do not count."""
    action = np.array([[0.0], [1], [2], [6], [10], [10]], dtype=np.float32)
    episode = Episode({"obs": np.zeros((7, 1), np.float32)}, action, np.zeros(6, np.float32), True, False)
    borders = Borders()
    for step, delay in ((0, 0), (3, 2), (5, 4)):
        borders.hear(0, step, delay, 0)
    borders.hear(1, 0, 0, 0)
    episodes = from_list([episode, episode])
    jumps = borders.jumps(episodes, np.array([10.0]))
    assert jumps[0] == pytest.approx(0.35) and np.isnan(jumps[1])
    assert borders.delays(episodes) == {"p50": 3.0, "max": 4.0}


def test_of_an_arm_that_stops_and_starts_the_larger_change_of_velocity_counts():
    """Velocities 2 2 0 0 | 1 of a range of 10: it stops by 0.2 and starts by 0.1. Without the pause only the start."""
    action = np.array([[0.0], [2], [4], [4], [4], [5], [6]], dtype=np.float32)
    episodes = from_list([Episode({"obs": np.zeros((8, 1), np.float32)}, action, np.zeros(7, np.float32), True, False)])
    for rested, jump in ((2, 0.2), (0, 0.1)):
        borders = Borders()
        borders.hear(0, 0, 0, 0)
        borders.hear(0, 5, 2, rested)
        assert borders.jumps(episodes, np.array([10.0]))[0] == pytest.approx(jump)


def test_a_late_evaluation_reports_what_it_played(tmp_path):
    """Ta = 4 and d = 4: chunks begin at steps 8, 12, ... of the 200 of Pendulum."""
    policy = pendulum_policy()
    world, trial = World("Pendulum-v1", {}, episodes=3, seed=5, score="max_reward"), Trial("switch", Switch(), 4)
    report, episodes = evaluate_late(policy, trial, world, {})
    written = episodes.action.reshape(3, 200) / action_range(policy)
    jumps = np.abs(np.diff(written, n=2, axis=1))[:, np.arange(8, 200, 4) - 2].mean(1)
    values = json.loads(report.save(tmp_path).read_text())
    np.testing.assert_allclose(values["by_episode"]["jump"], jumps, rtol=1e-5)
    assert values["execution"]["jump"]["mean"] == pytest.approx(jumps.mean(), rel=1e-5) and "jump" in str(report)
    assert values["execution"]["steps"] == {"p50": 4.0, "max": 4.0} and values["seeds"] == [5, 7]
    cell = json.loads(json.dumps(cell_of(report, trial, world, "a")))
    assert is_of(cell, trial, world, report.sampler)
    assert not is_of(cell, trial, replace(world, env_id="MountainCarContinuous-v0"), report.sampler)
    assert not is_of(cell, replace(trial, rate_hz=10.0), world, report.sampler)
    assert not is_of(cell, replace(trial, delay=3), world, report.sampler)
    assert not is_of(cell, trial, replace(world, seed=6), report.sampler)


def test_an_environment_without_score_or_success_has_no_cell():
    world = World("Pendulum-v1", {}, episodes=1, seed=5)
    report, _ = evaluate_late(pendulum_policy(), Trial("switch", Switch(), 1), world, {})
    with pytest.raises(SpecError, match="neither success nor score"):
        cell_of(report, Trial("switch", Switch(), 1), world, "a")


def seeded(seed):
    p = POLICY
    return Policy(p.spec, p.normalizer, p.encoder, p.denoiser, p.denoiser_config, p.sampler_config, seed)


def test_late_plans_have_the_noise_of_the_policys_seed():
    np.testing.assert_array_equal(played(Delayed(seeded(5)), 10), played(seeded(5), 10))
    assert not np.array_equal(played(Delayed(seeded(5)), 10), played(Delayed(seeded(6)), 10))


def test_late_plans_are_drawn_afresh_where_they_are_not_to_be_deterministic():
    obs = np.zeros((2, 3), np.float32)
    assert not np.array_equal(*(Delayed(POLICY).predict(obs, deterministic=False)[0] for _ in range(2)))
    np.testing.assert_array_equal(*(Delayed(POLICY).predict(obs)[0] for _ in range(2)))


def test_delays_that_are_reported_leave_out_the_first_chunk_of_each_episode():
    borders = Borders({0: [(0, 0, 0), (4, 3, 0), (8, 5, 0)], 1: [(0, 0, 0), (9, 4, 0)]})
    episodes = from_list([Episode({"obs": np.zeros((3, 1))}, np.zeros((2, 1)), np.zeros(2), False, True)] * 2)
    assert borders.delays(episodes) == {"p50": 4.0, "max": 5.0}


def test_an_action_that_never_moved_has_the_range_1():
    action = np.stack([np.zeros(4), np.arange(4)], 1).astype(np.float32)
    normalizer = Normalizer.fit(
        from_list([Episode({"obs": np.zeros((5, 1), np.float32)}, action, np.zeros(4, np.float32), False, True)])
    )
    policy = type("P", (), {"normalizer": normalizer})
    np.testing.assert_array_equal(action_range(policy), [1.0, 3.0])


def test_the_quality_of_a_cell_is_the_score_where_there_are_both():
    success = {"success": np.array([0, 1], np.float32)}
    reward = np.array([0.0, 0.25], np.float32)
    one = Episode({"obs": np.zeros((3, 3), np.float32)}, np.zeros((2, 2), np.float32), reward, False, True, success)
    episodes = from_list([one] * 3, {"env_id": "E", "env_kwargs": {}, "seed": 0})
    execution = Execution("switch", 1, {"p50": 1, "max": 1}, np.array([0.1] * 3))
    for score, wanted in (("max_reward", ("score", 0.25)), (None, ("success", 1.0))):
        report = summarise(POLICY, episodes, {}, score=score, execution=execution)
        cell = cell_of(report, Trial("switch", Switch(), 1), World("E", {}, 3, 0), "a")
        assert (cell["kind"], cell["quality"]["value"]) == wanted


def test_a_delay_counts_actions_and_not_the_steps_that_the_arm_rests():
    """H = 11: asked for at action 4, there 9 steps later; the chunk had 7 more actions, then the arm rested twice."""
    seconds, clock, calls = iter([0.05, 0.45] + [0.02] * 40), [0.0], iter(range(10**6))

    def now():
        clock[0] += next(seconds) if next(calls) % 2 else 0.0
        return clock[0]

    heard, state = [], None
    actor = Delayed(POLICY, Switch(), rate_hz=20.0, on_chunk=lambda *told: heard.append(told), now=now)
    for step in range(14):
        _, state = actor.predict(responding(None, step), state)
    assert heard == [(0, 0, 0, 0), (0, 13, 9, 2)]
    assert state.arms[0].delays[-1] == 7
