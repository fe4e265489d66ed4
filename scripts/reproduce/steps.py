"""Quality per step: what each objective scores with K network evaluations of each sampler, on the same seeds.

    WORK/maze/demos                      demonstrations
    WORK/maze/epsilon flow mip distilled the runs
    WORK/maze/cells/flow-euler-10.json   a played cell, the report of an evaluation
    results/steps.json steps.png         all of it

`scripts/reproduce/steps` makes the environment and runs this. Runs of a task differ in the objective alone: the same
network, data, batches, steps and seed; the distilled one is a student of `flow`, trained further. Cells of many
evaluations are played on the first of the seeds. What is there already is not done again, so it can be stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from diffpolicy.data.files import write_atomically
from diffpolicy.evaluate import evaluate
from diffpolicy.parts import SamplerConfig, why_not
from diffpolicy.pictures import estimates
from diffpolicy.policy import Policy
from diffpolicy.report import Comparison, compare
from diffpolicy.tasks import TASKS

RESULTS = Path(__file__).parent / "results"
SEED = 100_000
K = (1, 2, 3, 5, 10, 20, 100)
DEAR = {20: 100, 100: 50}  # K: episodes
DENOISING = ("ddim", "ddpm", "dpm++2m", "heun")


@dataclass(frozen=True)
class Study:
    """A task: its name in the table of tasks, optimizer steps of each run, and of a student beyond its teacher's."""

    task: str
    steps: int
    student_steps: int


@dataclass(frozen=True)
class Objective:
    """What a network is trained for: flags of `diffpolicy train`, and the samplers it is played with."""

    flags: tuple[str, ...]
    samplers: tuple[str, ...]


STUDIES = {"maze": Study("pointmaze-umaze", 3000, 500), "pusht": Study("pusht", 6000, 1000)}
OBJECTIVES = {
    "flow": Objective(("--flow",), ("euler", *DENOISING[1:])),
    "mip": Objective(("--agent", "mip"), ("mip",)),
    "epsilon": Objective((), DENOISING),
    "distilled": Objective(("--agent", "distill"), ("one_step",)),
}
# The claim: (few steps) minus (ten steps), paired; the lower bound of its interval is at least -0.05.
CLAIMS = [(few, ten) for ten in ("flow-euler-10", "epsilon-ddim-10") for few in ("mip-mip-2", "distilled-one_step-1")]
STYLES = {"ddpm": ("s", ":"), "dpm++2m": ("^", "--"), "heun": ("D", "-.")}
FIRST = ["flow-euler-10", "mip-mip-2", "epsilon-ddim-10", "distilled-one_step-1"]


