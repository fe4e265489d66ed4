"""The command line: one run from demonstrations to a comparison, and bad input in one line with exit code 2."""

import json

import h5py
import numpy as np
import pytest
from agent_cases import make
from worlds import bandit

from diffpolicy.agents.bc import Bc
from diffpolicy.cli import main
from diffpolicy.cli.evaluate import EvaluateArgs, _acting, film
from diffpolicy.data import store
from diffpolicy.data.episodes import Episodes
from diffpolicy.parts import SelectionConfig
from diffpolicy.policy import Policy
from diffpolicy.tasks import Task

FAST = ["--denoiser.down-dims", "8", "16", "--denoiser.step-embed-dim", "16", "--batch-size", "8"]
HORIZONS = ["--horizon", "4", "--n-obs-steps", "1", "--n-action-steps", "2"]


def test_collect_train_resume_evaluate_compare(tmp_path, capsys):
    demos, runs = str(tmp_path / "demos"), [str(tmp_path / name) for name in ("a", "b")]
    assert main(["collect", "--task", "detour", "--episodes", "4", "--out", demos]) == 0
    assert "4 episodes" in capsys.readouterr().out
    for run, steps in zip(runs, ("4", "6"), strict=True):
        argv = ["train", "--dataset", demos, "--task", "detour", "--out", run, "--steps", steps, *FAST, *HORIZONS]
        assert main(argv) == 0
        assert main(["evaluate", run, "--episodes", "3", "--no-video", "--device", "cpu"]) == 0
    assert main(["train", "--dataset", demos, "--out", runs[0], "--resume", "--steps", "8"]) == 0
    report = json.loads((tmp_path / "a" / "eval" / "report.json").read_text())
    assert report["env_id"] == "Detour-v0"
    assert report["episodes"] == 3
    assert report["success"]["ci95"][0] <= report["success"]["rate"] <= report["success"]["ci95"][1]
    assert (tmp_path / "a" / "eval" / "episodes.png").stat().st_size > 10_000
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["arguments"]["train"]["steps"] == 8
    assert config["arguments"]["bc"]["denoiser"]["down_dims"] == [8, 16]
    assert config["dataset"]["actor"] == "DetourExpert"
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    capsys.readouterr()
    assert main(["compare", *runs, "--out", str(tmp_path / "c.png")]) == 0
    assert "difference" in capsys.readouterr().out
    assert main(["evaluate", runs[1], "--episodes", "2", "--sampler", "heun", "--steps", "3", "--no-video",
                 "--noise-temperature", "0.5"]) == 0  # fmt: skip
    report = json.loads((tmp_path / "b" / "eval" / "report.json").read_text())
    assert (report["sampler"], report["nfe"], report["device"]) == ("heun 3", 5, "cpu")
    assert report["acting"]["sampler"] == {"sampler": "heun", "steps": 3, "eta": 0.0, "temperature": 0.5}
    assert "temperature 0.5" in capsys.readouterr().out
    argv = ["evaluate", runs[1], "--episodes", "2", "--sampler", "heun", "--steps", "3", "--no-video"]
    argv += ["--noise-temperature", "0.5", "--backend"]
    assert main([*argv, "eager"]) == 0
    compiled = json.loads((tmp_path / "b" / "eval" / "report.json").read_text())
    assert compiled["device"] == "cpu through eager"
    np.testing.assert_allclose(compiled["by_episode"]["return"], report["by_episode"]["return"], rtol=1e-3)
    assert main([*argv, "abacus"]) == 2
    assert "no backend 'abacus'" in capsys.readouterr().err


@pytest.mark.parametrize(("backend", "hinted"), [("", True), ("egl", False)])
def test_a_renderer_that_fails_costs_the_video_alone_and_says_what_to_set(monkeypatch, tmp_path, backend, hinted):
    def record(*_):
        raise RuntimeError("an OpenGL platform library has not been loaded\nmore")

    monkeypatch.setitem(film.__globals__, "record", record)
    monkeypatch.setenv("MUJOCO_GL", backend)
    told = film(None, Task("Hopper-v4"), 0, tmp_path / "episode.mp4")  # pyright: ignore[reportArgumentType]
    assert told.startswith("none: an OpenGL platform library has not been loaded")
    assert ("MUJOCO_GL=egl" in told, "more" in told) == (hinted, False)


def test_without_a_task_a_policy_is_evaluated_in_the_environment_of_its_dataset(tmp_path, capsys):
    demos, run = str(tmp_path / "demos"), str(tmp_path / "run")
    assert main(["collect", "--task", "detour", "--episodes", "2", "--out", demos]) == 0
    assert main(["train", "--dataset", demos, "--out", run, "--steps", "2", *FAST, *HORIZONS]) == 0
    assert main(["evaluate", run, "--episodes", "1", "--no-video"]) == 0
    assert "Detour-v0" in capsys.readouterr().out
    (tmp_path / "run" / "config.json").write_text("{}")
    assert main(["evaluate", run, "--episodes", "1"]) == 2
    assert "--task or --env" in capsys.readouterr().err
    assert main(["train", "--dataset", demos, "--out", run, "--resume"]) == 2
    assert "start a new run" in capsys.readouterr().err


