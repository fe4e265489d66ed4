"""`diffpolicy collect --quality`: data of each level with its provenance, and refusals before anything takes time."""

import numpy as np
import pytest

import diffpolicy as dp
from diffpolicy.cli import main

DETOUR = ["collect", "--env", "diffpolicy_envs:Detour-v0"]


def test_random_episodes_do_not_depend_on_how_many_are_collected(tmp_path, capsys):
    few, many = tmp_path / "few", tmp_path / "many"
    for out, episodes in ((few, "2"), (many, "5")):
        assert main([*DETOUR, "--quality", "random", "--episodes", episodes, "--out", str(out)]) == 0
    one, other = dp.load(few), dp.load(many)
    for k in range(2):
        np.testing.assert_array_equal(one[k].action, other[k].action)
    assert np.abs(other[4].action - other[3].action).max() > 0.1
    assert (one.meta["quality"], one.meta["actor"]) == ("random", "UniformActor")


def test_a_replay_of_110_steps_is_their_2_whole_episodes_and_tells_who_played(tmp_path, capsys):
    argv = ["--quality", "replay", "--steps", "110", "--seed", "3", "--out", str(tmp_path / "d")]
    assert main([*DETOUR, *argv]) == 0
    assert "sac trained 110 steps: mean return" in capsys.readouterr().out
    episodes = dp.load(tmp_path / "d")
    assert episodes.length.tolist() == [48, 48]
    assert episodes.truncated.all() and not episodes.terminated.any()
    trained = episodes.meta["training"]
    assert episodes.meta["quality"] == "replay" and episodes.meta["env_id"] == "Detour-v0"
    assert (trained["steps"], trained["seed"], trained["stop_at_return"]) == (110, 3, None)
    assert trained["evaluations"] == [[110, trained["mean_return"]]]


def test_medium_says_that_a_level_was_not_reached_and_its_saved_agent_acts_again(tmp_path, capsys):
    argv = ["--quality", "medium", "--steps", "20", "--stop-at-return", "1", "--episodes", "2", "--noise", "0.1"]
    assert main([*DETOUR, *argv, "--save-agent", str(tmp_path), "--out", str(tmp_path / "d")]) == 0
    assert "it did not reach 1; for data of that level give more --steps" in capsys.readouterr().out
    assert dp.load(tmp_path / "d").meta["noise"]["std"] == 0.1
    agent = str(tmp_path / "sac-Detour-v0")
    again = [*DETOUR, "--sb3-agent", agent, "--trust-pickle", "--episodes", "1", "--out", str(tmp_path / "e")]
    assert main(again) == 0
    assert main([*DETOUR, *argv, "--save-agent", str(tmp_path), "--out", str(tmp_path / "f")]) == 2
    assert "holds an agent already" in capsys.readouterr().err


REFUSED = {
    "no steps": (["--quality", "medium"], "needs --steps"),
    "expert with a level": (["--quality", "expert", "--steps", "9", "--stop-at-return", "1"], "leave out --stop-at"),
    "random with steps": (["--quality", "random", "--steps", "9"], "leave it out"),
    "steps without quality": (["--steps", "9"], "--steps is for --quality medium"),
    "noise in a replay": (["--quality", "replay", "--steps", "9", "--noise", "1"], "leave out --noise"),
    "two agents": (["--quality", "random", "--sb3-agent", "a"], "leave out --sb3-agent"),
    "replay without an episode": (["--quality", "replay", "--steps", "9"], "before its first episode did"),
    "negative seed": (["--quality", "random", "--seed", "-1"], "--seed is -1; give 0 or more"),
    "negative noise": (["--quality", "random", "--noise", "-1"], "wanted are std >= 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_one_line_with_exit_code_2_and_leave_nothing(tmp_path, capsys, case):
    argv, words = REFUSED[case]
    assert main([*DETOUR, *argv, "--out", str(tmp_path / "d")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not list(tmp_path.iterdir())
