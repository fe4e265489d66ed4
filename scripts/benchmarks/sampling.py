"""Benchmark of sampling: a compiled plan beside the plain U-Net in eager mode under `diffusers`' DDIM of 10 steps.

    python scripts/benchmarks/sampling.py [--device cuda] [--threads 2] [--only cpu-b1-5m] [--quick]

Both have the same weights and get the same noise; they alternate in one process, six plans each, and a figure is the
median. The memory bound is what reading the network's weights once an evaluation would take at the bandwidth measured
here.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from measuring import medians, where
from plain import PlainUNet
from torch import nn

from diffpolicy.control.compiled.plan import compile_plan, example, share_of_range
from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.nets.unet1d import Level, UNet1d
from diffpolicy.parts import DenoiserConfig, SamplerConfig, make_denoiser, make_encoder
from diffpolicy.policy import Policy
from diffpolicy.precision import full_precision

RESULTS = Path(__file__).parent / "results"
CANONICAL = (256, 512, 1024)  # 65.78 M with kernel 5, actions of 2, condition of 40
FIVE_MILLION = (64, 128, 256)  # 5.41 M likewise
STEPS = 10
BLOCK = 6
"""Plans in a row: so a robot plans, while right after another runtime its threads still wait on the cores."""


@dataclass(frozen=True)
class Row:
    """A case: backends to choose from, in the order of preference of ties."""

    name: str
    dims: tuple[int, int, int]
    batch_size: int
    backends: tuple[str, ...]
    bytes_a_weight: int


ROWS = {
    "cpu": (
        Row("cpu-b1-canonical", CANONICAL, 1, ("openvino", "onnxruntime", "inductor", "eager"), 4),
        Row("cpu-b1-canonical-compressed", CANONICAL, 1, ("openvino-int8", "openvino-bf16", "onnxruntime-int8"), 1),
        Row("cpu-b1-5m", FIVE_MILLION, 1, ("openvino", "onnxruntime", "inductor", "eager"), 4),
        Row("cpu-b1-5m-compressed", FIVE_MILLION, 1, ("openvino-int8", "openvino-bf16", "onnxruntime-int8"), 1),
    ),
    "cuda": (
        Row("gpu-b1-canonical", CANONICAL, 1, ("cudagraph", "inductor", "eager"), 4),
        Row("gpu-b1-canonical-bf16", CANONICAL, 1, ("cudagraph-bf16",), 2),
        Row("gpu-b1024-canonical", CANONICAL, 1024, ("cudagraph", "inductor", "eager"), 4),
        Row("gpu-b1024-canonical-bf16", CANONICAL, 1024, ("cudagraph-bf16",), 2),
    ),
}


def make_policy(dims: tuple[int, ...], device: torch.device) -> Policy:
    """An untrained policy with Push-T's sizes: 20 observed numbers over 2 steps, 16 actions of 2."""
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(201, 20)).astype(np.float32), rng.uniform(-1, 1, (200, 2)).astype(np.float32)
    episodes = from_list([Episode({"obs": obs}, action, np.zeros(200, np.float32), False, True)])
    spec, normalizer = Spec.from_episodes(episodes, 16, 2, 8), Normalizer.fit(episodes)
    config = DenoiserConfig(down_dims=dims)
    torch.manual_seed(0)
    denoiser, encoder = make_denoiser(config, spec, normalizer), make_encoder(config, spec, normalizer)
    return Policy(spec, normalizer, encoder, denoiser, config, SamplerConfig("ddim", STEPS)).to(device)


def plain_network(network: UNet1d, dims: tuple[int, int, int]) -> PlainUNet:
    """The plain network with the weights of ours."""
    plain, modules = PlainUNet(2, 40, dims), []
    for part in (network.down, network.up):
        levels = [level for level in part if isinstance(level, Level)]
        resamples = [level.resample for level in levels if not isinstance(level.resample, nn.Identity)]
        modules.append([[block for level in levels for block in (level.first, level.second)], resamples])
    mine = [network.time.net, *modules[0][0], *modules[0][1], *network.mid, *modules[1][0], *modules[1][1]]
    theirs = [plain.time, *plain.down, *plain.halve, *plain.mid, *plain.up, *plain.upsample]
    pairs = [*zip(theirs, mine, strict=True), (plain.head[:3], network.head[0]), (plain.head[3], network.head[1])]
    for to, of in pairs:
        for a, b in zip(to.parameters(), of.parameters(), strict=True):
            a.data.copy_(b)
    return plain.eval()


