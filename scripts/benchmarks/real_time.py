"""Benchmark of the control loop on the wall clock: 50 Hz for 60 s beside a plan that takes 100 ms.

    python scripts/benchmarks/real_time.py [--seconds 60] [--hz 50] [--plan-ms 100] [--run runs/arm] [--quick]

Lateness is by how much each beat came after its moment on a grid that does not drift; a beat that is late by over half
a period is skipped and counted as missed by a whole one. The plan is the U-Net of a run, or one of 0.8 M with weights
as they are made, under real-time chunking; what it lacks to `--plan-ms` it computes on: it holds the interpreter and a
core as a network does, and does not sleep. Memory is that of the process (VmRSS) at the start of the run, once
everything has been used, and at its end.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import where

from diffpolicy.control import Limits, RealTime, Runner, Safety
from diffpolicy.control.report import Report
from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.prefix import Prefix
from diffpolicy.parts import DenoiserConfig, SamplerConfig, make_denoiser, make_encoder
from diffpolicy.policy import Policy

RESULTS = Path(__file__).parent / "results"


class Lasting:
    """A policy whose plans take `seconds` at least: it works on after the plan until then."""

    def __init__(self, policy: Policy, seconds: float) -> None:
        self.policy, self.seconds = policy, seconds
        self.spec, self.normalizer, self.device = policy.spec, policy.normalizer, policy.device
        self.draws, self.max_delay = policy.draws, policy.max_delay
        self.took: list[float] = []

    def plan(
        self, history: Mapping[str, torch.Tensor], noise: torch.Tensor, prefix: Prefix | None = None
    ) -> torch.Tensor:
        """Plan, then compute until the time is over."""
        begin = time.perf_counter()
        chunk = self.policy.plan(history, noise, prefix)
        work = torch.ones(128, 128)
        while time.perf_counter() - begin < self.seconds:
            work = (work @ work).clamp(0, 1)
        self.took.append(time.perf_counter() - begin)
        return chunk


def untrained(rate_hz: float) -> Policy:
    """A policy of two joints, its network of 0.8 M as it is made."""
    rng = np.random.default_rng(0)
    obs, action = rng.uniform(-1, 1, (101, 4)).astype(np.float32), rng.uniform(-1, 1, (100, 2)).astype(np.float32)
    episode = Episode({"obs": obs}, action, np.zeros(100, dtype=np.float32), terminated=False, truncated=True)
    normalizer = Normalizer.fit(from_list([episode]))
    spec = Spec({"obs": (4,)}, action_dim=2, horizon=32, n_obs_steps=2, n_action_steps=10, control_period=1 / rate_hz)
    config = DenoiserConfig(down_dims=(32, 64, 128), kernel_size=3, step_embed_dim=64, prediction="v_prediction")
    torch.manual_seed(0)
    denoiser, encoder = make_denoiser(config, spec, normalizer), make_encoder(config, spec, normalizer)
    return Policy(spec, normalizer, encoder, denoiser, config, SamplerConfig(steps=5))


def memory_mb() -> float:
    """Resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def drive(policy: Lasting, hz: float, seconds: float) -> tuple[Report, dict[str, float]]:
    """Run an arm that does at once as it is told; return what happened, and memory at the start and the end."""
    dim, sizes = policy.spec.action_dim, {name: int(np.prod(s)) for name, s in policy.spec.obs_shapes.items()}
    at, memory = [np.zeros(dim)], {}
    writes = 0

    def read() -> dict[str, np.ndarray]:
        return {
            name: np.resize(at[0], policy.spec.obs_shapes[name]).astype(np.float32)
            for name, size in sizes.items()
            if size
        }

    def write(action: np.ndarray) -> None:
        nonlocal writes
        at[0], writes = action, writes + 1
        if writes == round(2 * hz):  # every code path has been taken, every buffer made
            memory["start"] = memory_mb()

    runner = Runner(policy, hz, RealTime(), Safety(Limits(velocity=20.0, acceleration=200.0)))
    report = runner.run(read, write, start=np.zeros(dim), seconds=seconds)
    memory["end"] = memory_mb()
    return report, memory


def result_of(args: argparse.Namespace, report: Report, memory: dict[str, float], policy: Lasting) -> dict[str, Any]:
    """Return the row of the results; a missed beat counts as late by a period each."""
    late = 1e3 * np.concatenate([report.lateness, np.full(report.missed, 1 / args.hz)])
    p50, p99 = np.percentile(late, [50, 99])
    plans, delays = 1e3 * np.array(policy.took), list(report.counts.delays) or [0]
    return {
        "name": f"cpu-{args.hz:g}hz-{args.seconds:g}s-plan-{args.plan_ms:g}ms",
        "ended": report.reason,
        "late_ms": {"p50": float(p50), "p99": float(p99), "max": float(late.max())},
        "beats": len(report.lateness),
        "missed": report.missed,
        "plan_ms": {"p50": float(np.median(plans)), "max": float(plans.max())},
        "plans": report.counts.plans,
        "delay_actions": {"p50": float(np.median(delays)), "max": max(delays)},
        "over_budget": report.counts.over_budget,
        "memory_mb": memory,
        **where(),
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--hz", type=float, default=50.0)
    parser.add_argument("--plan-ms", type=float, default=100.0)
    parser.add_argument("--run", type=Path, help="a trained policy, trained at this rate, instead of the untrained one")
    parser.add_argument("--threads", type=int, default=1, help="of a plan: the loop wants a core of its own")
    parser.add_argument("--quick", action="store_true", help="5 s, to see that it runs; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.seconds = 5.0 if args.quick else args.seconds
    policy = Lasting(Policy.load(args.run) if args.run else untrained(args.hz), args.plan_ms / 1e3)
    report, memory = drive(policy, args.hz, args.seconds)
    print(report)
    result = result_of(args, report, memory, policy)
    late, grown = result["late_ms"], memory["end"] - memory["start"]
    print(f"late         p50 {late['p50']:.2f}, p99 {late['p99']:.2f}, at most {late['max']:.2f} ms")
    print(f"plans        {result['plan_ms']['p50']:.0f} ms, {result['plan_ms']['max']:.0f} ms at most")
    print(f"memory       {memory['start']:.1f} MB after 2 s, {grown:+.1f} MB at the end")
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "real-time-cpu.json").write_text(json.dumps([result], indent=1) + "\n")


if __name__ == "__main__":
    main()
