"""Export: every file acts as the policy does, says what it is, and runs where this library is not."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from worlds import babble

from diffpolicy.cli import main
from diffpolicy.control.compiled import formats
from diffpolicy.control.compiled.backends import Job
from diffpolicy.control.compiled.export import LIMIT, export
from diffpolicy.control.compiled.formats import FORMATS, Format, onnx_model
from diffpolicy.control.compiled.plan import example, share_of_range
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.errors import MissingExtraError, PolicyError
from diffpolicy.nets.product import Exact
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
from diffpolicy.rollout import make_env

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_exported.py"
MAZE = {"observation": 4, "achieved_goal": 2, "desired_goal": 2}
QUICK = [name for name in FORMATS if name != "aoti"]  # which compiles C++
ANY = [SamplerConfig(name, 2) for name in SAMPLERS if name not in MOST_STEPS] + [SamplerConfig("ddim", 3, 0.7)]


@cache
def make_policy(sampler: SamplerConfig = ANY[0], network: str = "mlp", samples: int = 1, heat: float = 0.0) -> Policy:
    """An untrained policy with the sizes of a maze's; with several samples a critic chooses among them."""
    episodes = babble(MAZE)
    spec = Spec.from_episodes(episodes, horizon=8, n_obs_steps=2, n_action_steps=3)
    normalizer = Normalizer.fit(episodes, {"observation": ("limits", "limits", "angle", "standard")})
    config = DenoiserConfig(
        network, (16, 32), 3, step_embed_dim=16, hidden_dim=32, depth=2, obs_embed_dim=8, prediction="v_prediction"
    )
    torch.manual_seed(0)
    parts = make_encoder(config, spec, normalizer), make_denoiser(config, spec, normalizer), config, sampler
    critic = CriticConfig(hidden=(16,), aggregate="lower_bound")
    choice = Selection(make_critic(critic, spec, normalizer), critic, SelectionConfig(samples, heat))
    return Policy(spec, normalizer, *parts, 7, choice if samples > 1 else None)


@pytest.fixture(scope="module")
def models() -> Callable[[SamplerConfig], Any]:
    """One export of the body for all samplers, and one plan a sampler: they are the slow part."""
    require_format("onnx", make_policy())
    body = Job(make_policy(), 1).exported(Exact)

    @cache
    def model(sampler: SamplerConfig) -> Any:
        job = Job(make_policy(sampler), 1)
        job.exported = lambda product: body
        return onnx_model(job)

    return model


@pytest.fixture
def shared(models, monkeypatch) -> None:
    """ONNX and OpenVINO files of `make_policy(sampler)` come from the same model."""
    monkeypatch.setattr(formats, "onnx_model", lambda job: models(job.policy.sampler_config))


def assert_acts_as(policy: Policy, path: Path, kind: str, batch_size: int = 1) -> None:
    """On histories and noise that the check at export has not seen."""
    run = FORMATS[kind].read(path)
    for seed in range(100, 103):
        history, noise = example(policy, batch_size, seed, edges=seed == 102)
        action = run(history, noise)
        assert action.shape == (batch_size, 3, 2)
        assert share_of_range(policy, action, policy.plan(history, noise)[:, 1:4]) < LIMIT


def require_format(kind: str, policy: Policy) -> None:
    try:
        FORMATS[kind].check(kind, policy, Path(f"policy{FORMATS[kind].suffix}"))
    except (MissingExtraError, PolicyError) as error:
        pytest.skip(str(error))


def exported(kind: str, policy: Policy, folder: Path, batch_size: int = 1) -> Path:
    require_format(kind, policy)
    return export(policy, folder / f"policy{FORMATS[kind].suffix}", kind, batch_size).path


@pytest.mark.parametrize("sampler", ANY, ids=lambda sampler: f"{sampler.sampler}-{sampler.steps}")
@pytest.mark.parametrize("kind", QUICK)
def test_a_file_acts_as_the_policy_within_1e_4_of_the_action_range_under_every_sampler(kind, sampler, tmp_path, shared):
    policy = make_policy(sampler)
    assert_acts_as(policy, exported(kind, policy, tmp_path), kind)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ANY, ids=lambda sampler: f"{sampler.sampler}-{sampler.steps}")
