"""Formats of exported policies: how each is written and read.

    onnx            policy.onnx             ONNX Runtime, any runtime that reads ONNX
    openvino        policy.xml, policy.bin  OpenVINO
    torch_export    policy.pt2              torch.export.load(path).module()(history, noise)
    aoti            policy.pt2              AOTInductor: torch._inductor.aoti_load_package(path)(history, noise), or C++

For ONNX and OpenVINO the body of the network is exported once, and its nodes put in the plan once an evaluation: they
share their weights, and the body is traced once, however many steps there are. PyTorch's formats trace all steps.

Largest difference of an action from the policy's, as a share of its range, on the 8 histories of the check, with the
quickstart's maze policy (epsilon, 0.8 M weights), and seconds of one CPU core to export it:

                    ddim 10    ddpm 10    euler 10   heun 5     dpm++2m 10
    onnx            1.2e-6     4.2e-7     1.2e-6     1.3e-6     1.1e-6        12
    openvino        9.8e-7     4.0e-7     9.8e-7     1.0e-6     1.0e-6        17
    torch_export    3.1e-6     3.4e-7     3.1e-6     3.2e-6     3.2e-6        20
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpolicy.control.compiled.backends import ONNXRUNTIME, OPENVINO, Job, compiler, require
from diffpolicy.control.compiled.chain import Bodies
from diffpolicy.control.compiled.runtimes import quiet, to_onnx
from diffpolicy.errors import PolicyError
from diffpolicy.nets.product import Exact
from diffpolicy.policy import Policy

DOMAIN = "diffpolicy"  # of the node that stands for the body while a plan is assembled
FULL_PRECISION = {"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE"}  # OpenVINO's own is bfloat16 on some

History = Mapping[str, torch.Tensor]
Run = Callable[[History, torch.Tensor], torch.Tensor]  # (history, noise) -> action (B, Ta, Da)


class Whole(nn.Module):
    """`(history, noise) -> action (B, Ta, Da)`, physical units at both ends, around bodies."""

    def __init__(self, job: Job, bodies: Bodies) -> None:
        super().__init__()
        policy = job.policy
        self.encoder, self.normalizer, self.critic = policy.encoder, policy.normalizer, policy.critic
        self.executed = policy.spec.executed
        self.chain = job.chain(bodies)

    def forward(self, history: History, noise: torch.Tensor) -> torch.Tensor:
        """Encode, sample, decode, slice."""
        cond = self.encoder(self.normalizer.encode_obs(history))
        return self.chain(cond, noise)[:, self.executed]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        suffix: of its name.
        write: to a path.
        read: from a path, ready to run.
        packages: what both import.
        device: the kind it is written on, None for the policy's own.
        ready: says why this machine cannot write it for a kind of device, or nothing.
        options: of the runtime, with which it acts as the policy does.
    """

    suffix: str
    write: Callable[[Job, Path], object]
    read: Callable[[Path], Run]
    packages: tuple[str, ...] = ()
    device: str | None = None
    ready: Callable[[str], str] = lambda kind: ""
    options: Mapping[str, str] = field(default_factory=dict)

    def check(self, name: str, policy: Policy, path: Path) -> None:
        """Refuse what cannot be written.

        Raises:
            PolicyError: if the path, the policy's device or an observation's name does not fit, or the machine lacks
                something.
            MissingExtraError: if a package is not installed.
        """
        require(self.packages, f"the format {name!r}")
        if path.suffix != self.suffix:
            raise PolicyError(f"the format {name!r} cannot be called {path.name!r}; give a name in {self.suffix}")
        if self.device not in (None, policy.device.type):
            raise PolicyError(f"the policy is on {policy.device}; load it with device={self.device!r} for {name!r}")
        if "noise" in policy.spec.obs_shapes:
            raise PolicyError("an observation is called 'noise', the name of an input of its own; rename it")
        if reason := self.ready(policy.device.type):
            raise PolicyError(f"the format {name!r} {reason}")


# --- ONNX and OpenVINO: the body is exported once, and stands K times in the plan ---


