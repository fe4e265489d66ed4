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

from diffpolicy.agents.bc import Bc, BcConfig
from diffpolicy.agents.distill import Distill, DistillConfig
from diffpolicy.agents.mip import Mip, MipConfig
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.train import Agent, TrainConfig, train

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
        yield
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
