"""`diffpolicy collect`: an expert, a level of quality or an agent of the user's plays, and a dataset is written."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv, VectorEnv

from diffpolicy.cli.shared import Flat, progress_bar
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.sources import check_writable, is_hdf5, save
from diffpolicy.errors import DatasetError, SpecError
from diffpolicy.evaluate import PARALLEL, outcomes
from diffpolicy.observations import BOX_NAME
from diffpolicy.provenance import versions
from diffpolicy.report import bootstrap, wilson
from diffpolicy.rollout import make_env, rollout
from diffpolicy.tasks import TASKS, Task, demonstrator, get_task, noisy_envs
from diffpolicy_envs import (
    ReplayEpisode,
    Sb3Agent,
    Trained,
    UniformActor,
    load_sb3_agent,
    replay_episodes,
    save_agent,
    train_agent,
)


@dataclass(frozen=True)
class LevelArgs:
    """A level of quality, as D4RL has them, instead of an expert."""

    quality: Literal["random", "medium", "expert", "replay"] | None = None
    """random: uniform actions. medium: an agent trained here up to --stop-at-return. expert: to the end of --steps.
    replay: all that the training of medium played. Agents draw from their distribution, where they have one."""
    algorithm: Literal["crossq", "ddpg", "sac", "td3", "tqc"] = "sac"
    """Of stable-baselines3 or sb3-contrib, with its defaults."""
    steps: int | None = None
    """Of the training, at most."""
    stop_at_return: float | None = None
    """Mean return of ten episodes at which to stop; D4RL's medium is about a third of the way from random to expert."""
    save_agent: Path | None = None
    """Folder in which the trained agent gets its own, ALGORITHM-ENV, for --sb3-agent."""


@dataclass(frozen=True)
class CollectArgs:
    """Record demonstrations of an expert as a dataset."""

    out: str
    """Where the dataset goes, written whole at the end: a folder, a .hdf5 file of D4RL's layout, or minari:<id>."""
    task: str | None = None
    """Name of a task."""
    env: str | None = None
    """Gymnasium id instead of a task; with --sb3-agent or --quality."""
    episodes: int = 200
    """How many; a replay has as many as its training played."""
    seed: int = 0
    """Of the first episode; the next has the next. Of the training as well."""
    noise: float | None = None
    """Standard deviation of noise on what is executed, the clean action is recorded; the task's, 0 with --quality."""
    noise_correlation: float | None = None
    """Of that noise from one step to the next, 0 to 1; the task's own if not given."""
    sb3_agent: Path | None = None
    """Folder or zip of a stable-baselines3 agent that acts instead of the task's expert."""
    trust_pickle: bool = False
    """Allow --sb3-agent to unpickle, which can execute code: only for files you trust."""
    level: Annotated[LevelArgs, Flat] = field(default_factory=LevelArgs)


def collect(argv: Sequence[str]) -> None:
    """Run `diffpolicy collect`."""
    args = tyro.cli(CollectArgs, args=argv, prog="diffpolicy collect")
    task = Task(env_id=args.env) if args.env else get_task(args.task)
    if task is None:
        raise SpecError("collect was given neither --task nor --env; name what to play")
    if args.episodes < 1:
        raise DatasetError(f"--episodes is {args.episodes}; give at least 1")
    check_writable(args.out)
    if args.seed < 0:
        raise SpecError(f"--seed is {args.seed}; give 0 or more")
    _check_level(args)
    std, correlation = (0.0, 0.0) if args.level.quality else task.noise
    noise = (
        std if args.noise is None else args.noise,
        correlation if args.noise_correlation is None else args.noise_correlation,
    )
    actor, who = _actor(task, args)
    if args.level.quality == "replay":
        episodes = _replay(actor, task, args.seed)
    else:
        envs = noisy_envs(task, min(args.episodes, PARALLEL), noise)
        if is_hdf5(args.out) and not isinstance(envs.single_observation_space, spaces.Box):
            raise DatasetError(
                f"{task.env_id} has named observations and D4RL's layout, {args.out}, holds one flat array; give a "
                "folder, or minari:<id>"
            )
        with progress_bar() as bar:
            row = bar.add_task("collecting", total=args.episodes)
            episodes = rollout(
                actor,
                envs,
                args.episodes,
                args.seed,
                deterministic=args.level.quality is None,
                on_episode=lambda done: bar.update(row, completed=done),
            )
        episodes = dataclasses.replace(episodes, meta={**episodes.meta, **_period(envs)})
        envs.close()
    made_by = {**who, "noise": {"std": noise[0], "correlation": noise[1]}, "versions": versions()}
    episodes = dataclasses.replace(episodes, meta={**episodes.meta, **made_by})
    save(episodes, args.out)
    print(f"{len(episodes)} episodes, {episodes.steps} steps: {args.out}")
    print(f"  return       {bootstrap(episodes.returns)}")
    success = task.success if args.level.quality != "replay" else None  # a replay buffer keeps no info
    found = outcomes(episodes, success, None, None).success
    if found is not None:
        print(f"  success      {wilson(int(found.sum()), len(found))}")


def _period(envs: VectorEnv) -> dict[str, float]:
    """Return the seconds between actions where MuJoCo says them: a runner refuses to run at another rate."""
    period = getattr(envs.envs[0].unwrapped, "dt", None) if isinstance(envs, SyncVectorEnv) else None
    return {} if period is None else {"control_period": float(period)}


