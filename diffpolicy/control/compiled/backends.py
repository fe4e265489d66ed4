"""Backends: ways to run the body of a network, and the chain around it, faster than PyTorch runs it line by line.

    name               device   runs                                                        packages
    eager              any      PyTorch, the chain in two stages
    inductor           any      torch.compile, weights frozen                               a C++ compiler
    cudagraph          cuda     all steps captured in one CUDA graph            -bf16   the body in bfloat16
    onnxruntime        cpu      the exported body, convolutions as products     -int8   weights of 8 bits
    openvino           cpu      likewise                                        -int8, -bf16 where the CPU has it

Each makes bodies for one batch size and may wrap the chain around them. Threads are those of PyTorch,
`get_num_threads()`; OpenVINO takes one where that is faster.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from diffpolicy.compiler import why_no_compiler
from diffpolicy.control.compiled.chain import Bodies, Chain, samples_of
from diffpolicy.control.compiled.runtimes import eight_bits, lacks_bfloat16, onnxruntime_body, openvino_body, to_onnx
from diffpolicy.diffusion.prefix import Prefix
from diffpolicy.errors import MissingExtraError, PolicyError
from diffpolicy.nets.network import Network
from diffpolicy.nets.product import Compressed, Exact, Product, least_large, with_products
from diffpolicy.policy import Policy

ChainPlan = Callable[..., torch.Tensor]  # (cond, noise, prefix=None) -> chunk
EXPORT = ("onnx", "onnxscript")


class Job:
    """A policy and a batch size to compile for; what several backends need is made once.

    Raises:
        PolicyError: if its network has no two stages, or it is guided.
    """

    def __init__(self, policy: Policy, batch_size: int) -> None:
        if policy.guidance is not None:
            raise PolicyError("this policy is guided, and neither compiled nor exported plans are; plan as it is")
        self.policy = policy
        self.batch_size = batch_size
        self.network = network_of(policy)
        self._exported: dict[Product, Any] = {}

    def blank_history(self) -> dict[str, torch.Tensor]:
        """Observations of zeros, `{name: (B, To, ...)}`."""
        spec = self.policy.spec
        return {
            name: torch.zeros(self.batch_size, spec.n_obs_steps, *shape, device=self.policy.device)
            for name, shape in spec.obs_shapes.items()
        }

    def blank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Condition of a history of zeros `(B, C)`, noise of zeros `(draws, B, Tp, Da)`."""
        policy, spec = self.policy, self.policy.spec
        cond = policy.encoder(policy.normalizer.encode_obs(self.blank_history()))
        return cond, cond.new_zeros(policy.planner.draws, self.batch_size, spec.horizon, spec.action_dim)

    def chain(self, bodies: Bodies) -> Chain:
        """Return the policy's sampler around `bodies`."""
        return Chain(self.policy, self.network, bodies, self.blank()[0].shape[1])

    def exported(self, product: Product) -> Any:
        """Return the body as an `onnx.ModelProto`: `x_t (n B, Tp, Da)`, `modulation (n B, M)` to the prediction.

        `n` is how many chunks are sampled a plan.
        """
        if product not in self._exported:
            cond, noise = self.blank()
            modulation = self.network.modulation(cond.new_ones(self.batch_size), cond)
            n, module = samples_of(self.policy), _Body(with_products(self.network, product))
            arguments = noise[0].repeat(n, 1, 1), modulation.repeat(n, 1)
            self._exported[product] = to_onnx(module, arguments, ["x_t", "modulation"], ["prediction"])
        return self._exported[product]


@dataclass(frozen=True)
class Backend:
    """A way to plan.

    Args:
        bodies: makes them.
        device: the kind it runs on, None for any.
        packages: what it imports.
        ready: says why this machine cannot run it on a kind of device, or nothing.
        wrap: makes something faster of the chain around the bodies, given example inputs.
    """

    bodies: Callable[[Job], Bodies]
    device: str | None = None
    packages: tuple[str, ...] = ()
    ready: Callable[[str], str] = lambda kind: ""
    wrap: Callable[[ChainPlan, torch.Tensor, torch.Tensor], ChainPlan] = lambda chain, cond, noise: chain

    def chain(self, job: Job, bodies: Bodies) -> ChainPlan:
        """Return the policy's sampler around `bodies`."""
        return self.wrap(job.chain(bodies), *job.blank())

    def check(self, name: str, policy: Policy) -> None:
        """Refuse what cannot run here.

        Raises:
            PolicyError: if the policy is on another device, or the machine lacks something.
            MissingExtraError: if a package is not installed.
        """
        kind = policy.device.type
        if self.device is not None and kind != self.device:
            raise PolicyError(
                f"the policy is on {kind} and the backend {name!r} runs on {self.device}; load the policy with "
                f"device={self.device!r}, or choose one of {', '.join(usable_on(kind))}"
            )
        require(self.packages, f"the backend {name!r}")
        if reason := self.ready(kind):
            raise PolicyError(f"the backend {name!r} {reason}")


