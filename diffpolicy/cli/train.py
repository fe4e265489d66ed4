"""`diffpolicy train`: a policy from an offline dataset, in a run folder that can be stopped and resumed."""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from diffpolicy import runs
from diffpolicy import train as training
from diffpolicy.agents.distill import DistillConfig
from diffpolicy.cli.shared import Flat, console, progress_bar, read_config, trusted
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import load
from diffpolicy.data.spec import Spec
from diffpolicy.errors import PolicyError, SpecError
from diffpolicy.evaluate import play_unseen
from diffpolicy.observations import check_spaces
from diffpolicy.policy import Policy
from diffpolicy.provenance import versions
from diffpolicy.rollout import make_env
from diffpolicy.tables import get_algorithm, make_agent, settings_for, straightened
from diffpolicy.tasks import Preset, Task, get_task, prepare
from diffpolicy.train import TrainConfig

MEANWHILE = 50_000  # first seed of episodes played while training; reports begin at 100,000


@dataclass(frozen=True)
class TrainArgs:
    """Train a policy on an offline dataset. Which settings there are depends on --agent."""

    dataset: str
    """Any format that load() reads, or several joined by +."""
    out: Path
    """Run folder."""
    obs: tuple[str, ...] | None = None
    """Names of the observations to read; all but images if not given."""
    part: str | None = None
    """A named part of the dataset, such as robomimic's train."""
    relabel: str | None = None
    """The task whose rewards are wanted, of OGBench's datasets."""
    ends: str | None = None
    """An info value such as next.success: who has it in the last step ended truly, and critics see its reward. For
    LeRobot's datasets, which cannot tell."""
    task: str | None = None
    """Name of a task, for its presets, observation names and normalisation."""
    env: str | None = None
    """Gymnasium id of the environment that the data come from, for --evaluate-every and diffpolicy evaluate; the task's
    if not given."""
    agent: str = "bc"
    """Algorithm: bc (imitation), mip (the same in two regressions), distill (a --teacher in one step), idql, dql, edp,
    qc, fql, cfgrl, diffuser or decision-diffuser (offline reinforcement learning)."""
    flow: bool = False
    """Flow matching, sampled in 10 steps of Euler: sets the agent's --denoiser.schedule, .prediction and --sampler."""
    resume: bool = False
    """Continue the run in the folder, with its arguments."""
    horizon: int = 16
    """Predicted actions, Tp."""
    n_obs_steps: int = 2
    """Observations of the history, To."""
    n_action_steps: int = 8
    """Executed actions of a chunk, Ta."""
    settings: Annotated[object, Flat] = None  # of the agent: the default given to tyro says which
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)


def train(argv: Sequence[str]) -> None:
    """Run `diffpolicy train`."""
    args: TrainArgs = tyro.cli(TrainArgs, args=argv, default=_train_defaults(argv), prog="diffpolicy train")
    begun = runs.is_begun(args.out)
    _check_folder(args, begun)
    if args.env is not None and _value_of(argv, "--env") is None:
        trusted(args.env, args.out)
    task = get_task(args.task)
    episodes = prepare(task, load(args.dataset, args.obs, args.part, args.relabel))
    if args.ends is not None:
        episodes = episodes.ended_by(args.ends)
    if args.env is not None:
        task = _elsewhere(task, args.env, episodes)
    play = _player(args.train, task)
    spec = Spec.from_episodes(episodes, args.horizon, args.n_obs_steps, args.n_action_steps)
    device = training.resolve_device(args.train.device)
    kinds = task.kinds if task else {}
    agent = make_agent(args.agent, args.settings, spec, episodes, kinds, args.train, device)
    if task is not None:
        _check_task(task, spec, played=play is not None)
    description = {
        "arguments": _to_json(args),
        "dataset": {"episodes": len(episodes), "steps": episodes.steps, **episodes.meta},
        "parameters": sum(p.numel() for p in agent.model.parameters()),
        "versions": versions(),
    }
    saved = 0
    try:
        with progress_bar() as bar:
            row = bar.add_task("training", total=args.train.steps)
            for step, metrics in training.train(agent, episodes, args.train, args.out, description, play):
                bar.update(row, completed=step, description=f"training, loss {metrics['loss']:.4f}")
                saved = step if args.train.due(step, args.train.checkpoint_every) else saved
                if "evaluation/return" in metrics:
                    bar.console.print(f"step {step}: {_played(metrics)}")
            bar.update(row, completed=agent.step)
    except KeyboardInterrupt:
        kept = f"step {saved} is saved" if saved else "the last checkpoint stays"
        there = runs.is_begun(args.out)
        console.print(f"stopped; {kept}; go on with --resume" if there else "stopped; nothing was saved yet")
        raise SystemExit(130) from None
    if begun and not saved:
        print(f"the run has its {agent.step} steps already: nothing was trained; give more --steps to go on")
    print(f"policy: {args.out}\nlook:   tensorboard --logdir {args.out}")


def _played(metrics: Mapping[str, float]) -> str:
    """Write what the episodes played while training say."""
    names = [name for name in metrics if name.startswith("evaluation/")]
    return ", ".join(f"{name.removeprefix('evaluation/')} {metrics[name]:.3g}" for name in names)


