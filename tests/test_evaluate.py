"""Evaluation: intervals against known values and their coverage, scores against D4RL's, paired comparison."""

import json

import numpy as np
import pytest

from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.errors import DiffPolicyError
from diffpolicy.evaluate import evaluate, outcomes, summarise
from diffpolicy.report import Execution, bootstrap, compare, wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (95, 100, 0.8882, 0.9785)],
)
def test_wilson_equals_published_values(k, n, low, high):
    found = wilson(k, n)
    assert (found.value, found.low, found.high) == pytest.approx((k / n, low, high), abs=1e-4)


def test_wilson_covers_the_truth_in_about_95_of_100():
    rng = np.random.default_rng(0)
    hits = [(e := wilson(int(k), 50)).low <= 0.8 <= e.high for k in rng.binomial(50, 0.8, 2000)]
    assert 0.93 < np.mean(hits) < 0.97


def test_bootstrap_interval_is_that_of_the_normal_law_for_many_samples():
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    found = bootstrap(values)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def episode(reward: list[float], success: list[float]) -> Episode:
    n = len(reward)
    return Episode(
        {"obs": np.zeros((n + 1, 1), np.float32)}, np.zeros((n, 1), np.float32), np.array(reward, np.float32),
        False, True, {"success": np.array(success, np.float32)},
    )  # fmt: skip


def test_success_counts_if_it_was_ever_reached_and_max_reward_is_the_largest():
    episodes = from_list([episode([0, 0.9, 0.2], [0, 1, 0]), episode([0.3], [0])])
    found = outcomes(episodes, "success", "max_reward", None)
    assert found.success is not None
    assert found.score is not None
    assert found.success.tolist() == [True, False]
    np.testing.assert_allclose(found.score, [0.9, 0.3])
    np.testing.assert_allclose(found.returns, [1.1, 0.3])


def report(values: np.ndarray, **changes: object) -> dict:
    base = {"env_id": "a", "env_kwargs": {}, "seeds": [0, len(values) - 1]}
    return {**base, "by_episode": {"return": values.tolist()}, **changes}


def test_pairing_finds_a_difference_of_0_1_under_a_spread_of_1():
    a = np.random.default_rng(0).normal(size=100)
    b = a + 0.1 + 0.05 * np.random.default_rng(1).normal(size=100)
    (row,) = compare(report(a), report(b))
    assert row.difference.low > 0.08
    assert row.difference.high < 0.12


def test_reports_of_other_seeds_are_not_compared():
    a = np.zeros(3)
    with pytest.raises(DiffPolicyError, match="seeds"):
        compare(report(a), report(a, seeds=[5, 7]))


def test_reports_of_other_successes_or_scores_are_not_compared():
    a = report(np.zeros(3), success_rule="ever", score={"kind": "max_reward"})
    for changes in ({"success_rule": "at the end"}, {"score": {"kind": "d4rl"}}):
        with pytest.raises(DiffPolicyError, match=r"differ in what .* is: .* evaluate both as one task"):
            compare(a, {**a, **changes})
    for unknown in ({"success_rule": None}, {"score": None}):
        assert compare(a, {**a, **unknown})


class Zero:
    """Always the action 0."""

    def predict(self, obs, state=None, episode_start=None, deterministic=True):
        return np.zeros((len(obs), 1), dtype=np.float32), state


def test_evaluate_reports_what_it_played(tmp_path):
    first, second = (evaluate(Zero(), "Pendulum-v1", episodes=4, seed=7) for _ in range(2))
    assert first == second
    assert first.seeds == (7, 10)
    assert first.success is None
    values = json.loads(first.save(tmp_path).read_text())
    assert values["return"]["mean"] == pytest.approx(np.mean(values["by_episode"]["return"]))
    wanted = {"env_id", "env_kwargs", "episodes", "seeds", "success_rule", "return", "success", "score", "plan_ms",
              "sampler", "nfe", "device", "versions"}  # fmt: skip
    assert wanted <= set(values)
    single = evaluate(Zero(), "Pendulum-v1", episodes=1, seed=7)
    assert single.to_json()["return"] == {"mean": single.returns.value, "ci95": None}
    assert "of one episode" in str(single)


def test_episodes_without_a_number_in_either_report_are_left_out_of_its_comparison():
    """An episode of one chunk has no jump: of three pairs one is whole, 0.4 - 0.1."""
    shared = {"env_id": "E", "env_kwargs": {}, "seeds": [0, 2]}
    a = {**shared, "by_episode": {"return": [1.0, 2.0, 3.0], "jump": [0.1, None, 0.3]}}
    b = {**shared, "by_episode": {"return": [2.0, 3.0, 4.0], "jump": [0.4, 0.2, None]}}
    found = {row.name: row for row in compare(a, b)}
    assert found["return"].difference.value == pytest.approx(1.0)
    assert (found["jump"].a, found["jump"].b) == (0.1, 0.4)
    assert found["jump"].difference.value == pytest.approx(0.3)


def test_differences_of_fewer_than_6_pairs_are_not_decided_and_one_has_no_interval():
    for n, words in ((1, "difference 1.000   1 episode: too few"), (5, "5 episodes: too few"), (6, "   a difference")):
        (row,) = compare(report(np.zeros(n)), report(np.ones(n)))
        assert words in str(row)
    assert "[" not in str(compare(report(np.zeros(1)), report(np.ones(1)))[0])


def test_a_worse_policy_is_a_decided_difference_as_a_better_one_is():
    a, b = report(np.zeros(6)), report(np.ones(6))
    for first, second in ((a, b), (b, a)):
        (row,) = compare(first, second)
        assert "no decided" not in str(row) and str(row).endswith("a difference")


def test_a_summary_counts_successes_scores_and_lengths_each_by_its_own():
    """Three episodes of 1, 2 and 6 steps; one succeeds, and its name is is_success."""

    def one(reward, success):
        n = len(reward)
        return Episode(
            {"obs": np.zeros((n + 1, 1), np.float32)},
            np.zeros((n, 1), np.float32),
            np.array(reward, np.float32),
            False,
            True,
            {"is_success": np.array(success, np.float32)},
        )

    episodes = from_list(
        [one([0.5], [0]), one([0.25, 0.25], [1, 0]), one([0.1] * 6, [0] * 6)],
        {"env_id": "E", "env_kwargs": {}, "seed": 7},
    )
    found = summarise(Zero(), episodes, {}, score="max_reward")
    assert found.success == wilson(1, 3) and found.success_rule == "info['is_success'] at any step"
    assert found.score.value == pytest.approx((0.5 + 0.25 + 0.1) / 3) and found.score_kind == "max_reward"
    assert found.returns.value == pytest.approx((0.5 + 0.5 + 0.6) / 3) and found.length == 3.0
    assert found.by_episode["success"] == [0.0, 1.0, 0.0] and found.seeds == (7, 9)


def test_jumps_of_episodes_without_a_border_do_not_count():
    found = Execution("switch", 1, {"p50": 1, "max": 1}, np.array([0.4, np.nan, 0.2]))
    assert found.jump.value == pytest.approx(0.3)