def require(packages: tuple[str, ...], who: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
        MissingExtraError: then.
    """
    if missing := [package for package in packages if find_spec(package) is None]:
        raise MissingExtraError(
            f"{who} needs {', '.join(packages)}, and {', '.join(missing)} is not installed; "
            "pip install 'diffpolicy[export]', or choose another"
        )


def usable_on(kind: str) -> list[str]:
    """Names of the backends of a kind of device, `cpu` or `cuda`."""
    return [name for name, backend in BACKENDS.items() if backend.device in (None, kind)]


class _Body(nn.Module):
    """The body of a network as a module's `forward`, which is what exporters take."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        return self.network.body(x_t, modulation)


def network_of(policy: Policy) -> Network:
    """Return the policy's network.

    Raises:
        PolicyError: if it has no two stages.
    """
    network = policy.denoiser.network
    if not isinstance(network, Network):
        raise PolicyError(
            f"{type(network).__name__} is not a diffpolicy.nets.network.Network; give it the methods "
            "of_time, of_cond and body, or plan without compiling"
        )
    return network


def _eager(job: Job) -> Bodies:
    return Bodies(job.network.body, job.network.body)


def _inductor(job: Job) -> Bodies:
    from torch._inductor import config

    compiled = torch.compile(_Body(job.network), dynamic=False)

    def body(x_t: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        with config.patch(freezing=True):  # as an option of torch.compile it comes too late: tracing asks for it
            return compiled(x_t, modulation)

    return Bodies(body, body)


def compiler(kind: str) -> str:
    """Say why nothing can be compiled here for a kind of device, or nothing."""
    reason = why_no_compiler(kind)
    return reason and f"{reason}, or choose another backend"


class CapturedChain:
    """A chain as one CUDA graph: its inputs have fixed places, a plan is two copies, one launch and one copy out.

    A plan with a prefix, which may be guided in any way, is launched line by line.
    """

    def __init__(self, chain: ChainPlan, cond: torch.Tensor, noise: torch.Tensor) -> None:
        self.chain, self.cond, self.noise = chain, cond.clone(), noise.clone()
        stream = torch.cuda.Stream(cond.device)
        stream.wait_stream(torch.cuda.current_stream(cond.device))
        with torch.cuda.stream(stream):  # libraries choose kernels and allocate before anything is captured
            for _ in range(3):
                chain(self.cond, self.noise)
        torch.cuda.current_stream(cond.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        captured = torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local")  # others may allocate
        with torch.cuda.device(cond.device), captured:
            self.chunk = chain(self.cond, self.noise)

    def __call__(self, cond: torch.Tensor, noise: torch.Tensor, prefix: Prefix | None = None) -> torch.Tensor:
        """Replay on new inputs."""
        if prefix is not None:
            return self.chain(cond, noise, prefix)
        self.cond.copy_(cond)
        self.noise.copy_(noise)
        with torch.cuda.device(cond.device):
            self.graph.replay()
            return self.chunk.clone()


def _bfloat16(job: Job) -> Bodies:
    network = deepcopy(job.network).to(torch.bfloat16)

    def body(x_t: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        return network.body(x_t.bfloat16(), modulation.bfloat16()).to(x_t.dtype)

    return Bodies(job.network.body, body)


def _onnxruntime(job: Job) -> Bodies:
    body = onnxruntime_body(job.exported(Exact))
    return Bodies(body, body)


def _onnxruntime_int8(job: Job) -> Bodies:
    exact = job.exported(Exact)
    return Bodies(onnxruntime_body(exact), onnxruntime_body(eight_bits(exact, least_large(job.network))))


def _openvino(job: Job, precision: str = "f32", product: Product = Exact) -> Bodies:
    exact = openvino_body(job.exported(Exact), "f32")
    if (precision, product) == ("f32", Exact):
        return Bodies(exact, exact)
    return Bodies(exact, openvino_body(job.exported(product), precision))


OPENVINO, ONNXRUNTIME = ("openvino", *EXPORT), ("onnxruntime", *EXPORT)
BACKENDS: dict[str, Backend] = {
    "eager": Backend(_eager),
    "inductor": Backend(_inductor, ready=compiler),
    "cudagraph": Backend(_eager, "cuda", wrap=CapturedChain),
    "cudagraph-bf16": Backend(_bfloat16, "cuda", wrap=CapturedChain),
    "onnxruntime": Backend(_onnxruntime, "cpu", ONNXRUNTIME),
    "onnxruntime-int8": Backend(_onnxruntime_int8, "cpu", ONNXRUNTIME),
    "openvino": Backend(_openvino, "cpu", OPENVINO),
    "openvino-bf16": Backend(partial(_openvino, precision="bf16"), "cpu", OPENVINO, lacks_bfloat16),
    "openvino-int8": Backend(partial(_openvino, product=Compressed), "cpu", OPENVINO),
}
