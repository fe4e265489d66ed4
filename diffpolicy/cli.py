"""The command line: one verb an activity. Bad input is one sentence on standard error and exit code 2."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffpolicy import pictures
from diffpolicy import train as training
from diffpolicy.agents.bc import BcConfig
from diffpolicy.data import store
from diffpolicy.data.sources import load
from diffpolicy.data.spec import Spec
from diffpolicy.errors import DatasetError, DiffPolicyError, PolicyError, SpecError
from diffpolicy.evaluate import PARALLEL, bootstrap, outcomes, play_unseen, summarise, wilson
from diffpolicy.evaluate import compare as compare_reports
from diffpolicy.policy import Policy
from diffpolicy.rollout import record, rollout
from diffpolicy.tables import AGENTS, Preset, Task, demonstrator, get_task, noisy_envs, prepare
from diffpolicy.train import TrainConfig
from diffpolicy_envs import EnvsError, load_sb3_agent

console = Console(stderr=True)
Flat = tyro.conf.arg(name="")


def progress_bar() -> Progress:
    """Return a progress bar with the time left."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


@dataclass(frozen=True)
class CollectArgs:
    """Record demonstrations of an expert as a dataset."""

    out: Path
    """Folder of the dataset, written whole at the end."""
    task: str | None = None
    """Name of a task."""
    env: str | None = None
    """Gymnasium id instead of a task; with --sb3-agent."""
    episodes: int = 200
    """How many."""
    seed: int = 0
    """Of the first episode; the next has the next."""
    noise: float | None = None
    """Standard deviation of the noise on the executed action, the clean one is recorded; by default the task's."""
    noise_correlation: float | None = None
    """Of that noise from one step to the next, 0 to 1; the task's own if not given."""
    sb3_agent: Path | None = None
    """Folder or zip of a stable-baselines3 agent that acts instead of the task's expert."""
    trust_pickle: bool = False
    """Allow --sb3-agent to unpickle, which can execute code: only for files you trust."""


def collect(argv: Sequence[str]) -> None:
    """Run `diffpolicy collect`."""
    args = tyro.cli(CollectArgs, args=argv, prog="diffpolicy collect")
    task = Task(env_id=args.env) if args.env else get_task(args.task)
    if task is None:
        raise SpecError("collect was given neither --task nor --env; name what to play")
    if args.episodes < 1:
        raise DatasetError(f"--episodes is {args.episodes}; give at least 1")
    if args.out.exists() and not store.is_store(args.out):
        raise DatasetError(f"{args.out} exists and is not a dataset of ours; give another path or remove it")
    std, correlation = task.noise
    noise = (
        std if args.noise is None else args.noise,
        correlation if args.noise_correlation is None else args.noise_correlation,
    )
    if args.sb3_agent is None:
        actor = demonstrator(task)
    else:
        actor = load_sb3_agent(args.sb3_agent, trust_pickle=args.trust_pickle)
    envs = noisy_envs(task, min(args.episodes, PARALLEL), noise)
    with progress_bar() as bar:
        row = bar.add_task("collecting", total=args.episodes)
        episodes = rollout(
            actor, envs, args.episodes, args.seed, on_episode=lambda done: bar.update(row, completed=done)
        )
    envs.close()
    made_by = {
        "actor": str(args.sb3_agent or type(actor).__name__),
        "noise": {"std": noise[0], "correlation": noise[1]},
        "versions": training.versions(),
    }
    episodes = dataclasses.replace(episodes, meta={**episodes.meta, **made_by})
    store.save(episodes, args.out)
    print(f"{len(episodes)} episodes, {episodes.steps} steps: {args.out}")
    print(f"  return       {bootstrap(episodes.returns)}")
    found = outcomes(episodes, task.success, None, None).success
    if found is not None:
        print(f"  success      {wilson(int(found.sum()), len(found))}")


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
        return _resumed(Path(out))
    task = get_task(_value_of(argv, "--task"))
    preset = Preset() if task is None else task.preset
    shared = {f.name: getattr(preset, f.name) for f in dataclasses.fields(Preset)}
    return TrainArgs(dataset=tyro.MISSING, out=tyro.MISSING, **shared)


def _resumed(run: Path) -> Any:
    """Return the arguments of the run to resume.

    Raises:
        PolicyError: if its `config.json` does not hold them.
    """
    try:
        return _from_json(TrainArgs, read_config(run)["arguments"])
    except (KeyError, TypeError) as error:
        raise PolicyError(
            f"{run / 'config.json'} holds no arguments of diffpolicy train ({error!r}); start a new run"
        ) from error


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


