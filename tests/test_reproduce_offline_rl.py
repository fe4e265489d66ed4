"""`scripts/reproduce/offline_rl`: what many runs say together against hand computations; stopping and resuming."""

import importlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gymnasium
import numpy as np
import pytest

import diffpolicy as dp
from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.errors import DiffPolicyError
from diffpolicy.tables import AGENTS
from diffpolicy.tasks import TASKS

FOLDER = Path(__file__).parents[1] / "scripts" / "reproduce" / "offline_rl"


@pytest.fixture
def results(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("results")


@pytest.fixture
def table(monkeypatch, results) -> ModuleType:
    return importlib.import_module("table")


def made(results, agent, dataset, seed, score):
    return results.Run(agent, dataset, seed, tuple(score), tuple(score), 10, 100_000, {}, {})


def test_the_interquartile_mean_of_1_to_8_with_an_outlier_is_the_mean_of_3_to_6(results):
    runs = [np.array([[1.0, 2, 3, 4]]), np.array([[5.0, 6, 7, 800]])]
    assert results.interquartile_mean(runs)[0] == 4.5
    assert results.mean_of_datasets(runs)[0] == pytest.approx((2.5 + 204.5) / 2)


def test_a_95_percent_interval_holds_the_truth_in_about_95_of_100_samples(results):
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        found = results.estimate([rng.normal(50, 20, (1, 40)), rng.normal(10, 5, (1, 40))])
        held += found.low <= 30 <= found.high
    assert 180 <= held <= 199


def test_an_interval_of_several_training_seeds_knows_that_seeds_differ(results):
    rng = np.random.default_rng(0)
    alike = rng.normal(50, 10, (3, 20))
    apart = alike + np.array([[-30.0], [0], [30]])
    narrow, wide = results.estimate([alike]), results.estimate([apart])
    assert wide.value == pytest.approx(narrow.value)
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)


def test_three_training_seeds_spread_by_the_unbiased_variance_of_their_mean(results):
    """Runs of 0, 30 and 60: 900 / 3, where drawing all three of them again would say 600 / 3."""
    draws = results._drawn([np.repeat([[0.0], [30.0], [60.0]], 20, axis=1)], 0)
    assert draws.var() == pytest.approx(300, rel=0.05)


def test_a_difference_is_that_of_the_means_of_all_seeds_and_its_variance_the_sum_of_both(results):
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(90, 20, (1, 400)), rng.normal(50, 10, (3, 400))
    table = {"idql": {"hopper-mixed": ours}, "bc": {"hopper-mixed": theirs}}
    gap = results.difference(table, "idql", "bc", ["hopper-mixed"])
    assert gap.value == pytest.approx(ours.mean() - theirs.mean())
    seeds = theirs.mean(1)
    variance = ours.var() / 400 + seeds.var(ddof=1) / 3 + theirs.var(1).mean() / 800
    assert gap.high - gap.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.05)
    assert results.difference(table, "idql", "bc", ["hopper-mixed", "walker2d-mixed"]) is None
    table["bc+narrow"] = table["bc"]  # the same networks
    assert results.difference(table, "bc+narrow", "bc", ["hopper-mixed"]) is None
    assert results.difference(table, "idql", "bc+narrow", ["hopper-mixed"]) == gap


def test_the_rate_of_one_runs_successes_has_wilsons_interval(results):
    found = results.estimate([np.repeat([100.0, 0.0], [93, 7])[None]])
    assert (found.value, found.low, found.high) == pytest.approx((93, 86.3, 96.6), abs=0.05)


