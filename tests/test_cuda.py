"""Training, sampling and control on a GPU, pretended where there is none: values are the CPU's, and nothing waits."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from agent_cases import AGENTS, EULER, FLOW, UNET
from pretended_cuda import Generator, PretendedCuda
from worlds import bandit

from diffpolicy import compiler
from diffpolicy.agents.bc import Bc, BcConfig
from diffpolicy.agents.distill import Distill, DistillConfig
from diffpolicy.agents.mip import Mip, MipConfig
from diffpolicy.control import compile_plan
from diffpolicy.control.compiled.formats import FORMATS
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.order import Order
from diffpolicy.data.spec import Spec
from diffpolicy.errors import SpecError, TrainingError
from diffpolicy.learning.descent import compile_training
from diffpolicy.precision import full_precision
from diffpolicy.train import Agent, TrainConfig, fit, train

EPISODES = bandit(40, steps=4)
SPEC = Spec.from_episodes(EPISODES, horizon=4, n_obs_steps=1, n_action_steps=2)
MODELS = {
    **AGENTS,
    "bc, U-Net": (Bc, BcConfig(UNET, EULER)),
    "bc, continuing chunks": (Bc, BcConfig(replace(UNET, max_delay=2), EULER)),
    "mip": (Mip, MipConfig(replace(FLOW, prediction="sample"))),
    "distill": (Distill, DistillConfig()),
}


@pytest.fixture
def cuda():
    """The GPU that there is, asked to refuse what waits for it; or a pretended one."""
    if not torch.cuda.is_available():
        with PretendedCuda() as pretended:
            yield pretended
        return
    yield None


@contextmanager
def waiting_for_nothing(cuda: PretendedCuda | None):
    """Fail if anything within waits for the GPU."""
    if cuda is None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        before = cuda.waits.copy()
        yield
        assert not cuda.waits - before


def test_the_pretended_gpu_refuses_and_counts_what_a_gpu_does():
    with PretendedCuda() as cuda:
        here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
        assert (here.device.type, there.device.type, (there * 2).device.type) == ("cpu", "cuda", "cuda")
        for mixed in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: torch.nn.functional.linear(there, torch.nn.Linear(3, 2).weight),
            lambda: here[there.long()],
            lambda: torch.randn(3, generator=torch.Generator("cuda")),
            lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            lambda: there.__setitem__(0, here),
            lambda: there.pin_memory(),
        ):
            with pytest.raises(RuntimeError, match=r"on (cuda|cpu|the CPU)"):
                mixed()
        for host in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="move it to the host first"):
                host()
        cuda.waits.clear()
        there[0] = 0.0
        here.to("cuda", non_blocking=True)
        assert (there + here.sum() + torch.ones_like(there)).double().to("cuda").device.type == "cuda"
        assert not cuda.waits
        for waiting in (
            lambda: float(there.sum()),
            lambda: there.cpu(),
            lambda: there[there > 1],
            lambda: there[torch.tensor([1])],
            lambda: here.to("cuda"),
            lambda: torch.tensor(1.0, device="cuda"),
            lambda: there.new_tensor([1.0]),
            lambda: there.clone().copy_(here),
            lambda: bool(there.sum() > 1),
            lambda: there.nonzero(),
        ):
            before = cuda.waits.total()
            waiting()
            assert cuda.waits.total() == before + 1
        assert torch.equal(there[1:].cpu(), here[1:])
        net = torch.nn.Linear(3, 2).to("cuda")
        net(there).sum().backward()
        assert {x.device.type for p in net.parameters() for x in (p, p.grad, p.data)} == {"cuda"}
    assert torch.Generator is not Generator and torch.zeros(1).device.type == "cpu"


def make(name: str, device: str, folder: Path) -> Agent:
    agent, config = MODELS[name]
    normalizer = Normalizer.fit(EPISODES, {"obs": "none"})
    if agent is Distill:
        teacher = Bc(SPEC, normalizer, BcConfig(FLOW, EULER), 0).policy().save(folder / "teacher")
        config = config.taught_by(str(teacher))
    return agent(SPEC, normalizer, config, 10, device, 0)


@pytest.mark.parametrize("name", MODELS)
def test_an_update_learns_what_it_learns_on_a_cpu_and_waits_for_nothing(cuda, name, tmp_path):
    losses = {}
    for device in ("cpu", "cuda"):
        agent = make(name, device, tmp_path)
        windows = agent.windows(EPISODES, torch.device(device))
        assert {tensor.device.type for tensor in agent.model.parameters()} == {device}
        batches = [agent.normalizer.encode(windows.gather(torch.arange(16) + i)) for i in range(4)]
        agent.update(batches[0])  # the first may
        with waiting_for_nothing(cuda) if device == "cuda" else nullcontext():
            metrics = [agent.update(batch) for batch in batches[1:]]
        assert {value.device.type for value in metrics[-1].values() if isinstance(value, torch.Tensor)} == {device}
        losses[device] = [float(each["loss"]) for each in metrics]
    if cuda is not None:  # a GPU draws other numbers
        assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5)


@pytest.mark.parametrize("name", ["bc, U-Net", "idql", "fql", "diffuser"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(cuda, name, tmp_path):
    config = TrainConfig(steps=8, batch_size=16, log_every=2, validate_every=4, checkpoint_every=4, device="cuda")
    logged, states = {}, {}
    for run, stops in (("whole", [None]), ("parts", [4, None])):
        for stop in stops:
            agent = make(name, "cuda", tmp_path)
            for step, _ in train(agent, EPISODES, config, tmp_path / run, {}):
                if step == stop:
                    break
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        logged[run] = [json.loads(line) | {"samples_per_s": 0} for line in lines]
        states[run] = [tensor.cpu() for tensor in agent.model.state_dict().values()]
        assert np.isfinite(logged[run][-1]["validation/loss"])
    if cuda is not None:  # a GPU's sums have no fixed order
        assert logged["whole"] == logged["parts"]
        assert all(torch.equal(a, b) for a, b in zip(states["whole"], states["parts"], strict=True))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_loss_that_is_no_number_is_found_when_something_is_logged_and_its_own_batch_is_saved(device, tmp_path):
    agent = make("idql", device, tmp_path)
    windows = agent.windows(EPISODES, torch.device("cpu"))  # too large for the GPU
    order, update = Order(len(windows), 16, 0), agent.update

    def spoiled(batch):
        found = update(batch)
        return {**found, "loss": found["loss"] * (torch.nan if agent.step == 3 else 1.0)}

    agent.update = spoiled
    with pytest.raises(TrainingError, match="became not a number at step 3"):
        for _ in fit(agent, windows, TrainConfig(steps=10, batch_size=16, log_every=5), tmp_path):
            pass
    with np.load(tmp_path / "nan_batch.npz") as saved:
        expected = agent.normalizer.encode(windows.gather(order(2)).to(agent.device)).action.cpu().numpy()
        np.testing.assert_array_equal(saved["action"], expected)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_plans_convolve_in_float32_and_what_was_allowed_before_is_again_afterwards(device, tmp_path, monkeypatch):
    policy, seen = make("bc, U-Net", device, tmp_path).policy(), []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    policy.encoder.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    for planning in (policy, policy.with_plan(compile_plan(policy, 1, "eager"))):
        planning.predict({"obs": np.zeros((1, 1), np.float32)})
    with full_precision(torch.device("cpu")):
        seen.append(torch.backends.cudnn.allow_tf32)
    assert seen == [False] * (len(seen) - 1) + [True] and len(seen) > 2
    assert torch.backends.cudnn.allow_tf32


def test_what_compiling_for_a_gpu_lacks_is_said_before_the_first_step(monkeypatch):
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    assert compiler.why_no_compiler("cuda") == "needs triton, and it is not installed; pip install triton"
    monkeypatch.setattr(compiler, "find_spec", lambda name: name)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name if name == "clang" else None)
    assert compiler.why_no_compiler("cuda") == ""
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert compiler.why_no_compiler("cuda").startswith("needs a C compiler and finds no gcc nor clang; install it")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    assert FORMATS["aoti"].ready("cuda").startswith("needs NVIDIA's CUDA toolkit")
    with pytest.raises(SpecError, match="--compile needs a C compiler"):
        compile_training(torch.nn.Linear(1, 1), torch.device("cuda"))
