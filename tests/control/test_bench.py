"""Benchmarks of plans: quantiles of known times, what is defined, the best in a budget, the run it is written in."""

import json
import time

import numpy as np
import pytest
import torch

from diffpolicy.cli import main
from diffpolicy.control.compiled.bench import Latency, Row, best_within, combinations, latency, measure, samplers_of
from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.errors import PolicyError
from diffpolicy.parts import DenoiserConfig, SamplerConfig, make_denoiser, make_encoder
from diffpolicy.policy import Policy


def make_policy(sampler: str = "ddim", steps: int = 10, **denoiser: str) -> Policy:
    """An untrained policy with the sizes of `Detour`."""
    rng = np.random.default_rng(0)
    obs, action = rng.uniform(-1, 1, (31, 2)).astype(np.float32), rng.uniform(-1, 1, (30, 2)).astype(np.float32)
    episodes = from_list([Episode({"obs": obs}, action, np.zeros(30, np.float32), False, True)])
    spec, normalizer = Spec.from_episodes(episodes, 4, 1, 2), Normalizer.fit(episodes)
    config = DenoiserConfig("mlp", hidden_dim=16, depth=1, step_embed_dim=8, **denoiser)
    torch.manual_seed(0)
    parts = make_encoder(config, spec, normalizer), make_denoiser(config, spec, normalizer)
    return Policy(spec, normalizer, *parts, config, SamplerConfig(sampler, steps))


def row(sampler: str, steps: int, p50: float, p99: float, backend: str = "eager") -> Row:
    return Row(backend, SamplerConfig(sampler, steps), steps, Latency(p50, p99, p99, 0.1, 100), 0.0)


def test_of_95_plans_of_1_ms_and_5_of_5_the_quantiles_are_1_and_5_ms_and_the_jitter_0_87(monkeypatch):
    now, count = [0.0], iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def plan() -> None:
        now[0] += 0.005 if next(count) % 20 == 7 else 0.001

    found = latency(plan, 100)
    assert found.samples == 100
    assert (found.p50, found.p99) == (pytest.approx(1), pytest.approx(5))
    assert 1 < found.p95 < 5
    assert found.jitter == pytest.approx(4 * (0.05 * 0.95) ** 0.5)


def test_plans_of_half_a_second_are_timed_40_times_and_of_a_minute_20_times(monkeypatch):
    for seconds, times in ((0.5, 40), (60.0, 20)):
        now = [0.0]
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now[0])
        assert latency(lambda now=now, s=seconds: now.__setitem__(0, now[0] + s), 100).samples == times


def test_one_step_of_a_noise_prediction_is_left_out_and_of_a_flow_it_is_measured_once():
    able, left_out = combinations(make_policy(), ["ddim", "heun"], [1, 2])
    assert [(c.sampler, c.steps) for c in able] == [("ddim", 2), ("heun", 2)]
    assert all(config.steps == 1 and "almost 0" in why for config, why in left_out)
    policy = make_policy("euler", schedule="flow", prediction="flow")
    able, left_out = combinations(policy, samplers_of(policy), [1, 2])
    assert sum(config.steps == 1 for config in able) == 1
    assert {why for _, why in left_out} == {"one step is the same as with euler"}
    able, left_out = combinations(make_policy("mip", 2, schedule="flow", prediction="sample"), ["mip"], [1, 2, 3])
    assert [config.steps for config in able] == [1, 2]
    assert left_out[0][1] == "the sampler 'mip' takes at most 2 steps, not 3"


def test_every_pair_of_backend_and_sampler_has_a_row_with_its_evaluations_and_the_same_actions():
    configs = [SamplerConfig("ddim", 4), SamplerConfig("heun", 4)]
    rows = list(measure(make_policy(prediction="v_prediction"), ["eager", "cudagraph"], configs, samples=5))
    assert [(r.backend, r.evaluations) for r in rows[:2]] == [("eager", 4), ("eager", 7)]
    assert all(r.latency is not None and r.latency.p50 > 0 and r.difference < 1e-4 for r in rows[:2])
    assert all("runs on cuda" in r.left_out for r in rows[2:])


def test_the_best_score_within_the_budget_is_chosen_and_of_equals_the_quickest():
    rows = [row("ddim", 2, 2, 3), row("ddim", 10, 9, 12), row("heun", 3, 8, 9), row("heun", 3, 5, 9, "openvino")]
    scores = {SamplerConfig("ddim", 2): 0.5, SamplerConfig("ddim", 10): 0.9, SamplerConfig("heun", 3): 0.7}
    assert best_within(rows, scores, 20.0) is rows[1]
    assert best_within(rows, scores, 10.0) is rows[3]
    assert best_within(rows, scores, 3.0) is rows[0]
    with pytest.raises(PolicyError, match=r"nothing measured plans within 1 ms; the quickest takes 3\.00 ms"):
        best_within(rows, scores, 1.0)


def test_the_command_measures_draws_and_writes_the_sampler_into_the_run_with_the_former_one_beside(tmp_path, capsys):
    make_policy(prediction="v_prediction").save(tmp_path)
    weights = (tmp_path / "policy.safetensors").read_bytes()
    argv = ["bench", str(tmp_path), "--env", "diffpolicy_envs:Detour-v0", "--backends", "eager", "--device", "cpu"]
    small = ["--steps", "1", "3", "--samplers", "ddim", "heun", "--episodes", "2", "--samples", "3"]
    assert main([*argv, *small, "--budget-ms", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "left out     heun 1: one step is the same as with ddim" in printed
    found = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert [r["latency"]["samples"] for r in found["rows"]] == [3, 3, 3]
    assert {s["kind"] for s in found["scores"]} == {"success"}
    assert (tmp_path / "bench" / "bench.png").stat().st_size > 10_000
    description = json.loads((tmp_path / "policy.json").read_text())
    assert description["sampler"] == found["chosen"]["sampler"]
    assert (description["chosen"]["before"]["sampler"], description["chosen"]["before"]["steps"]) == ("ddim", 10)
    assert Policy.load(tmp_path).sampler_config == SamplerConfig(**found["chosen"]["sampler"])
    assert (tmp_path / "policy.safetensors").read_bytes() == weights


def test_what_cannot_be_measured_is_one_sentence_and_changes_nothing(tmp_path, capsys):
    make_policy().save(tmp_path)
    before = (tmp_path / "policy.json").read_bytes()
    argv = ["bench", str(tmp_path), "--env", "diffpolicy_envs:Detour-v0", "--backends", "eager", "--samples", "2"]
    for more, words in (
        (["--backends", "tpu"], "there is no backend ['tpu']"),
        (["--samplers", "dmp"], "there is no sampler ['dmp']"),
        (["--steps", "0"], "from 1 on"),
        (["--steps", "1"], "none of these is defined: one step of a network that predicts the noise"),
        (["--episodes", "0", "--budget-ms", "20"], "chooses by score"),
        (["--steps", "2", "--samplers", "ddim", "--episodes", "1", "--budget-ms", "1e-6"], "the quickest takes"),
    ):
        assert main([*argv, *more]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "policy.json").read_bytes() == before