def test_a_group_is_averaged_only_where_all_its_runs_are_there(results, table, tmp_path):
    for agent, dataset, score in (
        ("bc", "hopper-mixed", [40, 60]),
        ("bc", "walker2d-mixed", [10, 10]),
        ("idql", "hopper-mixed", [90, 90]),
        ("idql", "cube-single-play", [0, 100]),
    ):
        made(results, agent, dataset, 0, score).save(tmp_path / "results")
    text = table.write(results.read(tmp_path / "results"), {"hopper-mixed": 56.0}, tmp_path)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert rows["hopper-mixed"] == ["56.0", "50.0", "90.0"]
    assert rows["walker2d-mixed"] == ["", "10.0", ""]
    assert rows["**mixed**, mean"] == ["", "30.0 [25.0, 35.0]", ""]
    assert rows["cube-single-play"] == ["", "", "50.0 [9.5, 90.5]"]
    assert rows["**mixed**, training seeds"] == ["", "1", "1"]
    assert rows["**mixed**, interquartile mean of the runs"] == ["", "", ""]  # of two runs it would leave out none
    assert "after 10 gradient steps, 2 episodes a training seed" in text
    assert len(json.loads((tmp_path / "offline_rl.json").read_text())["runs"]) == 4
    assert (tmp_path / "offline_rl.png").stat().st_size > 5000


def test_training_seeds_of_a_dataset_stay_in_their_order_whatever_their_files(results, table, tmp_path):
    runs = [made(results, "bc", "hopper-mixed", seed, [seed, seed]) for seed in (2, 0, 1)]
    assert results.tabulate(runs)["bc"]["hopper-mixed"][:, 0].tolist() == [0, 1, 2]
    assert results.tabulate(runs[:2])["bc"]["hopper-mixed"][:, 0].tolist() == [0]  # seed 2 has no pair before 1 has run
    assert results.tabulate(runs[:1]) == {}
    assert "seed 0" in table.write(runs[:1], {}, tmp_path)


def hopper_data(path: Path) -> None:
    env, episodes = gymnasium.make("Hopper-v4"), []
    for seed in range(6):
        env.action_space.seed(seed)
        obs, action, reward, ended = [env.reset(seed=seed)[0]], [], [], False
        while not ended:
            action.append(env.action_space.sample())
            row, r, ended, _, _ = env.step(action[-1])
            obs.append(row)
            reward.append(r)
        arrays = ({"obs": np.array(obs, np.float32)}, np.array(action, np.float32), np.array(reward, np.float32))
        episodes.append(Episode(*arrays, True, False))
    dp.save(from_list(episodes), path)