@dataclass(frozen=True)
class EvaluateArgs:
    """Play unseen seeds with a trained policy, and report with intervals."""

    run: tyro.conf.Positional[Path]
    """Run folder, or any folder with a saved policy."""
    episodes: int = 100
    """How many."""
    seed: int = 100_000
    """Of the first episode; the next has the next."""
    task: str | None = None
    """Name of a task; the run's own if not given."""
    env: str | None = None
    """Gymnasium id instead of the task's."""
    env_kwargs: str = "{}"
    """Arguments of gymnasium.make, JSON; with --env."""
    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpm++2m"] | None = None
    """Instead of the policy's own."""
    steps: int | None = None
    """Sampler steps, instead of the policy's own."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    out: Path | None = None
    """Folder of the report; RUN/eval if not given."""
    asynchronous: bool = False
    """One process an environment."""
    video: bool = True
    """Film the first episode, where the renderer works."""


def _task_of(args: EvaluateArgs) -> Task:
    """Return the task to play: the environment or task named, else the run's task, else its dataset's environment."""
    if args.env is not None:
        return Task(env_id=args.env, env_kwargs=_json_object(args.env_kwargs))
    config = read_config(args.run) if (args.run / "config.json").exists() else {}
    task = get_task(args.task or config.get("arguments", {}).get("task"))
    if task is not None:
        return task
    dataset = config.get("dataset", {})
    if not dataset.get("env_id"):
        raise PolicyError(f"{args.run} does not say which environment it is for; give --task or --env")
    return Task(env_id=dataset["env_id"], env_kwargs=dataset.get("env_kwargs", {}))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise SpecError(f"--env-kwargs is {text!r}; wanted a JSON object such as '{{\"continuing_task\": false}}'")
    return value


def load_policy(run: Path, device: str, sampler: str | None, steps: int | None) -> Policy:
    """Load a policy, under another sampler where one is asked for."""
    policy = Policy.load(run, training.resolve_device(device))
    changes = {k: v for k, v in (("sampler", sampler), ("steps", steps)) if v is not None}
    return policy.with_sampler(dataclasses.replace(policy.sampler_config, **changes)) if changes else policy


def evaluate(argv: Sequence[str]) -> None:
    """Run `diffpolicy evaluate`."""
    args = tyro.cli(EvaluateArgs, args=argv, prog="diffpolicy evaluate")
    if args.episodes < 1:
        raise SpecError(f"--episodes is {args.episodes}; give at least 1")
    policy = load_policy(args.run, args.device, args.sampler, args.steps)
    task = _task_of(args)
    with progress_bar() as bar:
        row = bar.add_task("evaluating", total=args.episodes)
        played = play_unseen(
            policy,
            task.env_id,
            task.env_kwargs,
            args.episodes,
            args.seed,
            args.asynchronous,
            on_episode=lambda done: bar.update(row, completed=done),
        )
    report = summarise(policy, played, training.versions(), task.success, task.score, task.reference)
    out = args.out or args.run / "eval"
    path = report.save(out)
    pictures.evaluation(report.to_json(), played).savefig(out / "episodes.png", dpi=120)
    print(report)
    print(f"  report       {path}\n  picture      {out / 'episodes.png'}")
    if args.video:
        print(f"  video        {film(policy, task, args.seed, out / 'episode.mp4')}")


def film(policy: Policy, task: Task, seed: int, path: Path) -> str:
    """Film one episode; return the path, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is in the error
            frames, fps = record(policy, task.env_id, task.env_kwargs, seed)
        pictures.save_video(path, frames, fps)
    except Exception as error:  # renderers fail in many ways, none of which should cost the report
        return f"none: {str(error).splitlines()[0] if str(error) else repr(error)}"
    return str(path)


@dataclass(frozen=True)
class CompareArgs:
    """Compare two evaluated runs, pair by pair over the same seeds."""

    a: tyro.conf.Positional[Path]
    """Run folder, or a report.json."""
    b: tyro.conf.Positional[Path]
    """Run folder, or a report.json."""
    out: Path | None = None
    """Picture of the differences, a PNG file."""


def _read_report(path: Path) -> dict[str, Any]:
    path = path if path.suffix == ".json" else path / "eval" / "report.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise PolicyError(f"there is no {path}; run diffpolicy evaluate first") from error
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path} cannot be read ({error}); run diffpolicy evaluate again") from error


def compare(argv: Sequence[str]) -> None:
    """Run `diffpolicy compare`."""
    args = tyro.cli(CompareArgs, args=argv, prog="diffpolicy compare")
    rows = compare_reports(_read_report(args.a), _read_report(args.b))
    print(*rows, sep="\n")
    if args.out is not None:
        pictures.comparison(rows, (args.a.name, args.b.name)).savefig(args.out, dpi=120)


VERBS = {"collect": collect, "train": train, "evaluate": evaluate, "compare": compare}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `diffpolicy`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in VERBS:
        print(f"usage: diffpolicy {{{','.join(VERBS)}}} ...   (each with --help)", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        VERBS[argv[0]](argv[1:])
    except (DiffPolicyError, EnvsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was saved stays", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