def _check_level(args: CollectArgs) -> None:
    """Refuse options of --quality that contradict each other, before anything takes time."""
    level, quality = args.level, args.level.quality
    training_options = {
        "--steps": level.steps,
        "--stop-at-return": level.stop_at_return,
        "--save-agent": level.save_agent,
    }
    given = [name for name, value in training_options.items() if value is not None]
    if quality in (None, "random") and given:
        raise SpecError(f"{given[0]} is for --quality medium, expert or replay: without a training, leave it out")
    if quality and args.sb3_agent:
        raise SpecError("--quality trains its own agent; leave out --sb3-agent, or --quality")
    if quality in ("medium", "expert", "replay") and (level.steps or 0) < 1:
        raise SpecError(f"--quality {quality} needs --steps, how long it may train: give at least 1")
    if quality == "expert" and level.stop_at_return is not None:
        raise SpecError("--quality expert trains to the end of --steps; leave out --stop-at-return, or take medium")
    if quality == "replay" and args.noise:
        raise SpecError("--quality replay holds the actions of the training; leave out --noise")
    if (folder := _agent_folder(args)) is not None and (folder / "agent.zip").exists():
        raise SpecError(f"{folder} holds an agent already; give another --save-agent or remove it")


def _agent_folder(args: CollectArgs) -> Path | None:
    """Return where a trained agent is saved: --sb3-agent reads the algorithm from the name of the folder."""
    name = (args.env or TASKS[args.task or ""].env_id).split(":")[-1].replace("/", "_")
    return args.level.save_agent and args.level.save_agent / f"{args.level.algorithm}-{name}"


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"{path} cannot be made ({error}); give another --save-agent") from error


def _actor(task: Task, args: CollectArgs) -> tuple[Any, dict[str, Any]]:
    """Return who acts, and who that is in a dataset's provenance."""
    quality = args.level.quality
    if quality == "random":
        env = make_env(task.env_id, **task.env_kwargs)
        env.close()
        return UniformActor(env, args.seed), {"actor": "UniformActor", "quality": quality}
    if quality is not None:
        checks = _train_level(task, args)
        return checks[-1].agent, _training_of(checks, args)
    if args.sb3_agent is not None:
        return load_sb3_agent(args.sb3_agent, trust_pickle=args.trust_pickle), {"actor": str(args.sb3_agent)}
    actor = demonstrator(task)
    return actor, {"actor": type(actor).__name__}


def _train_level(task: Task, args: CollectArgs) -> list[Trained]:
    """Train an agent, and save it where that is asked for; return what its evaluations found."""
    level, checks, folder = args.level, [], _agent_folder(args)
    if folder is not None:
        _make_folder(folder)  # before the training: what cannot be written should not cost it
    with progress_bar() as bar:
        row = bar.add_task(f"training {level.algorithm}", total=level.steps)
        for trained in train_agent(
            lambda: make_env(task.env_id, **task.env_kwargs),
            level.algorithm,
            level.steps or 0,
            args.seed,
            level.stop_at_return,
            on_step=lambda done: bar.update(row, completed=done),
        ):
            checks.append(trained)
            bar.update(row, description=f"training {level.algorithm}, return {trained.mean_return:.1f}")
    last, wanted = checks[-1], level.stop_at_return
    print(f"{level.algorithm} trained {last.steps} steps: mean return {last.mean_return:.1f}")
    if wanted is not None and last.mean_return < wanted:
        print(f"  note         it did not reach {wanted:g}; for data of that level give more --steps")
    if folder is not None:
        save_agent(last.agent, folder / "agent.zip")
        print(f"  agent        {folder}   (acts again with --sb3-agent {folder} --trust-pickle)")
    return checks


def _training_of(checks: Sequence[Trained], args: CollectArgs) -> dict[str, Any]:
    """Return the provenance of data from a trained agent."""
    level = args.level
    packages = ("stable-baselines3", "sb3-contrib") if level.algorithm in ("crossq", "tqc") else ("stable-baselines3",)
    return {
        "actor": level.algorithm,
        "quality": level.quality,
        "deterministic": False,
        "training": {
            "algorithm": level.algorithm,
            "versions": {name: version(name) for name in packages},
            "seed": args.seed,
            "steps": checks[-1].steps,
            "steps_at_most": level.steps,
            "stop_at_return": level.stop_at_return,
            "mean_return": checks[-1].mean_return,
            "evaluations": [[trained.steps, trained.mean_return] for trained in checks],
        },
    }


def _replay(agent: Sb3Agent, task: Task, seed: int) -> Episodes:
    """Return what an agent's training played."""
    played = [_episode(episode) for episode in replay_episodes(agent.model)]
    if not played:
        raise DatasetError("the training ended before its first episode did; give more --steps")
    meta = {
        "env_id": task.env_id.split(":")[-1],
        "env_kwargs": dict(task.env_kwargs),
        "seed": seed,
        "seeds": "training",
    }
    return from_list(played, meta)


def _episode(played: ReplayEpisode) -> Episode:
    obs = played.obs if isinstance(played.obs, dict) else {BOX_NAME: played.obs}
    return Episode(
        obs={name: array.astype("float32") for name, array in obs.items()},
        action=played.action.astype("float32"),
        reward=played.reward,
        terminated=played.terminated,
        truncated=played.truncated,
    )