@pytest.fixture
def script(results, table, monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline_rl_main", FOLDER / "__main__.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(importlib.sys.modules, "offline_rl_main", script)
    spec.loader.exec_module(script)
    return script


def test_a_run_stopped_twice_ends_where_an_uninterrupted_one_does_also_if_it_is_older_than_a_setting(
    script, tmp_path, monkeypatch
):
    hopper_data(tmp_path / "hopper-mixed.hdf5")
    train, stop = script.training.train, [9]

    def stopping(agent, episodes, config, folder, description):
        often = replace(config, log_every=1, checkpoint_every=1)
        for step, metrics in train(agent, episodes, often, folder, description):
            yield step, metrics
            if step == stop[0]:
                raise KeyboardInterrupt

    def run(out):
        argv = ["--datasets", "hopper-mixed", "--agents", "idql", "--episodes", "2", "--steps", "6"]
        monkeypatch.setattr("sys.argv", ["offline_rl", str(tmp_path), "--out", str(out), *argv])
        script.main()

    monkeypatch.setattr(script.training, "train", stopping)
    run(tmp_path / "whole")
    for stop[0] in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
        config = tmp_path / "parts/runs/idql-hopper-mixed-0/config.json"
        described = json.loads(config.read_text())
        described["arguments"]["idql"].pop("compile", None)
        described["versions"].pop("mujoco", None)
        config.write_text(json.dumps(described))
    run(tmp_path / "parts")
    whole, parts = (
        json.loads((tmp_path / out / "results/idql-hopper-mixed-0.json").read_text()) for out in ("whole", "parts")
    )
    assert whole == parts


def test_a_finished_run_is_not_run_again_and_one_of_other_settings_is_refused(results, script, tmp_path, monkeypatch):
    hopper_data(tmp_path / "hopper-mixed.hdf5")

    def run(*more):
        argv = [str(tmp_path), "--out", str(tmp_path / "out"), "--datasets", "hopper-mixed", "--episodes", "2"]
        monkeypatch.setattr("sys.argv", ["offline_rl", *argv, *more])
        script.main()

    run("--agents", "bc", "--steps", "3")
    first = (tmp_path / "out/results/bc-hopper-mixed-0.json").read_text()
    run("--agents", "bc", "idql", "--steps", "3")
    assert (tmp_path / "out/results/bc-hopper-mixed-0.json").read_text() == first
    found = results.tabulate(results.read(tmp_path / "out" / "results"))
    assert {agent: own["hopper-mixed"].shape for agent, own in found.items()} == {"bc": (1, 2), "idql": (1, 2)}
    assert dp.Policy.load(tmp_path / "out/runs/idql-hopper-mixed-0").selection.config.samples == 32
    run("--agents", "bc+preference", "--steps", "3")
    control, plain = (
        json.loads((tmp_path / f"out/results/{name}-hopper-mixed-0.json").read_text())
        for name in ("bc+preference", "bc")
    )
    changed = plain["settings"] | {"bc": plain["settings"]["bc"] | {"preference": 10.0}}
    assert (control["agent"], control["settings"]) == ("bc+preference", changed)
    assert control["score"] != plain["score"]
    run("--agents", "bc+narrow", "--steps", "3")  # plays the run of bc, with a quarter of the noise
    narrow = json.loads((tmp_path / "out/results/bc+narrow-hopper-mixed-0.json").read_text())
    assert narrow["settings"]["bc"].pop("sampler")["temperature"] == 0.25
    assert plain["settings"]["bc"]["sampler"]["temperature"] == 1.0
    assert narrow["score"] != plain["score"]
    assert sorted(path.name for path in (tmp_path / "out/runs").glob("bc*")) == [
        "bc+preference-hopper-mixed-0",
        "bc-hopper-mixed-0",
    ]
    (tmp_path / "out/results/bc-hopper-mixed-0.json").unlink()
    run("--agents", "bc", "--steps", "3")  # from the checkpoint of the last step: only played again
    again = json.loads((tmp_path / "out/results/bc-hopper-mixed-0.json").read_text())
    assert again["score"] == json.loads(first)["score"]
    del again["settings"]["bc"]["compile"]  # as before there was such a setting
    (tmp_path / "out/results/bc-hopper-mixed-0.json").write_text(json.dumps(again))
    run("--agents", "bc", "--steps", "3")
    with pytest.raises(DiffPolicyError, match=r"bc-hopper-mixed-0\.json is of other settings"):
        run("--agents", "bc", "--steps", "5")
    (tmp_path / "out/results/bc-hopper-mixed-0.json").unlink()
    with pytest.raises(DiffPolicyError, match="bc-hopper-mixed-0 holds a run of other settings"):
        run("--agents", "bc", "--steps", "5")
    with pytest.raises(DiffPolicyError, match="no settings for 'mip'"):
        run("--agents", "idql", "mip", "--steps", "3", "--out", str(tmp_path / "other"))
    with pytest.raises(DiffPolicyError, match=r"there is no cube-single-play-v0\.npz"):
        run("--datasets", "cube-single-play", "--agents", "bc", "--out", str(tmp_path / "other"))
    assert not list((tmp_path / "other").rglob("policy.json"))  # refused before the first run


@pytest.mark.parametrize("task", TASKS)
def test_the_settings_of_each_task_are_those_of_their_agents(task):
    settings = TASKS[task].preset.agents
    assert {name: type(value) for name, value in settings.items()} == {name: AGENTS[name].config for name in settings}
    if task in ("hopper", "walker2d", "halfcheetah"):
        assert set(settings) == set(AGENTS) - {"mip", "distill"}


def test_a_score_is_100_a_success_where_the_task_has_no_reference(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    datasets = importlib.import_module("data")
    arrays = ({"obs": np.zeros((3, 1), np.float32)}, np.zeros((2, 1), np.float32), np.zeros(2, np.float32))
    won = from_list([Episode(*arrays, False, True, {"success": np.array(s, np.float32)}) for s in ([0, 1], [0, 0])])
    assert datasets.get_dataset("cube-single-play").score(won).tolist() == [100.0, 0.0]
    with pytest.raises(DiffPolicyError, match="there is no dataset 'cube'"):
        datasets.get_dataset("cube")
