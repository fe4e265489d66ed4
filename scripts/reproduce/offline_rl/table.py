"""What finished runs look like side by side: scores, how far each agent is ahead of others, and a picture.

    python scripts/reproduce/offline_rl/table.py OUT/results [--to FOLDER]      offline_rl.md, .json and .png

Every dataset is a row and every agent a column; the rows of a quality (mixed, medium, expert) end with their averages,
and other datasets have an interval each.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from results import NARROWLY, Run, Table, difference, estimate, interquartile_mean, read, tabulate, value_of

from diffpolicy.report import Estimate

QUALITIES = ("mixed", "medium", "expert")
IMITATION = ("bc", "bc+narrow", "bc+preference", "bc+preference+narrow")
LONGER = "+longer"
PEERS = ("d3rlpy-iql", "d3rlpy-iql+longer", "d3rlpy-td3+bc", "d3rlpy-td3+bc+longer")
FEWEST = 4
"""Runs of which an interquartile mean leaves any out."""
NOTES = """\
Last checkpoints after {steps} gradient steps, {episodes} episodes a training seed. Intervals are of 95 %; with one
training seed they know of episodes alone, and the best of many such agents is so by luck, too. Settings were chosen on
training seed 0, on other episodes; some were changed after results on these.
"""
ABOUT_NARROW = """\
`+narrow` is the same trained policy that samples as most others do, with a quarter of the noise; `bc` samples with all
of it.
"""
ABOUT_PEERS = """\
d3rlpy's agents have the settings of its own reproductions (rates 3e-4, targets that move by 0.005, no scaler of
observations for IQL), made for 500,000 steps, and draw all steps alike; those of the others were chosen for the length
played here, and on locomotion all but `bc`, `bc+narrow` and `edp-preference` draw good episodes more often.
"""
ABOUT_LONGER = """\
`+longer` ones have three times the steps of the others.
"""


def groups(table: Table) -> dict[str, list[str]]:
    """Return the datasets that any agent has played: by quality, the others each on its own, by name."""
    datasets = sorted({dataset for own in table.values() for dataset in own})
    found = {q: [d for d in datasets if d.endswith(f"-{q}")] for q in QUALITIES}
    others = {d: [d] for d in datasets if not any(d in members for members in found.values())}
    return {quality: members for quality, members in found.items() if members} | others


def scores(table: Table, data: Mapping[str, float]) -> str:
    """Write the scores: means by dataset, averages with intervals by quality; empty where a run is missing."""
    rows = [["dataset", "data", *table]]
    for quality, members in groups(table).items():
        if members == [quality]:
            rows.append([quality, _number(data.get(quality)), *(_average(own, members) for own in table.values())])
            continue
        rows += [[d, _number(data.get(d)), *(_mean(own, d) for own in table.values())] for d in members]
        known = [data[d] for d in members if d in data]
        of_data = _number(sum(known) / len(known)) if len(known) == len(members) else ""
        rows.append([f"**{quality}**, mean", of_data, *(_average(own, members) for own in table.values())])
        middle = (_middle(own, members) for own in table.values())
        rows.append([f"**{quality}**, interquartile mean of the runs", "", *middle])
        rows.append([f"**{quality}**, training seeds", "", *(_seeds(own, members) for own in table.values())])
    return _lines(rows)


def differences(table: Table) -> str:
    """Write how far every agent is ahead of imitation and of the peers, quality by quality."""
    columns = {
        f"{other}, {quality}": {agent: difference(table, agent, other, members) for agent in table if agent != other}
        for quality, members in groups(table).items()
        for other in (*IMITATION, *PEERS)
    }
    columns = {name: gaps for name, gaps in columns.items() if any(gaps.values())}
    if not columns:
        return ""
    rows = [["ahead of", *columns]]
    rows += [[agent, *(_interval(gaps.get(agent)) for gaps in columns.values())] for agent in table]
    return _lines(rows)


def picture(table: Table, data: Mapping[str, float], path: Path) -> None:
    """Draw scores with intervals, one panel a dataset, the mean of the data as a line; a quality has a row."""
    found = groups(table)
    rows = [found[quality] for quality in QUALITIES if quality in found]
    rows += [others] if (others := [name for name in found if name not in QUALITIES]) else []
    columns = max(len(members) for members in rows)
    heights = [0.26 * max(sum(d in own for own in table.values()) for d in members) + 0.7 for members in rows]
    size = (3.6 * columns, sum(heights) + 0.3)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for row, members in zip(axes, rows, strict=True):
        for axis, dataset in zip(row, members, strict=False):
            _panel(axis, table, dataset, data.get(dataset))
    legend = "score of the last checkpoint, 95 % interval; hollow: one training seed; dashed: mean of the data"
    figure.supxlabel(legend, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Axes, table: Table, dataset: str, of_data: float | None) -> None:
    axis.set_axis_on()
    played = {agent: own[dataset] for agent, own in table.items() if dataset in own}
    for i, (agent, scores) in enumerate(played.items()):
        e = estimate([scores])
        colour = "C7" if agent in PEERS else "C1" if agent in IMITATION else "C0"
        error, filling = [[e.value - e.low], [e.high - e.value]], colour if len(scores) > 1 else "white"
        axis.errorbar(e.value, i, xerr=error, fmt="o", color=colour, markerfacecolor=filling, capsize=2)
    if of_data is not None:
        axis.axvline(of_data, color="0.5", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(played)), list(played), fontsize=8)
    axis.set(xlim=(-5, 125), ylim=(len(played) - 0.5, -0.5))
    axis.set_title(dataset, fontsize=9)


def _mean(own: Mapping[str, np.ndarray], dataset: str) -> str:
    return _number(float(own[dataset].mean()) if dataset in own else None)


def _average(own: Mapping[str, np.ndarray], datasets: Sequence[str]) -> str:
    complete = all(dataset in own for dataset in datasets)
    return _interval(estimate([own[dataset] for dataset in datasets]) if complete else None)


def _middle(own: Mapping[str, np.ndarray], datasets: Sequence[str]) -> str:
    runs = [own[dataset] for dataset in datasets if dataset in own]
    enough = len(runs) == len(datasets) and sum(len(run) for run in runs) >= FEWEST
    return _number(value_of(runs, interquartile_mean) if enough else None)


def _interval(found: Estimate | None) -> str:
    return "" if found is None else f"{found:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _seeds(own: Mapping[str, np.ndarray], datasets: Sequence[str]) -> str:
    counts = {len(own[dataset]) for dataset in datasets if dataset in own}
    return _span(counts) if counts else ""


def _span(values: set[int]) -> str:
    return " to ".join(f"{value:,}" for value in dict.fromkeys((min(values), max(values))))


def _lines(rows: Sequence[Sequence[str]]) -> str:
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


def write(runs: Sequence[Run], data: Mapping[str, float], folder: Path) -> str:
    """Write `offline_rl.md`, `.json` (every run, without returns) and `.png` into a folder; return the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    table = tabulate(runs)
    if not table:
        return "no agent has a run of training seed 0 yet, from which the table counts\n"
    steps = _span({run.steps for run in runs if not run.agent.endswith(LONGER)})
    episodes = _span({len(run.score) for run in runs})
    parts = [scores(table, data), differences(table), NOTES.format(steps=steps, episodes=episodes)]
    parts += [ABOUT_NARROW] if any(agent.endswith(NARROWLY) for agent in table) else []
    parts += [ABOUT_PEERS] if any(peer in table for peer in PEERS) else []
    parts += [ABOUT_LONGER] if any(agent.endswith(LONGER) for agent in table) else []
    text = "\n".join(part for part in parts if part)
    short = [asdict(replace(run, score=tuple(round(x, 2) for x in run.score), returns=())) for run in runs]
    (folder / "offline_rl.md").write_text(text)
    (folder / "offline_rl.json").write_text(json.dumps({"data": dict(data), "runs": short}))
    picture(table, data, folder / "offline_rl.png")
    return text


def main() -> None:
    """Read results, write the table."""
    parser = argparse.ArgumentParser(description="Tables and a picture of finished runs.")
    parser.add_argument("results", type=Path, help="folder of the runs' JSON files")
    parser.add_argument("--to", type=Path, help="where to write; the folder above the results if not given")
    args = parser.parse_args()
    above = args.results.parent
    data = json.loads((above / "data.json").read_text()) if (above / "data.json").exists() else {}
    print(write(read(args.results), data, args.to or above))


if __name__ == "__main__":
    main()
