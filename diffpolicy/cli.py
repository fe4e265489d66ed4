"""The command line: one verb an activity. Bad input is one sentence on standard error and exit code 2."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffpolicy import train as training
from diffpolicy.agents.bc import BcConfig
from diffpolicy.data.sources import load
from diffpolicy.data.spec import Spec
from diffpolicy.errors import DiffPolicyError, PolicyError
from diffpolicy.tables import AGENTS, Preset, get_task, prepare
from diffpolicy.train import TrainConfig

console = Console(stderr=True)
Flat = tyro.conf.arg(name="")


def progress_bar() -> Progress:
    """Return a progress bar with the time left."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainArgs:
    """Train a policy on an offline dataset."""

    dataset: Path
    """Any format that load() reads."""
    out: Path
    """Run folder."""
    task: str | None = None
    """Name of a task, for its presets, observation names and normalisation."""
    agent: Literal["bc"] = "bc"
    """Algorithm."""
    resume: bool = False
    """Continue the run in the folder, with its arguments."""
    horizon: int = 16
    """Predicted actions, Tp."""
    n_obs_steps: int = 2
    """Observations of the history, To."""
    n_action_steps: int = 8
    """Executed actions of a chunk, Ta."""
    bc: Annotated[BcConfig, Flat] = field(default_factory=BcConfig)
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)


def _value_of(argv: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag before the full parse: it decides the defaults."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
    return None


def _from_json(kind: Any, values: dict[str, Any]) -> Any:
    """Rebuild nested dataclasses from their JSON."""
    hints = get_type_hints(kind)
    built = {}
    for f in dataclasses.fields(kind):
        value = values[f.name]
        if dataclasses.is_dataclass(hints[f.name]):
            value = _from_json(hints[f.name], value)
        elif isinstance(value, list):
            value = tuple(value)
        elif hints[f.name] is Path:
            value = Path(value)
        built[f.name] = value
    return kind(**built)


def _train_defaults(argv: Sequence[str]) -> Any:
    """Return the defaults of `train`: those of the run to resume, else of the task."""
    out = _value_of(argv, "--out")
    if "--resume" in argv and out is not None:
        return _from_json(TrainArgs, read_config(Path(out))["arguments"])
    task = get_task(_value_of(argv, "--task"))
    preset = Preset() if task is None else task.preset
    shared = {f.name: getattr(preset, f.name) for f in dataclasses.fields(Preset)}
    return TrainArgs(dataset=tyro.MISSING, out=tyro.MISSING, **shared)


def read_config(run: Path) -> dict[str, Any]:
    """Read a run's `config.json`.

    Raises:
        PolicyError: if it is missing or damaged.
    """
    try:
        return json.loads((run / "config.json").read_text())
    except FileNotFoundError as error:
        raise PolicyError(f"there is no run at {run}: config.json is missing; check the path") from error
    except (OSError, ValueError) as error:
        raise PolicyError(f"{run / 'config.json'} cannot be read ({error}); train again") from error


def train(argv: Sequence[str]) -> None:
    """Run `diffpolicy train`."""
    args: TrainArgs = tyro.cli(TrainArgs, args=argv, default=_train_defaults(argv), prog="diffpolicy train")
    if (args.out / "config.json").exists() and not args.resume:
        raise PolicyError(f"{args.out} holds a run already; add --resume to continue it, or give another --out")
    task = get_task(args.task)
    episodes = prepare(task, load(args.dataset))
    spec = Spec.from_episodes(episodes, args.horizon, args.n_obs_steps, args.n_action_steps)
    device = training.resolve_device(args.train.device)
    agent = AGENTS[args.agent](spec, episodes, task.kinds if task else {}, args.bc, args.train, device)
    data = training.fingerprint(episodes)
    if args.resume:
        training.check_same_dataset(read_config(args.out)["dataset_fingerprint"], data)
    description = {
        "arguments": json.loads(json.dumps(asdict(args), default=str)),
        "dataset_fingerprint": data,
        "dataset": {"episodes": len(episodes), "steps": episodes.steps, **episodes.meta},
        "parameters": sum(p.numel() for p in agent.model.parameters()),
        "versions": training.versions(),
    }
    with progress_bar() as bar:
        row = bar.add_task("training", total=args.train.steps)
        for step, metrics in training.train(agent, episodes, args.train, args.out, description):
            bar.update(row, completed=step, description=f"training, loss {metrics['loss']:.4f}")
    print(f"policy: {args.out}\nlook:   tensorboard --logdir {args.out}")


VERBS = {"train": train}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `diffpolicy`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in VERBS:
        print(f"usage: diffpolicy {{{','.join(VERBS)}}} ...   (each with --help)", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        VERBS[argv[0]](argv[1:])
    except DiffPolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was saved stays", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