@dataclass(frozen=True)
class Cell:
    """One objective under one sampler with K network evaluations."""

    objective: str
    sampler: str
    k: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.objective}-{self.sampler}-{self.k}"

    def episodes(self, most: int) -> int:
        """Episodes it is played: the first of the others' seeds where many evaluations make them dear."""
        return min(most, DEAR.get(self.k, most))

    def counts(self, report: dict[str, Any], most: int) -> bool:
        """Whether a report has as many episodes as are asked for; a dear cell may have more, up to all."""
        return self.episodes(most) <= report["episodes"] <= most

    @property
    def config(self) -> SamplerConfig:
        """The sampler with the steps that take `k` evaluations: for Heun two a step, but one on the last."""
        return SamplerConfig(self.sampler, (self.k + 1) // 2 if self.sampler == "heun" else self.k)  # pyright: ignore


def cells() -> list[Cell]:
    """Return all that is defined, what the claims need first, then the cheap before the dear."""
    found = [
        Cell(o, s, k) for k in K for o, objective in OBJECTIVES.items() for s in objective.samplers if _defined(o, s, k)
    ]
    return sorted(found, key=lambda cell: (FIRST.index(cell.name) if cell.name in FIRST else len(FIRST), cell.k))


def _defined(objective: str, sampler: str, k: int) -> bool:
    """Whether K evaluations of this sampler exist for a network of this objective, and are not the same as others."""
    first = OBJECTIVES[objective].samplers[0]
    if (sampler == "heun" and k % 2 == 0) or (k == 1 and sampler != first):
        return False
    config = Cell(objective, sampler, k).config
    return not why_not(config, SamplerConfig(first), "epsilon" if objective == "epsilon" else "")  # pyright: ignore


def train(study: Study, objective: str, dataset: str, work: Path) -> None:
    """Train a run that is not there, or go on with one that was stopped."""
    run, steps = work / objective, study.student_steps if objective == "distilled" else study.steps
    if last_step(run) >= steps:
        return
    flags = [*OBJECTIVES[objective].flags, *(["--teacher", str(work / "flow")] if objective == "distilled" else [])]
    begun = (run / "config.json").exists()
    new = ["--task", study.task, "--steps", str(steps), *flags]
    more = ["--resume", "--steps", str(steps)] if begun else new
    diffpolicy("train", "--dataset", dataset, "--out", str(run), *more)


def last_step(run: Path) -> int:
    """Return the step of a run's checkpoint, 0 where there is none."""
    path = run / "checkpoint" / "state.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["step"] if path.exists() else 0


def diffpolicy(*argv: str) -> None:
    """Run the command line in a process of its own."""
    subprocess.run([sys.executable, "-m", "diffpolicy.cli", *argv], check=True)


def play(study: Study, cell: Cell, work: Path, most: int) -> dict[str, Any]:
    """Return a cell's report, played now unless it was since these weights were trained."""
    path, weights = work / "cells" / f"{cell.name}.json", work / cell.objective / "policy.safetensors"
    newer = path.exists() and path.stat().st_mtime > weights.stat().st_mtime
    if newer and cell.counts(report := json.loads(path.read_text()), most):
        return report
    task, begin = TASKS[study.task], time.perf_counter()
    policy = Policy.load(work / cell.objective)
    policy = policy.with_sampler(replace(cell.config, temperature=policy.sampler_config.temperature))
    report = evaluate(
        policy, task.env_id, task.env_kwargs, cell.episodes(most), SEED, task.success, task.score, task.reference
    ).to_json()  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(report)))
    print(
        f"{study.task} {cell.name}: success {report['success']['rate']:.3f}, {time.perf_counter() - begin:.0f} s",
        flush=True,
    )
    return report