def test_a_program_of_aot_inductor_acts_as_the_policy_under_every_sampler(sampler, tmp_path):
    policy = make_policy(sampler)
    assert_acts_as(policy, exported("aoti", policy, tmp_path), "aoti")


@pytest.mark.parametrize("name", MOST_STEPS)
def test_a_network_trained_for_one_sampler_alone_is_exported_with_it(name, tmp_path):
    policy = make_policy(SamplerConfig(name, 1))
    assert_acts_as(policy, exported("torch_export", policy, tmp_path), "torch_export")


@pytest.mark.parametrize(("kind", "batch_size"), [("onnx", 3), pytest.param("openvino", 1, marks=pytest.mark.slow)])
def test_a_u_net_of_4_steps_is_one_file_that_holds_its_weights_once(kind, batch_size, tmp_path):
    policy = make_policy(SamplerConfig("ddim", 4), "unet1d")
    path = exported(kind, policy, tmp_path, batch_size)
    assert_acts_as(policy, path, kind, batch_size)
    weights = 4 * sum(p.numel() for p in policy.denoiser.parameters())
    held = (path.with_suffix(".bin") if kind == "openvino" else path).stat().st_size
    # of the first stage only the condition's share is kept; a transposed convolution becomes a product half zeros
    assert 0.75 * weights < held < 2 * weights + 150_000
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        {"onnx": ["policy.onnx", "policy.onnx.json"], "openvino": ["policy.bin", "policy.xml", "policy.xml.json"]}[kind]
    )


