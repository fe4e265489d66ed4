"""`diffpolicy bench`: how long a plan takes and what it scores, backends x samplers x steps; the best in a budget."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from diffpolicy import pictures
from diffpolicy.cli.evaluate import EvaluateArgs, task_of
from diffpolicy.cli.shared import progress_bar
from diffpolicy.control.compiled import bench as benching
from diffpolicy.control.compiled.backends import BACKENDS, usable_on
from diffpolicy.control.compiled.bench import Row
from diffpolicy.data.files import write_atomically
from diffpolicy.errors import SpecError
from diffpolicy.evaluate import evaluate as play
from diffpolicy.parts import SAMPLERS, SamplerConfig
from diffpolicy.policy import Policy
from diffpolicy.provenance import versions
from diffpolicy.report import Estimate, Report
from diffpolicy.tasks import Task
from diffpolicy.train import resolve_device


@dataclass(frozen=True)
class BenchArgs:
    """Measure plan() of a trained policy: latency and score of backends x samplers x steps."""

    run: tyro.conf.Positional[Path]
    """Run folder, or any folder with a saved policy."""
    backends: tuple[str, ...] = ()
    """Ways to compute a plan; all that this device has if not given."""
    samplers: tuple[str, ...] = ()
    """Rules of one step; all that the network was trained for if not given."""
    steps: tuple[int, ...] = (1, 2, 3, 5, 10, 20)
    """Steps of each sampler."""
    budget_ms: float | None = None
    """Write the sampler with the best score, among those with 99 of 100 plans this quick, into the run as its own."""
    episodes: int = 50
    """Episodes a score; 0 for latency alone."""
    seed: int = 200_000
    """Of the first episode; not those of diffpolicy evaluate, which reports."""
    batch_size: int = 1
    """Chunks a plan."""
    samples: int = 100
    """Plans a latency; fewer where they take longer than 20 s together."""
    task: str | None = None
    """Name of a task; the run's own if not given."""
    env: str | None = None
    """Gymnasium id instead of the task's."""
    env_kwargs: str = "{}"
    """Arguments of gymnasium.make, JSON; with --env."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    out: Path | None = None
    """Folder of bench.json and bench.png; RUN/bench if not given."""


def bench(argv: Sequence[str]) -> None:
    """Run `diffpolicy bench`."""
    args = tyro.cli(BenchArgs, args=argv, prog="diffpolicy bench")
    policy = Policy.load(args.run, resolve_device(args.device))
    backends = args.backends or tuple(usable_on(policy.device.type))
    samplers = args.samplers or tuple(benching.samplers_of(policy))
    _check(args, backends, samplers)
    played = EvaluateArgs(args.run, task=args.task, env=args.env, env_kwargs=args.env_kwargs)
    task = task_of(played) if args.episodes else None
    configs, left_out = benching.combinations(policy, samplers, args.steps)
    if not configs:
        raise SpecError(f"none of these is defined: {'; '.join(sorted({why for _, why in left_out}))}")
    rows, scores = _measure(policy, args, backends, configs, task)
    _print(rows, left_out, scores)
    found = {
        "policy": {"sampler": asdict(policy.sampler_config), "device": str(policy.device), "batch": args.batch_size},
        "machine": _machine(policy.device),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
        "left_out": [{"sampler": asdict(config), "why": why} for config, why in left_out],
        "scores": [{"sampler": asdict(config), **score} for config, score in scores.items()],
    }
    if args.budget_ms is not None:
        found["chosen"] = _choose(policy, args, rows, scores)
    out = args.out or args.run / "bench"
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "bench.json", lambda path: path.write_text(json.dumps(found, indent=1)))
    print(f"  figures      {out / 'bench.json'}")
    if scores:
        pictures.latency(found, args.budget_ms).savefig(out / "bench.png", dpi=120)
        print(f"  picture      {out / 'bench.png'}")


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _check(args: BenchArgs, backends: Sequence[str], samplers: Sequence[str]) -> None:
    """Refuse what cannot be measured.

    Raises:
        SpecError: if a name is unknown, a number too small, or a budget has nothing to choose by.
    """
    for kind, names, known in (("backend", backends, BACKENDS), ("sampler", samplers, SAMPLERS)):
        if unknown := set(names) - set(known):
            raise SpecError(f"there is no {kind} {sorted(unknown)}; wanted some of {', '.join(known)}")
    if min((*args.steps, args.batch_size, args.samples), default=0) < 1 or args.episodes < 0:
        raise SpecError("--steps, --batch-size and --samples want whole numbers from 1 on, --episodes from 0 on")
    if args.budget_ms is not None and not args.episodes:
        raise SpecError("--budget-ms chooses by score; give --episodes at least 1")


def _measure(
    policy: Policy, args: BenchArgs, backends: Sequence[str], configs: Sequence[SamplerConfig], task: Task | None
) -> tuple[list[Row], dict[SamplerConfig, dict[str, Any]]]:
    rows, scores = [], {}
    with progress_bar() as bar:
        line = bar.add_task("timing plans", total=len(backends) * len(configs))
        for row in benching.measure(policy, backends, configs, args.batch_size, args.samples):
            rows.append(row)
            bar.update(line, advance=1, description=f"timing plans, {row.backend}")
        if task is not None:
            line = bar.add_task("playing episodes", total=len(configs))
            for config in configs:
                bar.update(line, description=f"playing episodes, {config.sampler} {config.steps}")
                report = play(
                    policy.with_sampler(config), task.env_id, task.env_kwargs, args.episodes, args.seed,
                    task.success, task.score, task.reference,
                )  # fmt: skip
                scores[config] = {**_scored(report), "episodes": args.episodes, "seed": args.seed}
                bar.update(line, advance=1)
    return rows, scores


def _scored(report: Report) -> dict[str, Any]:
    """Success where the task has one, else its score, else the return."""
    named: list[tuple[str, Estimate | None]] = [("success", report.success), ("score", report.score)]
    kind, estimate = next(((kind, e) for kind, e in named if e is not None), ("return", report.returns))
    return {"kind": kind, **asdict(estimate)}


def _print(
    rows: Sequence[Row],
    left_out: Sequence[tuple[SamplerConfig, str]],
    scores: dict[SamplerConfig, dict[str, Any]],
) -> None:
    kind = next(iter(scores.values()))["kind"] if scores else ""
    print(f"{benching.HEADER}   {kind}")
    for row in rows:
        score = scores.get(row.sampler)
        print(row if score is None else f"{row}   {Estimate(score['value'], score['low'], score['high'])}")
    for reason in dict.fromkeys(why for _, why in left_out):
        which = ", ".join(f"{config.sampler} {config.steps}" for config, why in left_out if why == reason)
        print(f"  left out     {which}: {reason}")


def _choose(
    policy: Policy, args: BenchArgs, rows: Sequence[Row], scores: dict[SamplerConfig, dict[str, Any]]
) -> dict[str, Any]:
    """Write the best sampler within the budget into the run; return what `policy.json` says of it."""
    assert args.budget_ms is not None
    best = benching.best_within(rows, {config: score["value"] for config, score in scores.items()}, args.budget_ms)
    assert best.latency is not None
    before, config = policy.sampler_config, best.sampler
    chosen = {
        "by": f"diffpolicy bench --budget-ms {args.budget_ms:g}",
        "backend": best.backend,
        "p99_ms": best.latency.p99,
        "score": scores[config],
        "before": asdict(before),
    }
    policy.with_sampler(config).save_description(args.run, chosen=chosen)
    print(
        f"  chosen       {config.sampler} {config.steps} on {best.backend}: p99 {best.latency.p99:.2f} ms of "
        f"{args.budget_ms:g}; {args.run / 'policy.json'} has it now, and under `chosen` what it had, "
        f"{before.sampler} {before.steps}"
    )
    if best.backend != "eager":
        print(f"  as fast      policy.with_plan(compile_plan(policy, backend={best.backend!r})) plans like that")
    return {"sampler": asdict(config), **chosen}