def small_store(path, **changes) -> str:
    rng = np.random.default_rng(0)
    fields = {
        "obs": {"obs": rng.normal(size=(12, 2)).astype(np.float32)},
        "action": rng.normal(size=(10, 2)).astype(np.float32),
        "reward": np.zeros(10, np.float32),
        "length": np.array([4, 6]),
        "terminated": np.zeros(2, bool),
        "truncated": np.ones(2, bool),
    }
    return str(store.save(Episodes(**{**fields, **changes}), path))


def bad_hdf5(path, **changes) -> str:
    n = 10
    arrays = {
        "observations": np.zeros((n, 2), np.float32),
        "actions": np.zeros((n, 2), np.float32),
        "rewards": np.zeros(n, np.float32),
        "terminals": np.arange(n) == n - 1,
    }
    with h5py.File(path, "w") as file:
        for name, array in {**arrays, **changes}.items():
            if array is not None:
                file[name] = array
    return str(path)


def train_argv(dataset: str, tmp_path, *more: str) -> list[str]:
    return ["train", "--dataset", dataset, "--out", str(tmp_path / "run"), "--steps", "2", *FAST, *more]


CASES = {
    "missing file": (lambda p: train_argv(str(p / "nowhere.hdf5"), p), "there is no dataset"),
    "missing key": (lambda p: train_argv(bad_hdf5(p / "a.hdf5", rewards=None), p), "lacks rewards"),
    "lengths disagree": (
        lambda p: train_argv(bad_hdf5(p / "a.hdf5", actions=np.zeros((9, 2), np.float32)), p),
        "actions has 9 rows",
    ),
    "not finite": (
        lambda p: train_argv(bad_hdf5(p / "a.hdf5", observations=np.full((10, 2), np.inf, np.float32)), p),
        "holds inf in row 0",
    ),
    "zero episodes": (lambda p: train_argv(bad_hdf5(p / "a.hdf5", terminals=np.zeros(10, bool)), p), "zero complete"),
    "discrete actions": (
        lambda p: train_argv(bad_hdf5(p / "a.hdf5", actions=np.zeros((10, 1), np.int64)), p),
        "discrete action spaces",
    ),
    "horizon": (
        lambda p: train_argv(small_store(p / "d"), p, "--horizon", "8", "--n-action-steps", "8"),
        "exceeds horizon 8",
    ),
    "groups that do not divide": (
        lambda p: train_argv(small_store(p / "d"), p, *HORIZONS, "--denoiser.groups", "3"),
        "divisible by groups",
    ),
    "unknown task": (lambda p: train_argv(small_store(p / "d"), p, "--task", "chess"), "no task 'chess'"),
    "observations of another task": (
        lambda p: train_argv(small_store(p / "d", obs={"x": np.zeros((12, 2), np.float32)}), p, "--task", "pusht"),
        "no observation 'state'",
    ),
    "no run": (lambda p: ["evaluate", str(p / "nowhere")], "no policy"),
    "nobody to demonstrate": (
        lambda p: ["collect", "--task", "pusht", "--out", str(p / "d")],
        "nobody here can demonstrate",
    ),
    "named observations in D4RL's layout": (
        lambda p: ["collect", "--task", "pointmaze-umaze", "--episodes", "1", "--out", str(p / "d.hdf5")],
        "holds one flat array",
    ),
    "images": (
        lambda p: train_argv(small_store(p / "d", obs={"img": np.zeros((12, 4, 4, 3), np.uint8)}), p),
        "no encoder for them",
    ),
    "an observation that is not there": (
        lambda p: train_argv(small_store(p / "d"), p, "--obs", "state"),
        "no observation 'state'",
    ),
    "a share of nothing": (lambda p: train_argv("a@0+b@1", p), "share of 'a' is '0'"),
    "conversion onto something else": (
        lambda p: ["convert", small_store(p / "d"), str(p)],
        "exists and is not a dataset of ours",
    ),
    "no steps": (lambda p: train_argv(small_store(p / "d"), p, "--steps", "0"), "steps is 0; give a whole number"),
    "no windows": (lambda p: train_argv(small_store(p / "d"), p, "--batch-size", "0"), "batch_size is 0"),
    "an unknown device": (lambda p: train_argv(small_store(p / "d"), p, "--device", "gpu"), "no device 'gpu'"),
    "another task's data": (
        lambda p: train_argv(small_store(p / "d"), p, "--task", "hopper"),
        "give the --task or --env that they come from",
    ),
    "reports missing": (lambda p: ["compare", str(p / "a"), str(p / "b")], "run diffpolicy evaluate first"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(tmp_path, capsys, case):
    argv, words = CASES[case]
    command = argv(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_policy_of_other_shapes_than_the_environment_is_refused(tmp_path, capsys):
    dataset = small_store(tmp_path / "d")
    assert main(train_argv(dataset, tmp_path, *HORIZONS)) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--env", "Pendulum-v1", "--episodes", "1"]) == 2
    assert "the policy was trained on" in capsys.readouterr().err


def test_a_run_is_never_overwritten_and_only_resumed_on_its_own_data(tmp_path, capsys):
    argv = train_argv(small_store(tmp_path / "d"), tmp_path, *HORIZONS)
    assert main(argv) == 0
    assert main(argv) == 2
    assert "--resume" in capsys.readouterr().err
    other = small_store(tmp_path / "e", reward=np.ones(10, np.float32))
    assert main(["train", "--dataset", other, "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "fingerprint" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main([*argv, "--resume", "--learning-rate", "1"]) == 0
    assert "steps already: nothing was trained" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_that_was_stopped_says_what_is_saved_and_one_without_a_checkpoint_does_not_block_its_folder(
    tmp_path, capsys, monkeypatch
):
    argv = train_argv(small_store(tmp_path / "d"), tmp_path, *HORIZONS)
    original = Bc.update
    for last, words in ((0, "nothing was saved yet"), (1, "step 1 is saved; go on with --resume")):

        def update(agent, batch, last=last):
            if agent.step == last:
                raise KeyboardInterrupt
            return original(agent, batch)

        monkeypatch.setattr(Bc, "update", update)
        with pytest.raises(SystemExit) as stop:
            main([*argv, "--checkpoint-every", "1", "--steps", "3"])
        assert stop.value.code == 130
        assert f"stopped; {words}" in " ".join(capsys.readouterr().err.split())


def test_python_sees_what_the_command_line_made(tmp_path):
    assert main(train_argv(small_store(tmp_path / "d"), tmp_path, *HORIZONS)) == 0
    action, _ = Policy.load(tmp_path / "run").predict(np.zeros(2, np.float32))
    assert action.shape == (2,)
    assert np.isfinite(action).all()


def test_the_environment_named_for_training_is_played_then_and_later_unless_it_would_import_a_module(tmp_path, capsys):
    rng, run = np.random.default_rng(0), tmp_path / "run"
    sizes = {"obs": {"obs": rng.normal(size=(12, 3))}, "action": rng.normal(size=(10, 1))}
    data = small_store(tmp_path / "d", **sizes)
    meanwhile = ["--env", "Pendulum-v1", "--evaluate-every", "2", "--evaluate-episodes", "1"]
    assert main(train_argv(data, tmp_path, *HORIZONS, *meanwhile)) == 0
    assert "evaluation/return" in json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert "step 2: return -" in capsys.readouterr().err
    argv = ["evaluate", str(run), "--episodes", "1", "--no-video"]
    assert main(argv) == 0
    assert json.loads((run / "eval" / "report.json").read_text())["env_id"] == "Pendulum-v1"
    config = json.loads((run / "config.json").read_text())
    config["arguments"]["env"] = "antigravity:Pendulum-v1"
    (run / "config.json").write_text(json.dumps(config))
    assert main(argv) == 2
    assert "would import that module" in capsys.readouterr().err


def test_a_mixture_converts_trains_and_resumes_by_its_names(tmp_path, capsys):
    small_store(tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b.hdf5")]) == 0
    assert "2 episodes, 10 steps" in capsys.readouterr().out
    mixture = f"{tmp_path / 'a'}@0.9+{tmp_path / 'b.hdf5'}@0.1"
    assert main(train_argv(mixture, tmp_path, *HORIZONS)) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dataset"]["episodes"] == 4
    assert [part["share"] for part in config["dataset"]["mixture"]] == [0.9, 0.1]
    argv = ["train", "--dataset", mixture, "--out", str(tmp_path / "run"), "--resume", "--steps", "4"]
    assert main(argv) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4]


def test_zeros_are_choices_as_others_are(tmp_path):
    agent = make("diffuser", bandit(count=4), 1, selection=SelectionConfig(4, temperature=2.0))
    zeros = EvaluateArgs(tmp_path, noise_temperature=0.0, temperature=0.0, guidance_weight=0.0)
    acting = _acting(agent.policy(), zeros).acting
    assert acting["sampler"]["temperature"] == acting["selection"]["temperature"] == acting["guidance"]["weight"] == 0
    assert acting["selection"]["samples"] == 4