@pytest.mark.parametrize("heat", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_the_best_of_4_samples_is_chosen_inside_the_file(kind, heat, tmp_path):
    policy = make_policy(samples=4, heat=heat)
    path = exported(kind, policy, tmp_path)
    assert_acts_as(policy, path, kind)
    described = json.loads(Path(f"{path}.json").read_text())
    assert described["samples"] == 4 and described["noise"]["shape"] == [8 + (heat > 0), 1, 8, 2]


def test_every_draw_of_the_noise_is_an_input_and_changes_the_action(tmp_path, shared):
    policy = make_policy(SamplerConfig("ddpm", 3))
    run = FORMATS["onnx"].read(exported("onnx", policy, tmp_path))
    history, noise = example(policy, 1, 0)
    action = run(history, noise)
    assert torch.equal(action, run(history, noise))
    for draw in range(3):
        other = noise.clone()
        other[draw] = -other[draw]
        assert share_of_range(policy, run(history, other), action) > 0.01


def test_the_description_says_what_a_control_script_has_to_know(tmp_path):
    policy = make_policy(SamplerConfig("heun", 2))
    path = exported("onnx", policy, tmp_path, batch_size=3)
    described = json.loads(Path(f"{path}.json").read_text())
    assert described["observations"]["observation"]["shape"] == [3, 2, 4]
    assert described["noise"] == {
        "shape": [1, 3, 8, 2],
        "dtype": "float32",
        "distribution": "standard normal",
        "seed": 7,
    }
    assert described["action"]["shape"] == [3, 3, 2]
    assert described["action"]["high"] == policy.normalizer["action"].maximum.tolist()
    assert described["sampler"]["sampler"] == "heun" and described["sampler"]["evaluations"] == 3
    assert [described[key] for key in ("horizon", "n_obs_steps", "n_action_steps", "control_period")] == [8, 2, 3, None]
    assert described["options"] == {} and FORMATS["openvino"].options["INFERENCE_PRECISION_HINT"] == "f32"
    assert 0 <= described["parity"]["difference"] < described["parity"]["limit"] == 1e-4


@pytest.mark.parametrize("kind", QUICK)
def test_a_file_says_nothing_of_the_machine_it_was_made_on(kind, tmp_path, shared):
    exported(kind, make_policy(), tmp_path)
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for told in (Path(formats.__file__).parents[1], Path(torch.__file__).parent, tmp_path):
        assert str(told).encode() not in content


def test_a_file_that_acts_otherwise_is_refused_with_the_difference_and_what_was_there_stays(monkeypatch, tmp_path):
    kind = FORMATS["torch_export"]

    def off(path: Path):
        run = kind.read(path)
        return lambda history, noise: run(history, noise) + 4e-4  # the action's range is almost 2

    monkeypatch.setitem(FORMATS, "off", replace(kind, read=off))
    (tmp_path / "policy.pt2").write_text("the one before")
    with pytest.raises(
        PolicyError, match=r"differs from the policy's by 2\.\de-04 of its range, limit 1e-04"
    ) as caught:
        export(make_policy(), tmp_path / "policy.pt2", "off")
    assert "\n" not in str(caught.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the one before"]


def test_what_cannot_be_exported_is_refused_in_one_sentence_before_anything_is_written(monkeypatch, tmp_path):
    policy = make_policy()
    monkeypatch.setitem(FORMATS, "later", Format(".later", print, print, ready=lambda kind: "needs a compiler"))  # type: ignore
    monkeypatch.setitem(FORMATS, "cuda", Format(".engine", print, print, device="cuda"))  # type: ignore
    monkeypatch.setitem(FORMATS, "absent", Format(".absent", print, print, packages=("no_such_package",)))  # type: ignore
    for path, kind, batch_size, words in (
        ("policy.onnx", "tensorrt", 1, "choose one of onnx, openvino"),
        ("policy.onnx", "openvino", 1, "give a name in .xml"),
        ("policy.onnx", "onnx", 0, "batch_size is 0"),
        ("policy.later", "later", 1, "needs a compiler"),
        ("policy.engine", "cuda", 1, "load it with device='cuda'"),
        ("policy.absent", "absent", 1, "no_such_package is not installed"),
    ):
        with pytest.raises((PolicyError, MissingExtraError), match=words) as caught:
            export(policy, tmp_path / "new" / path, kind, batch_size)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_file_and_says_how_close_it_is(tmp_path, capsys, shared):
    require_format("onnx", make_policy())
    run = make_policy().save(tmp_path / "run")
    out = tmp_path / "policy.onnx"
    assert main(["export", str(run), "--format", "onnx", "-o", str(out), "--sampler", "heun", "--steps", "2"]) == 0
    assert "limit 1e-04" in capsys.readouterr().out
    assert_acts_as(make_policy().with_sampler(SamplerConfig("heun", 2)), out, "onnx")
    assert main(["export", str(run), "-o", str(tmp_path / "policy.bin")]) == 2
    assert capsys.readouterr().err.startswith("error: the format 'onnx'")


def test_a_process_without_torch_and_this_library_plays_a_maze_as_the_policy_does(tmp_path, shared):
    pytest.importorskip("gymnasium_robotics")
    policy = make_policy(SamplerConfig("ddpm", 2))
    path = exported("onnx", policy, tmp_path)
    script = f"""
import sys, runpy
sys.modules.update(torch=None, diffpolicy=None, diffpolicy_envs=None)
import gymnasium, gymnasium_robotics, numpy
gymnasium.register_envs(gymnasium_robotics)
env = gymnasium.make("PointMaze_UMaze-v3", continuing_task=False, max_episode_steps=40)
play = runpy.run_path({str(SCRIPT)!r})["play"]
numpy.save({str(tmp_path / "actions.npy")!r}, [play({str(path)!r}, env, episode)[0] for episode in (0, 1)])
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=120)
    played = np.load(tmp_path / "actions.npy")
    assert played.shape == (2, 40, 2)
    env = make_env("PointMaze_UMaze-v3", continuing_task=False, max_episode_steps=40)
    state = None
    for episode, actions in enumerate(played):
        obs, _ = env.reset(seed=100_000 + episode)
        for step, action in enumerate(actions):
            own, state = policy.predict(obs, state, np.array([step == 0]))
            np.testing.assert_allclose(action, own, atol=1e-4)
            obs = env.step(own)[0]


def test_the_script_needs_numpy_gymnasium_and_onnxruntime_only():
    imported = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert set(imported) <= {"json", "sys", "pathlib", "gymnasium", "gymnasium_robotics", "numpy", "onnxruntime"}
    assert gymnasium.__name__ in imported