def plain_plan(policy: Policy, dims: tuple[int, int, int]) -> Callable[..., torch.Tensor]:
    """What a careful person writes first: encode, `diffusers`' DDIM around the plain network, decode."""
    network = plain_network(policy.denoiser.network, dims).to(policy.device)  # pyright: ignore[reportArgumentType]
    scheduler = DDIMScheduler(
        100, beta_schedule="squaredcos_cap_v2", clip_sample=True, prediction_type="epsilon", timestep_spacing="trailing"
    )

    @torch.inference_mode()
    def plan(history: dict[str, torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
        cond = policy.normalizer.encode_obs(history)["obs"].flatten(1)
        scheduler.set_timesteps(STEPS, device=noise.device)
        x = noise[0]
        for k in scheduler.timesteps:
            eps = network(x, k.expand(len(x)), cond)
            x = scheduler.step(eps, k, x, use_clipped_model_output=True).prev_sample  # pyright: ignore
        return policy.normalizer.decode_action(x)

    return plan


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of summing 512 MB of float32, which no cache holds."""
    data = torch.ones(2**27, device=device)
    return data.numel() * 4 / medians([lambda: data.sum()], 8, device)[0]


def bench(row: Row, samples: int, device: torch.device) -> dict[str, Any]:
    """Measure every backend of a row beside the plain way; the row's figure is the fastest one's."""
    policy = make_policy(row.dims, device)
    theirs, case = plain_plan(policy, row.dims), example(policy, row.batch_size, 0)
    plans, left_out = {}, {}
    for backend in row.backends:
        try:
            plans[backend] = compile_plan(policy, row.batch_size, backend)
        except Exception as error:  # what is not installed, or not accurate enough, is reported
            left_out[backend] = str(error).splitlines()[0]
    if not plans:
        raise SystemExit(f"{row.name}: no backend of {row.backends} can run: {left_out}")
    runs = [lambda: theirs(*case), *((lambda plan=plan: plan(*case)) for plan in plans.values())]
    with full_precision(device):  # the plain one as ours
        peer, *ours = (1e3 * seconds for seconds in medians(runs, samples, device, BLOCK))
        plain = theirs(*case)
    by_backend = dict(zip(plans, ours, strict=True))
    best = min(by_backend, key=by_backend.__getitem__)
    weights = sum(p.numel() for p in policy.denoiser.parameters())
    bandwidth = read_bandwidth(device)
    result = {
        "name": row.name,
        "ours": by_backend[best],
        "peer": peer,
        "ratio": peer / by_backend[best],
        "unit": "ms a plan",
        "backend": best,
        "by_backend": by_backend,
        "left_out": left_out,
        "difference": share_of_range(policy, plans[best](*case), plain),
        "weights": weights,
        "bandwidth_gb_s": bandwidth / 1e9,
        "memory_bound_ms": 1e3 * STEPS * weights * row.bytes_a_weight / bandwidth,
        "samples": samples * BLOCK,
        **where(device),
    }
    print(
        f"{row.name:<28} ours {result['ours']:8.2f} ms ({best})   plain {peer:8.2f} ms   ratio {result['ratio']:.2f}   "
        f"difference {result['difference']:.1e}   memory bound {result['memory_bound_ms']:.1f} ms"
    )
    for name, milliseconds in by_backend.items():
        print(f"    {name:<20} {milliseconds:8.2f} ms   ratio {peer / milliseconds:.2f}")
    for name, why in left_out.items():
        print(f"    {name:<20} {why}")
    return result


def main() -> None:
    """Run the rows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=tuple(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of rows; nothing is written")
    parser.add_argument("--quick", action="store_true", help="few samples, to see that it runs; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for row in ROWS[args.device] if not args.only or row.name in args.only]
    results = [bench(row, 1 if args.quick else 8, torch.device(args.device)) for row in rows]
    if not args.quick and not args.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"sampling-{args.device}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