def _check_folder(args: TrainArgs, begun: bool) -> None:
    """Refuse to write over what is there.

    Raises:
        PolicyError: if it is a run that is not to be continued, or of another agent, or a policy alone.
    """
    if begun and not args.resume:
        raise PolicyError(f"{args.out} holds a run already; add --resume to continue it, or give another --out")
    if not begun and (args.out / "policy.json").exists():
        raise PolicyError(f"{args.out} holds a policy and no checkpoint to continue from; give another --out")
    if not isinstance(args.settings, get_algorithm(args.agent).config):
        raise PolicyError(f"{args.out} is a run of another agent than {args.agent!r}; leave out --agent to resume it")


def _elsewhere(task: Task | None, env_id: str, episodes: Episodes) -> Task:
    """Return the task in another environment; without a task, with the arguments that the data have for it."""
    if task is not None:
        return dataclasses.replace(task, env_id=env_id)
    return Task(env_id, episodes.meta.get("env_kwargs", {}) if env_id == episodes.meta.get("env_id") else {})


def _check_task(task: Task, spec: Spec, played: bool) -> None:
    """Refuse data of other sizes than the environment, where it is installed: only being played needs it.

    Raises:
        SpecError: if the sizes differ, or the environment is none for a diffusion policy.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env = make_env(task.env_id, **task.env_kwargs)
    except Exception as error:  # whatever an environment that is not installed, or half, raises
        if played or isinstance(error, SpecError):
            raise
        return
    try:
        check_spaces(spec, env.observation_space, env.action_space)
    except PolicyError as error:
        raise SpecError(
            f"the dataset has observations {dict(spec.obs_shapes)} and actions ({spec.action_dim},), the environment "
            f"{task.env_id} has {env.observation_space} and {env.action_space}; give the --task or --env that they "
            "come from"
        ) from error
    finally:
        env.close()


def _player(config: TrainConfig, task: Task | None) -> training.Play | None:
    """Return what plays the task while training, None where nobody asked for it.

    Raises:
        SpecError: if it is asked for and there is no task.
    """
    if not config.evaluate_every:
        return None
    if task is None:
        raise SpecError("--evaluate-every plays the task's environment; say which with --task or --env")
    return lambda policy, count: play_unseen(policy, task.env_id, task.env_kwargs, count, MEANWHILE)


def _train_defaults(argv: Sequence[str]) -> Any:
    """Return the defaults of `train`: those of the run to resume, else of the task."""
    out = _value_of(argv, "--out")
    if "--resume" in argv and out is not None:
        return _resumed(Path(out))
    task = get_task(_value_of(argv, "--task"))
    preset = Preset() if task is None else task.preset
    agent = _value_of(argv, "--agent") or "bc"
    settings = settings_for(agent, preset)
    if "--flow" in argv:
        settings = straightened(settings)
    shared = {f.name: getattr(preset, f.name) for f in dataclasses.fields(Preset) if f.name != "agents"}
    teacher = _value_of(argv, "--teacher")
    if isinstance(settings, DistillConfig) and teacher is not None:
        settings, spec = settings.taught_by(teacher), Policy.load(teacher).spec
        shared |= {name: getattr(spec, name) for name in ("horizon", "n_obs_steps", "n_action_steps")}
    return TrainArgs(dataset=tyro.MISSING, out=tyro.MISSING, agent=agent, settings=settings, **shared)


def _value_of(argv: Sequence[str], flag: str) -> str | None:
    """Return the value of a flag before the full parse: it decides the defaults."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
    return None


def _resumed(run: Path) -> Any:
    """Return the arguments of the run to resume.

    Raises:
        PolicyError: if its `config.json` does not hold them.
    """
    try:
        values = dict(read_config(run)["arguments"])
        settings = _from_json(get_algorithm(values["agent"]).config, values.pop(values["agent"]))
        return dataclasses.replace(_from_json(TrainArgs, {**values, "settings": None}), settings=settings)
    except (KeyError, TypeError) as error:
        raise PolicyError(
            f"{run / 'config.json'} holds no arguments of diffpolicy train ({error!r}); start a new run"
        ) from error


def _to_json(args: TrainArgs) -> dict[str, Any]:
    """Plain values, the agent's settings under its name; a run is the same whether it was resumed or not."""
    values = asdict(args)
    del values["resume"]
    values[args.agent] = values.pop("settings")
    return json.loads(json.dumps(values, default=str))


def _from_json(kind: Any, values: dict[str, Any]) -> Any:
    """Rebuild nested dataclasses from their JSON."""
    hints = get_type_hints(kind)
    built = {}
    for f in dataclasses.fields(kind):
        if f.name not in values:
            continue  # a run of an earlier version: the default is what it did
        value = values[f.name]
        if dataclasses.is_dataclass(hints[f.name]):
            value = _from_json(hints[f.name], value)
        elif isinstance(value, list):
            value = tuple(value)
        elif hints[f.name] is Path:
            value = Path(value)
        built[f.name] = value
    return kind(**built)
