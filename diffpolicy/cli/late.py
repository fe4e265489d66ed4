"""`diffpolicy evaluate --delay d` and `--real-time`: what a policy is worth when its plans come late.

One strategy and one delay give a report; several give `delays.json` and `delays.png`, a cell written as it is finished.
"""

import dataclasses
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from diffpolicy import pictures
from diffpolicy.cli.shared import progress_bar
from diffpolicy.control import delays
from diffpolicy.control.delays import Borders, Trial, World
from diffpolicy.control.strategies import Bidirectional, Strategy
from diffpolicy.data.files import write_atomically
from diffpolicy.errors import SpecError
from diffpolicy.policy import Policy
from diffpolicy.provenance import versions
from diffpolicy.report import FEWEST, Estimate, Report, compare, meanings
from diffpolicy.rollout import make_env
from diffpolicy.tables import get_strategy
from diffpolicy.train import resolve_device

WAITING = "synchronous"


@dataclass(frozen=True)
class LateArgs:
    """Plans that come late."""

    delay: tuple[int, ...] = ()
    """Control steps that a plan takes; several give a picture over them."""
    real_time: bool = False
    """Count the wall time of each plan, made on its own, in control steps instead."""
    rate_hz: float | None = None
    """--real-time: control steps a second; those of the data, else of the environment, if not given."""
    strategy: tuple[str, ...] = ()
    """How chunks are joined: synchronous (the last action repeats until the next chunk is there), switch, ensemble,
    rtc, rtc-hard, rtc-soft, rtc-guided, rtc-blended, rtc-trained, bid; several are compared."""
    weak: Path | None = None
    """bid: a run of a worse policy, such as one stopped early, for its forward half."""
    resume: bool = False
    """Keep what delays.json holds already."""

    @property
    def wanted(self) -> bool:
        """Whether any of it was asked for."""
        return bool(self.delay or self.strategy or self.real_time)


def evaluate_late(policy: Policy, args: LateArgs, world: World, out: Path, device: str) -> None:
    """Play every strategy at every delay, and write what was found into `out`."""
    trials = _trials(policy, args, world, device)
    for trial in trials:
        trial.actor(policy, Borders())  # what cannot be played is refused before anything is
    out.mkdir(parents=True, exist_ok=True)
    if len(trials) > 1:
        return _sweep(policy, trials, world, out, args.resume)
    report = _play(policy, trials[0], world)
    print(f"{report}\n  report       {report.save(out)}")
    return None


def _trials(policy: Policy, args: LateArgs, world: World, device: str) -> list[Trial]:
    if args.real_time and args.delay:
        raise SpecError("--real-time measures what --delay gives; choose one")
    weak = None if args.weak is None else Policy.load(args.weak, resolve_device(device))
    strategies = {name: _with_weak(get_strategy(name), weak) for name in args.strategy or ("synchronous",)}
    if args.real_time:
        rate = args.rate_hz or _rate_hz(policy, world)
        return [Trial(name, strategy, rate_hz=rate) for name, strategy in strategies.items()]
    return [Trial(name, strategy, delay) for (name, strategy), delay in product(strategies.items(), args.delay or (0,))]


def _with_weak(strategy: Strategy, weak: Policy | None) -> Strategy:
    return dataclasses.replace(strategy, weak=weak) if isinstance(strategy, Bidirectional) else strategy


def _rate_hz(policy: Policy, world: World) -> float:
    """Return the control steps a second of the data, else of the environment.

    Raises:
        SpecError: if neither says.
    """
    if policy.spec.control_period is not None:
        return 1 / policy.spec.control_period
    env = make_env(world.env_id, **world.env_kwargs)
    try:
        rate = env.metadata.get("render_fps")
    finally:
        env.close()
    if not rate:
        raise SpecError(f"neither the data nor {world.env_id} says how many control steps a second has; give --rate-hz")
    return float(rate)


def _play(policy: Policy, trial: Trial, world: World) -> Report:
    with progress_bar() as bar:
        late = "real time" if trial.rate_hz else f"delay {trial.delay}"
        row = bar.add_task(f"{trial.name}, {late}", total=world.episodes)
        report, _ = delays.evaluate_late(policy, trial, world, versions(), lambda done: bar.update(row, completed=done))
    return report


def _sweep(policy: Policy, trials: list[Trial], world: World, out: Path, resume: bool) -> None:
    path, sampler = out / "delays.json", f"{policy.sampler_config.sampler} {policy.sampler_config.steps}"
    former: list[dict[str, Any]] = json.loads(path.read_text())["cells"] if resume and path.exists() else []
    cells = []
    for trial in sorted(trials, key=lambda trial: trial.name != WAITING):  # which others are compared with
        weights = delays.fingerprint(policy, trial)
        found = [cell for cell in former if delays.is_of(cell, trial, world, sampler)]
        there = next((cell for cell in found if cell["weights"] == weights), None)
        cell = there or delays.cell_of(_play(policy, trial, world), trial, world, weights)
        cells.append(cell)
        former = [other for other in former if other not in found]
        text = json.dumps({"cells": cells + former}, indent=1)
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        same = [other for other in former if all(other[key] == cell[key] for key in ("env", "seeds", "sampler"))]
        figure = pictures.delays(cells + same, f"{world.env_id}, {sampler}, {world.episodes} seeds from {world.seed}")
        figure.savefig(out / "delays.png", dpi=120)
        print(_line(cell) + _against_waiting(cell, cells + same))
    print(f"  cells        {path}\n  picture      {out / 'delays.png'}")


def _line(cell: dict[str, Any]) -> str:
    jump = "no border" if cell["jump"] is None else f"jump {Estimate(**cell['jump'])}"
    quality = f"{cell['kind']} {Estimate(**cell['quality'])}"
    return f"  {cell['strategy']:<12} delay {cell['delay']:<4g} {quality}   {jump}"


def _against_waiting(cell: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    """Return the paired difference to an arm that waits as long, of this policy or another, where one was played."""
    alike = (other for other in cells if other is not cell and _is_alike(other, cell))
    waiting = next((other for other in alike if other["strategy"] == WAITING), None)
    if waiting is None or cell["episodes"] < FEWEST:
        return ""
    found = {each.name: each for each in compare(waiting["report"], cell["report"])}
    told = (f"{name} {found[name].difference:+.3f}" for name in ("success", "score") if name in found)
    whose = "" if waiting["weights"] == cell["weights"] else " (another policy's)"
    return f"   minus waiting{whose}: {', '.join(told)}"


def _is_alike(cell: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both were as late, and success and score mean the same."""
    late = all(cell[key] == other[key] for key in ("delay", "real_time"))
    return late and meanings(cell["report"]) == meanings(other["report"])
