"""Benchmark of offline RL: gradient steps a second of idql, dql and qc beside d3rlpy's IQL, in alternation.

    python scripts/benchmarks/offline_rl.py --peer peers/bin/python [--threads 2] [--only idql-critics] [--quick]
    python scripts/benchmarks/offline_rl.py --device cuda            as they are and with --compile, without a peer

`--peer` is the Python of an environment with d3rlpy 2.8.1, made as `scripts/reproduce/d3rlpy_peers.py` says; it runs
beside, and waits while ours is timed. A step is drawing a batch of 256 from 100,000 steps of Hopper's sizes and
updating all networks on it. d3rlpy's IQL has two critics, a value and an actor, each of two layers of 256.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import where

from diffpolicy.agents.dql import Dql, DqlConfig
from diffpolicy.agents.idql import Idql, IdqlConfig
from diffpolicy.agents.qc import Qc, QcConfig
from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.order import Order
from diffpolicy.data.spec import Spec
from diffpolicy.parts import DenoiserConfig

RESULTS = Path(__file__).parent / "results"
STEPS, OBS, ACTION, BATCH = 100_000, 11, 3, 256
PUBLISHED = DenoiserConfig("mlp", hidden_dim=512, depth=3, step_embed_dim=64, prediction="v_prediction")
EQUAL = DenoiserConfig("mlp", hidden_dim=256, depth=1, step_embed_dim=32, prediction="v_prediction")


@dataclass(frozen=True)
class Row:
    """A case: an agent, its settings, the executed chunk, and whether its critics learn alone."""

    name: str
    what: str
    agent: Callable[..., Any]
    config: Any
    chunk: int = 1
    critics_only: bool = False


ROWS = (
    Row("idql-critics", "critics and value, 2 layers of 256", Idql, IdqlConfig(), critics_only=True),
    Row("idql-equal", "the same with an actor of 3 layers of 256, one more than d3rlpy's", Idql, IdqlConfig(EQUAL)),
    Row("idql", "the defaults: an actor of 3 blocks of 256", Idql, IdqlConfig()),
    Row("idql-published", "an actor with as many weights as the paper's, 3 blocks of 512", Idql, IdqlConfig(PUBLISHED)),
    Row("dql", "the defaults: an actor of 3 blocks of 256, critics of 3 layers of 256", Dql, DqlConfig()),
    Row("dql-published", "an actor of 3 layers of 256, as the paper's", Dql, DqlConfig(EQUAL)),
    Row("qc", "the defaults: chunks of 5, an actor of 3 blocks and critics of 4 layers of 512", Qc, QcConfig(), 5),
)


def step_of(row: Row, device: torch.device, compiled: bool = False) -> Callable[[], None]:
    """Return one whole step of a row's agent on data of Hopper's sizes."""
    rng = np.random.default_rng(0)
    episodes = from_list([episode(rng) for _ in range(STEPS // 1000)])
    spec = Spec.from_episodes(episodes, horizon=row.chunk, n_obs_steps=1, n_action_steps=row.chunk)
    agent = row.agent(spec, Normalizer.fit(episodes), replace(row.config, compile=compiled), 1_000_000, device)
    windows = agent.windows(episodes, device)
    order = Order(len(windows), BATCH, 0)

    def step() -> None:
        batch = agent.normalizer.encode(windows.gather(order(agent.step)).to(device))
        if row.critics_only:
            agent.update_critics(batch)
            agent.step += 1
        else:
            agent.update(batch)

    return step


def episode(rng: np.random.Generator) -> Episode:
    """1000 steps of noise, cut by a time limit."""
    obs, action = rng.normal(size=(1001, OBS)), rng.uniform(-1, 1, (1000, ACTION))
    reward = rng.normal(size=1000)
    arrays = [x.astype(np.float32) for x in (obs, action, reward)]
    return Episode({"obs": arrays[0]}, arrays[1], arrays[2], False, True)


class Peer:
    """d3rlpy in a process of its own, which does nothing until it is asked."""

    def __init__(self, python: Path, threads: int) -> None:
        worker = Path(__file__).with_name("d3rlpy_worker.py")
        self.process = subprocess.Popen(
            [str(python), "-W", "ignore", str(worker), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while not (line := self._read()).startswith("ready"):  # it logs there as well
            pass
        self.version = line.split()[1]

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("--peer ended; give the Python of an environment with d3rlpy 2.8.1 (see d3rlpy_peers.py)")
        return line

    def seconds(self, steps: int) -> float:
        """Seconds of so many steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self._read())


def seconds_of(step: Callable[[], None], steps: int) -> float:
    """Seconds of so many steps."""
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def bench_alone(row: Row, device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """Alternate between the agent as it is and compiled; return the medians of a row."""
    torch.compiler.reset()  # or the shapes of the rows before would be compiled for, too
    runs = [step_of(row, device, compiled) for compiled in (False, True)]
    for run in runs:  # compiles
        seconds_of(run, 20)
    steps = [max(1, round(seconds / (seconds_of(run, 20) / 20))) for run in runs]
    times = [[n / seconds_of(run, n) for run, n in zip(runs, steps, strict=True)] for _ in range(rounds)]
    plain, compiled = (float(np.median(rates)) for rates in zip(*times, strict=True))
    print(f"{row.name:<14} {plain:7.1f} steps/s   compiled {compiled:7.1f}   {row.what}")
    found = {"name": row.name, "what": row.what, "plain": plain, "compiled": compiled, "unit": "steps/s"}
    return {**found, "rounds": rounds, "seconds_a_round": seconds, **where(device)}


def bench(row: Row, peer: Peer, rounds: int, seconds: float) -> dict[str, Any]:
    """Alternate in rounds of so many seconds each; return the medians of a row."""
    step = step_of(row, torch.device("cpu"))
    runs = (lambda steps: seconds_of(step, steps)), peer.seconds
    warm = [run(2) and run(3) / 3 for run in runs]
    steps = [max(1, round(seconds / each)) for each in warm]
    times = [[n / run(n) for run, n in zip(runs, steps, strict=True)] for _ in range(rounds)]
    ours, theirs = (float(np.median(rates)) for rates in zip(*times, strict=True))
    print(f"{row.name:<14} {ours:7.1f} steps/s   d3rlpy's IQL {theirs:7.1f}   ratio {ours / theirs:.2f}   {row.what}")
    return {
        "name": row.name,
        "what": row.what,
        "ours": ours,
        "peer": theirs,
        "ratio": ours / theirs,
        "unit": "steps/s",
        "rounds": rounds,
        "seconds_a_round": seconds,
        **where(d3rlpy=peer.version),
    }


def main() -> None:
    """Run the rows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="Python of an environment with d3rlpy 2.8.1; on a CPU")
    parser.add_argument("--device", default="cpu", help="cpu, beside the peer; or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of rows; nothing is written")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs; nothing is written")
    args = parser.parse_args()
    if (args.peer is None) == (args.device == "cpu") and not args.quick:
        parser.error("on a CPU the figures are ratios to --peer; another --device is measured without")
    torch.set_num_threads(args.threads)
    rounds, seconds = (1, 0.1) if args.quick else (15, 1.0)
    rows = [row for row in ROWS if not args.only or row.name in args.only]
    if args.peer is not None:
        peer = Peer(args.peer, args.threads)
        results = [bench(row, peer, rounds, seconds) for row in rows]
    else:
        alone = [row for row in rows if not row.critics_only]
        results = [bench_alone(row, torch.device(args.device), rounds, seconds) for row in alone]
    if not args.quick and not args.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"offline-rl-{args.device}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
