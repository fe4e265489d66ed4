"""Benchmark of serving: many clients at once on loopback, planned in batches, beside the same server one by one.

    python scripts/benchmarks/serving.py runs/umaze [--clients 64] [--threads 2] [--only cpu-quickstart] [--quick]

Clients run in a process of their own and ask for a chunk as soon as they have one: every request is a plan. The peer is
the same server with batches of one row. A figure is chunks a second over all clients; latency is the client's.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
BACKEND = "openvino"


@dataclass(frozen=True)
class Row:
    """A case: the quickstart's policy or the untrained canonical network; rows it is compiled for, None for eager."""

    name: str
    quickstart: bool
    compiled: int | None
    seconds: float


ROWS = (
    Row("cpu-quickstart", True, None, 20.0),
    Row("cpu-quickstart-compiled", True, 16, 20.0),
    Row("cpu-canonical-compiled", False, 16, 40.0),
)


def ask(url: str, clients: int, seconds: float) -> dict[str, Any]:
    """Many clients, each in a thread, as fast as they are answered; needs no torch."""
    from diffpolicy.control import Client

    together = Barrier(clients)

    def one(seed: int) -> list[tuple[float, float]]:
        rng, took = np.random.default_rng(seed), []
        with Client(url, seed=seed, timeout=300) as client:
            spec, draws = client.spec, client.draws()
            together.wait()
            end = time.perf_counter() + seconds
            while (begin := time.perf_counter()) < end:
                history = {k: rng.uniform(-1, 1, (1, spec.n_obs_steps, *s)) for k, s in spec.obs_shapes.items()}
                client.plan(history, rng.normal(size=(draws, 1, spec.horizon, spec.action_dim)))
                took.append((begin, time.perf_counter()))
        return took

    with ThreadPoolExecutor(clients) as pool:
        times = [pair for took in pool.map(one, range(clients)) for pair in took]
    begins, ends = np.array(times).T
    milliseconds = 1e3 * (ends - begins)
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return {
        "chunks": len(times),
        "chunks_a_second": len(times) / (ends.max() - begins.min()),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
    }


def measure(policy: Any, rows: int, clients: int, seconds: float) -> dict[str, Any]:
    """Serve with batches of at most `rows`; ask from another process."""
    from diffpolicy.control import Door, Server

    server = Server(policy, Door(port=0, max_rows=rows))
    with server.background() as url:
        command = [sys.executable, __file__, "--ask", url, "--clients", str(clients), "--seconds", str(seconds)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = server.figures
    return {**json.loads(said), "batch": figures["batch"]["mean"], "plan_ms_p50": figures["plan_ms"]["p50"]}


def bench(row: Row, run: Path, clients: int, quick: bool) -> dict[str, Any]:
    """Measure a row and its peer."""
    import torch
    from measuring import where
    from sampling import CANONICAL, make_policy

    from diffpolicy.control import compile_plan
    from diffpolicy.policy import Policy

    policy = Policy.load(run) if row.quickstart else make_policy(CANONICAL, torch.device("cpu"))
    single, backend = policy, "eager"
    if row.compiled is not None:
        plan = compile_plan(policy, row.compiled, BACKEND)
        policy, single, backend = (
            policy.with_plan(plan),
            policy.with_plan(compile_plan(policy, 1, BACKEND)),
            plan.backend,
        )
    seconds = 2.0 if quick else row.seconds
    ours, peer = measure(policy, 64, clients, seconds), measure(single, 1, clients, seconds)
    alone = measure(single, 1, 1, min(seconds, 10.0))
    ratio = ours["chunks_a_second"] / peer["chunks_a_second"]
    print(
        f"{row.name:<26} {backend:<12} ours {ours['chunks_a_second']:7.1f} chunks/s, {ours['p50_ms']:.0f} ms p50 "
        f"{ours['p99_ms']:.0f} ms p99, {ours['batch']:.0f} a batch   one by one {peer['chunks_a_second']:7.1f} "
        f"chunks/s, {peer['p50_ms']:.0f} and {peer['p99_ms']:.0f} ms   ratio {ratio:.2f}   one client alone "
        f"{alone['p50_ms']:.1f} ms, of which the plan {alone['plan_ms_p50']:.1f}",
        flush=True,
    )
    return {
        "name": row.name,
        "ours": ours["chunks_a_second"],
        "peer": peer["chunks_a_second"],
        "ratio": ratio,
        "unit": "chunks/s",
        "clients": clients,
        "backend": backend,
        "batched": ours,
        "one_by_one": peer,
        "one_client_alone": alone,
        "seconds": seconds,
        "weights": sum(p.numel() for p in policy.denoiser.parameters()),
        **where(),
    }


def main() -> None:
    """Run the rows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="run of scripts/quickstart")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of rows; nothing is written")
    parser.add_argument(
        "--quick", action="store_true", help="two seconds a row, to see that it runs; nothing is written"
    )
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(args.ask, args.clients, args.seconds)))
        return
    if args.run is None:
        parser.error("give the run that scripts/quickstart made")
    import torch

    torch.set_num_threads(args.threads)
    rows = [row for row in ROWS if not args.only or row.name in args.only]
    results = [bench(row, args.run, args.clients, args.quick) for row in rows]
    if not args.quick and not args.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "serving-cpu.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