def onnx_model(job: Job) -> Any:
    """Return the whole policy as an `onnx.ModelProto`; its inputs are the observations by name, then `noise`."""

    def stand_in(x_t: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        name = f"{DOMAIN}::Body"
        return torch.onnx.ops.symbolic(name, (x_t, modulation), dtype=x_t.dtype, shape=x_t.shape, version=1)

    whole, inputs = Whole(job, Bodies(stand_in, stand_in)), [*job.policy.spec.obs_shapes, "noise"]
    return _filled_in(to_onnx(whole, _arguments(job), inputs, ["action"]), job.exported(Exact))


def _arguments(job: Job) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    with torch.no_grad():
        return job.blank_history(), job.blank()[1]


def _filled_in(plan: Any, body: Any) -> Any:
    """Return `plan` with the nodes of `body` in the place of each node of our domain; its weights stand there once.

    What an exporter writes about its own source lines and paths is left out.
    """
    nodes, ends = [], [*body.graph.input, *body.graph.output]
    shared = {weight.name: f"body.{weight.name}" for weight in body.graph.initializer} | {"": ""}
    for node in plan.graph.node:
        if node.domain != DOMAIN:
            nodes.append(_renamed(node, {}, ""))
            continue
        outer = dict(zip((end.name for end in ends), [*node.input, *node.output], strict=True))
        nodes += [_renamed(inner, shared | outer, f"{node.output[0]}.") for inner in body.graph.node]
    filled = type(plan)()
    filled.CopyFrom(plan)
    del filled.graph.node[:], filled.graph.value_info[:], filled.opset_import[:]
    del filled.graph.metadata_props[:], filled.metadata_props[:]
    filled.graph.node.extend(nodes)
    filled.graph.initializer.extend(_renamed_weight(weight) for weight in body.graph.initializer)
    filled.opset_import.extend(body.opset_import)
    return filled


def _renamed(node: Any, names: Mapping[str, str], prefix: str) -> Any:
    """Return a copy of a node whose values have their own names; those in `names` have that one."""
    copy = type(node)()
    copy.CopyFrom(node)
    copy.name = prefix + node.name
    del copy.metadata_props[:]
    copy.input[:] = [names.get(name, prefix + name) for name in node.input]
    copy.output[:] = [names.get(name, prefix + name) for name in node.output]
    return copy


def _renamed_weight(weight: Any) -> Any:
    copy = type(weight)()
    copy.CopyFrom(weight)
    copy.name = f"body.{weight.name}"
    return copy


def _write_onnx(job: Job, path: Path) -> None:
    path.write_bytes(onnx_model(job).SerializeToString())


def _read_onnx(path: Path) -> Run:
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # constants that it could not work out beforehand
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(history: History, noise: torch.Tensor) -> torch.Tensor:
        feed = {name: array.numpy() for name, array in {**history, "noise": noise}.items()}
        return torch.from_numpy(session.run(["action"], feed)[0])

    return run


def _write_openvino(job: Job, path: Path) -> None:
    openvino = import_module("openvino")
    model = openvino.Core().read_model(BytesIO(onnx_model(job).SerializeToString()))
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _read_openvino(path: Path) -> Run:
    core = import_module("openvino").Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", FULL_PRECISION)

    def run(history: History, noise: torch.Tensor) -> torch.Tensor:
        feed = {name: array.numpy() for name, array in {**history, "noise": noise}.items()}
        return torch.from_numpy(compiled(feed)["action"].copy())

    return run


# --- PyTorch's own formats: all steps, one after the other ---


def program(job: Job) -> torch.export.ExportedProgram:
    """Return the whole policy as a program of `(history, noise)`; of source lines and paths it says nothing."""
    with quiet(), torch.no_grad():
        made = torch.export.export(Whole(job, Bodies(job.network.body, job.network.body)), _arguments(job))
    for node in made.graph.nodes:
        for about in ("stack_trace", "nn_module_stack"):
            node.meta.pop(about, None)
    return made


def _read_program(path: Path) -> Run:
    with quiet():
        return torch.export.load(path).module()


def _write_aoti(job: Job, path: Path) -> None:
    with quiet(), torch.no_grad():
        torch._inductor.aoti_compile_and_package(program(job), package_path=str(path))


def _read_aoti(path: Path) -> Run:
    return torch._inductor.aoti_load_package(str(path))


def _toolchain(kind: str) -> str:
    """Say what a packaged library needs besides what runs it: it is linked here."""
    if kind == "cuda":
        from torch.utils.cpp_extension import CUDA_HOME  # looks for it at import

        if CUDA_HOME is None:
            return "needs NVIDIA's CUDA toolkit on a GPU and finds none; set CUDA_HOME, or choose torch_export"
    return compiler("cpu") or compiler(kind)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", _write_onnx, _read_onnx, ONNXRUNTIME, "cpu"),
    "openvino": Format(".xml", _write_openvino, _read_openvino, OPENVINO, "cpu", options=FULL_PRECISION),
    "torch_export": Format(".pt2", lambda job, path: torch.export.save(program(job), path), _read_program),
    "aoti": Format(".pt2", _write_aoti, _read_aoti, ready=_toolchain),
}