def tables(work: Path, most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(task, its table)` of all cells that have been played."""
    for name, study in STUDIES.items():
        played = {}
        for cell in cells():
            path = work / name / "cells" / f"{cell.name}.json"
            if path.exists() and cell.counts(report := json.loads(path.read_text()), most):
                played[cell] = report
        if played:
            yield name, table(study, played)


def table(study: Study, played: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """Reduce the reports of a task to one row a cell and one a claim."""
    reports = {cell.name: report for cell, report in played.items()}
    any_of = max(reports.values(), key=lambda report: report["episodes"])
    return {
        "env_id": any_of["env_id"],
        "seeds": any_of["seeds"],
        "steps": study.steps,
        "student_steps": study.student_steps,
        "versions": any_of["versions"],
        "cells": [
            {
                "objective": cell.objective,
                "sampler": cell.sampler,
                "K": cell.k,
                "episodes": report["episodes"],
                "success": report["success"],
                "score": report["score"],
                "succeeded": "".join(str(int(x)) for x in report["by_episode"]["success"]),
            }
            for cell, report in sorted(played.items(), key=lambda it: (it[0].objective, it[0].sampler, it[0].k))
        ],
        "claims": [
            claim
            for few, ten in CLAIMS
            if few in reports and ten in reports
            for claim in _claims(few, ten, reports[few], reports[ten])
        ],
    }


def _claims(few: str, ten: str, a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare by success, and by score where there is one."""
    found: list[Comparison] = [row for row in compare(b, a) if row.name in ("success", "score")]
    return [
        {
            "few": few,
            "ten": ten,
            "metric": row.name,
            "difference": row.difference.value,
            "ci95": [row.difference.low, row.difference.high],
            "holds": row.difference.low >= -0.05,
        }
        for row in found
    ]


def markdown(found: dict[str, Any]) -> str:
    """Return a task's table: one row an objective and sampler, one column a number of evaluations."""
    by = {(c["objective"], c["sampler"], c["K"]): c["success"] for c in found["cells"]}
    lines = ["| objective | sampler | " + " | ".join(f"K = {k}" for k in K) + " |", "|---" * (len(K) + 2) + "|"]
    for objective, sampler in dict.fromkeys((o, s) for o, s, _ in by):
        values = (by.get((objective, sampler, k)) for k in K)
        texts = ("" if v is None else f"{v['rate']:.2f} [{v['ci95'][0]:.2f}, {v['ci95'][1]:.2f}]" for v in values)
        lines.append(f"| {objective} | {sampler} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw success over K, a panel a task, a colour an objective, a line a sampler."""
    figure, axes = plt.subplots(1, len(found), figsize=(6.2 * len(found), 4.6), squeeze=False, layout="constrained")
    for axis, rows in zip(axes[0], found.values(), strict=True):
        _panel(axis, rows)
    figure.legend(*axes[0][-1].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, rows: dict[str, Any]) -> None:
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in rows["cells"]:
        lines.setdefault((cell["objective"], cell["sampler"]), []).append(cell)
    for i, ((objective, sampler), line) in enumerate(lines.items()):
        values = [
            {"value": c["success"]["rate"], **dict(zip(("low", "high"), c["success"]["ci95"], strict=True))}
            for c in line
        ]
        marker, dashes = STYLES.get(sampler, ("o", "-"))
        style = {"color": f"C{list(OBJECTIVES).index(objective)}", "marker": marker, "linestyle": dashes, "alpha": 0.85}
        label = objective if len(OBJECTIVES[objective].samplers) == 1 else f"{objective}, {sampler}"
        estimates(axis, [c["K"] * 1.02**i for c in line], values, label=label, **style)  # side by side
    axis.set(xscale="log", xticks=K, xticklabels=K, xlabel="network evaluations of one chunk, K", ylim=(-0.03, 1.03))
    axis.set(title=f"{rows['env_id']}, {rows['steps']} steps of training\n{_lengths(rows['cells'])}")
    axis.set(ylabel="success, 95 %")
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _lengths(rows: list[dict[str, Any]]) -> str:
    """Say how many episodes cells have, and which K have fewer."""
    most = max(row["episodes"] for row in rows)
    fewest = {k: min(row["episodes"] for row in rows if row["K"] == k) for k in sorted({row["K"] for row in rows})}
    fewer = ", ".join(f"{n} at K = {k}" for k, n in fewest.items() if n < most)
    return f"{most} episodes" + f" ({fewer})" * bool(fewer)


def summarise(work: Path, episodes: int, out: Path) -> None:
    """Write table and picture of what has been played, print both tables."""
    found = dict(tables(work, episodes))
    if not found:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "steps.json", lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
    draw(found, out / "steps.png")
    for name, rows in found.items():
        print(f"\n{name}\n\n{markdown(rows)}\n")
        for claim in rows["claims"]:
            low, high = claim["ci95"]
            print(
                f"{claim['metric']} of {claim['few']} minus {claim['ten']}: {claim['difference']:+.3f} "
                f"[{low:+.3f}, {high:+.3f}]"
            )


def main() -> None:
    """Train, play, summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/steps"), help="folder of runs and cells")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table and the picture")
    parser.add_argument("--pusht", help="pusht_cchi_v7_replay.zarr; without it, the maze alone")
    parser.add_argument("--tasks", nargs="*", choices=tuple(STUDIES), help="some of the tasks")
    parser.add_argument("--only", nargs="*", help="some of the cells, such as flow-euler-10")
    parser.add_argument(
        "--episodes", type=int, default=300, help=f"of a cell, fewer of a dear one (K: episodes): {DEAR}"
    )
    parser.add_argument("--summary", action="store_true", help="train and play nothing")
    args = parser.parse_args()
    tasks = args.tasks or ["maze", *(["pusht"] if args.pusht else [])]
    if "pusht" in tasks and not args.pusht:
        parser.error("Push-T needs --pusht path/to/pusht_cchi_v7_replay.zarr")
    for name in [] if args.summary else tasks:
        study, work = STUDIES[name], args.work / name
        dataset = args.pusht
        if name == "maze":
            dataset = str(work / "demos")
            if not (work / "demos").exists():
                diffpolicy("collect", "--task", study.task, "--episodes", "200", "--out", dataset)
        chosen = [cell for cell in cells() if not args.only or cell.name in args.only]
        for objective in dict.fromkeys(["flow", *(cell.objective for cell in chosen)]):
            train(study, objective, dataset, work)
        for cell in chosen:
            play(study, cell, work, args.episodes)
    summarise(args.work, args.episodes, args.out)


if __name__ == "__main__":
    main()
