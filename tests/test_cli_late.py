"""`diffpolicy evaluate` with plans that come late: one report, or a picture of several that can be continued."""

import json

import numpy as np
import pytest
import torch

from diffpolicy.cli import late, main
from diffpolicy.control import delays
from diffpolicy.control.strategies import Bidirectional
from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.parts import DenoiserConfig, SamplerConfig, make_denoiser, make_encoder
from diffpolicy.policy import Policy


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """An untrained policy for the detour, that can continue chunks for delays up to 2."""
    rng = np.random.default_rng(0)
    obs = {"obs": rng.uniform(-1, 1, (31, 2)).astype(np.float32)}
    action = rng.uniform(-1, 1, (30, 2)).astype(np.float32)
    normalizer = Normalizer.fit(from_list([Episode(obs, action, np.zeros(30, np.float32), False, True)]))
    spec = Spec({"obs": (2,)}, action_dim=2, horizon=8, n_obs_steps=1, n_action_steps=4)
    config = DenoiserConfig("mlp", hidden_dim=16, depth=1, step_embed_dim=8, prediction="sample", max_delay=2)
    torch.manual_seed(0)
    denoiser, encoder = make_denoiser(config, spec, normalizer), make_encoder(config, spec, normalizer)
    policy = Policy(spec, normalizer, encoder, denoiser, config, SamplerConfig(steps=2))
    return str(policy.save(tmp_path_factory.mktemp("run")))


def evaluate(run: str, out, *words: str) -> int:
    argv = ["evaluate", run, "--task", "detour", "--episodes", "2", "--seed", "7", "--device", "cpu", "--out", str(out)]
    return main([*argv, *words])


def test_one_strategy_and_delay_give_a_report_that_says_what_the_plans_took(run, tmp_path, capsys):
    assert evaluate(run, tmp_path, "--strategy", "rtc-trained", "--delay", "2") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["execution"]["strategy"] == "rtc-trained" and report["execution"]["delay"] == 2
    assert report["execution"]["steps"] == {"p50": 2.0, "max": 2.0}
    assert report["execution"]["jump"]["ci95"][0] > 0 and len(report["by_episode"]["jump"]) == 2
    assert "rtc-trained, a delay of 2 steps" in capsys.readouterr().out


def test_wall_time_counts_in_steps_of_the_rate_given(run, tmp_path):
    """At 1 Hz any plan here takes less than a step: one."""
    assert evaluate(run, tmp_path, "--real-time", "--rate-hz", "1", "--strategy", "switch") == 0
    execution = json.loads((tmp_path / "report.json").read_text())["execution"]
    assert execution["delay"] is None and execution["steps"] == {"p50": 1.0, "max": 1.0}


def test_several_are_drawn_and_what_is_finished_is_not_played_again(run, tmp_path, monkeypatch, capsys):
    played, play = [], delays.evaluate_late

    def counted(policy, trial, *rest):
        played.append((trial.name, trial.delay))
        return play(policy, trial, *rest)

    monkeypatch.setattr(delays, "evaluate_late", counted)
    assert evaluate(run, tmp_path, "--strategy", "synchronous", "bid", "--delay", "0", "3") == 0
    first = json.loads((tmp_path / "delays.json").read_text())["cells"]
    assert played == [(cell["strategy"], cell["delay"]) for cell in first]
    assert len(played) == 4 and (tmp_path / "delays.png").stat().st_size > 10_000
    assert all(cell["kind"] == "success" and cell["jump"]["low"] > 0 for cell in first)
    assert evaluate(run, tmp_path, "--strategy", "bid", "--delay", "3", "4", "--resume") == 0
    cells = json.loads((tmp_path / "delays.json").read_text())["cells"]
    assert played[4:] == [("bid", 4)] and len(cells) == 5
    assert all(cell in cells for cell in first)
    assert "bid          delay 4    success" in capsys.readouterr().out
    with monkeypatch.context() as other_weights:
        other_weights.setattr(delays, "fingerprint", lambda policy, trial: "others")
        assert evaluate(run, tmp_path, "--strategy", "bid", "--delay", "3", "4", "--resume") == 0
    cells = json.loads((tmp_path / "delays.json").read_text())["cells"]
    assert played[5:] == [("bid", 3), ("bid", 4)] and len(cells) == 5
    assert [cell["weights"] for cell in cells].count("others") == 2


def test_each_is_told_beside_waiting_for_the_same_plans_episode_by_episode():
    """Waiting succeeds in 1, 0, 0, 0, 0, 1 and the other in 1, 1, 1, 0, 0, 1: two of six more, none fewer."""

    def cell(strategy: str, delay: int, success: list[float]) -> dict:
        report = {"env_id": "E", "env_kwargs": {}, "seeds": [0, 5], "by_episode": {"success": success}}
        own = {"delay": delay, "real_time": False, "episodes": 6, "weights": "a"}
        return {"strategy": strategy, **own, "report": report}

    waiting, other = cell("synchronous", 4, [1, 0, 0, 0, 0, 1]), cell("switch", 4, [1, 1, 1, 0, 0, 1])
    cells = [cell("synchronous", 2, [1] * 6), waiting, other]
    assert late._against_waiting(other, cells) == "   minus waiting: success +0.333 [+0.000, +0.667]"
    told = late._against_waiting({**other, "weights": "b"}, cells)
    assert told == "   minus waiting (another policy's): success +0.333 [+0.000, +0.667]"
    scored = {**other, "report": {**other["report"], "score": {"kind": "d4rl"}}}
    for unlike in (scored, {**other, "real_time": True}, {**other, "episodes": 5}):
        assert late._against_waiting(unlike, cells) == ""
    assert late._against_waiting(waiting, cells) == late._against_waiting(cell("switch", 7, [1] * 6), cells) == ""


def test_another_policy_and_another_weak_one_have_another_fingerprint(run):
    one, other = Policy.load(run), Policy.load(run)
    trial = delays.Trial("bid", Bidirectional())
    assert delays.fingerprint(one, trial) == delays.fingerprint(other, trial)
    with_weak = delays.Trial("bid", Bidirectional(weak=other))
    assert delays.fingerprint(one, trial) != delays.fingerprint(one, with_weak)
    with torch.no_grad():
        next(other.denoiser.parameters()).view(-1)[0] += 1e-3
    assert delays.fingerprint(one, trial) != delays.fingerprint(other, trial)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--delay", "5"], "exceeds horizon 8"),
        (["--delay", "-1"], "give whole steps of at least 0"),
        (["--strategy", "nonsense"], "there is no strategy 'nonsense'; wanted one of synchronous"),
        (["--delay", "1", "--real-time"], "choose one"),
        (["--delay", "3", "--strategy", "rtc-trained"], "for delays up to 2 and the delay is 3"),
        (["--guidance-weight", "2"], "no guidance"),
        (["--samples", "4"], "no critic"),
    ],
)
def test_what_cannot_be_played_is_one_sentence_before_anything_is(run, tmp_path, capsys, words, said):
    assert evaluate(run, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
