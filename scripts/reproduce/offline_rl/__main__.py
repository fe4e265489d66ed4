"""Offline RL: datasets x agents x training seeds, one run after the other.

    python scripts/reproduce/offline_rl DATA [--datasets hopper-mixed ...] [--agents bc idql ...] [--seeds 0 1 2]

DATA holds `hopper-mixed.hdf5` and its kin, `cube-single-play-v0.npz` or `door-human.hdf5`. Settings are the presets of
`diffpolicy/tasks.py`, one for all datasets of locomotion; the last checkpoint plays, and an episode's score is D4RL's,
or 100 for a success. A finished run leaves `OUT/results/AGENT-DATASET-SEED.json` at once and is not run again; one
that was stopped goes on from its checkpoint in `OUT/runs`. d3rlpy's agents join the table through `d3rlpy_peers.py`,
with the same OUT. The table comes at the end; `python scripts/reproduce/offline_rl/table.py OUT/results` writes it too.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from data import LOCOMOTION, get_dataset
from results import EVALUATION_SEED, NARROWLY, SEEDS_APART, Run, read
from table import write

from diffpolicy import train as training
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.spec import Spec
from diffpolicy.errors import PolicyError
from diffpolicy.evaluate import play_unseen
from diffpolicy.policy import Policy
from diffpolicy.provenance import fingerprint, versions
from diffpolicy.tables import make_agent
from diffpolicy.tasks import NARROW, PREFERENCE, Task
from diffpolicy.train import TrainConfig


@dataclass(frozen=True)
class Args:
    """Train and evaluate agents on offline data, one run a dataset, agent and training seed."""

    data: tyro.conf.Positional[Path]
    """Folder of the datasets' files."""
    out: Path = Path("runs/offline_rl")
    """Where runs, results and the table go."""
    datasets: tuple[str, ...] = LOCOMOTION
    """Names; the first are run first."""
    agents: tuple[str, ...] | None = None
    """Agents, those that the task's preset has settings for if not given; `bc+preference` imitates what the others
    draw, `edp-preference` draws all alike as imitation does, and `bc+narrow` or `bc+preference+narrow` is the same
    policy that samples as narrowly as the others do."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    episodes: int = 20
    """Episodes played by each trained policy."""
    steps: int | None = None
    """Gradient steps, instead of the preset's."""


CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "bc+preference": ("bc", {"preference": PREFERENCE}),
    "edp-preference": ("edp", {"preference": 0.0}),
}
"""Agents with one setting that is not their preset's, to see what it alone does."""


@dataclass(frozen=True)
class Job:
    """One run to be made."""

    agent: str
    """Of `AGENTS` or `CONTROLS`, with or without `NARROWLY`."""
    dataset: str
    seed: int
    task: Task
    train: TrainConfig

    @property
    def name(self) -> str:
        """Return what its result is called."""
        return f"{self.agent}-{self.dataset}-{self.seed}"

    @property
    def narrow(self) -> bool:
        """Return whether it acts by the sampler of others."""
        return self.agent.endswith(NARROWLY)

    @property
    def plain(self) -> str:
        """Return the agent's name without how it acts."""
        return self.agent.removesuffix(NARROWLY)

    @property
    def run_name(self) -> str:
        """Return what its run folder is called: those that differ only when they act share one."""
        return f"{self.plain}-{self.dataset}-{self.seed}"

    @property
    def algorithm(self) -> str:
        """Return the agent's name without what makes it a control."""
        return CONTROLS.get(self.plain, (self.plain,))[0]

    @property
    def settings(self) -> Any:
        """Return the agent's settings in training.

        Raises:
            PolicyError: if the preset has none.
        """
        name, changes = CONTROLS.get(self.plain, (self.plain, {}))
        settings = self.task.preset.agents.get(name)
        if settings is None:
            raise PolicyError(
                f"the preset of {self.task.env_id} has no settings for {self.agent!r}; wanted one of "
                f"{', '.join([*self.task.preset.agents, *CONTROLS])}, or an entry in diffpolicy/tasks.py"
            )
        if self.narrow and settings.sampler != replace(NARROW, temperature=1.0):
            raise PolicyError(
                f"{self.agent!r} would not be {self.plain!r} with less noise on {self.dataset}, where it samples by "
                f"{settings.sampler}; leave {NARROWLY} out"
            )
        return replace(settings, **changes)

    @property
    def acting(self) -> Any:
        """Return its settings when it acts."""
        return replace(self.settings, sampler=NARROW) if self.narrow else self.settings


def jobs(args: Args) -> Iterator[Job]:
    """Yield what is asked for: all agents on one dataset, then the next; all datasets with one seed, then the next."""
    for seed in args.seeds:
        for dataset in args.datasets:
            task = get_dataset(dataset).task
            steps = task.preset.train.steps if args.steps is None else args.steps
            for agent in task.preset.agents if args.agents is None else args.agents:
                yield Job(agent, dataset, seed, task, replace(task.preset.train, seed=seed, steps=steps, device="cpu"))


def trained(job: Job, episodes: Episodes, folder: Path) -> Policy:
    """Train, or continue, in a run folder; return the policy of its last checkpoint.

    Raises:
        PolicyError: if the folder holds a run of other settings.
    """
    preset = job.task.preset
    spec = Spec.from_episodes(episodes, preset.horizon, preset.n_obs_steps, preset.n_action_steps)
    agent = make_agent(job.algorithm, job.settings, spec, episodes, job.task.kinds, job.train, torch.device("cpu"))
    description = described(job, episodes)
    config = folder / "config.json"
    before = json.loads(config.read_text()) if config.exists() else description
    before.pop("resumed", None)  # how it was described by whoever began it
    if with_defaults(before, {"arguments": defaults(job), "versions": description["versions"]}) != description:
        raise PolicyError(f"{folder} holds a run of other settings, data or versions; give another --out, or remove it")
    for step, metrics in training.train(agent, episodes, job.train, folder, description):
        if step % job.train.validate_every == 0:
            print(f"  {job.name}: step {step}, loss {metrics['loss']:.4f}", flush=True)
    return Policy.load(folder)


def arguments(job: Job, settings: Any) -> dict[str, Any]:
    """Return a run as JSON values, with the agent's settings; `diffpolicy evaluate` finds its task there."""
    preset = job.task.preset
    run = {
        "task": get_dataset(job.dataset).task_name,
        "agent": job.algorithm,
        "horizon": preset.horizon,
        "n_obs_steps": preset.n_obs_steps,
        "n_action_steps": preset.n_action_steps,
        job.algorithm: asdict(settings),
        "train": asdict(job.train),
    }
    return json.loads(json.dumps(run))


def defaults(job: Job) -> dict[str, Any]:
    """Return what a run did whose settings had no name yet when it was made."""
    settings = {job.algorithm: asdict(type(job.settings)()), "train": asdict(TrainConfig())}
    return json.loads(json.dumps(settings))


def with_defaults(settings: Any, default: Any) -> Any:
    """Fill what nested settings do not have."""
    if not isinstance(settings, dict) or not isinstance(default, dict):
        return settings
    return {**default, **{name: with_defaults(value, default.get(name)) for name, value in settings.items()}}


def described(job: Job, episodes: Episodes) -> dict[str, Any]:
    """Return what made a run."""
    return {
        "arguments": arguments(job, job.settings),
        "dataset_fingerprint": fingerprint(episodes),
        "versions": versions(),
    }


def run(job: Job, args: Args) -> Run:
    """Train and play; return what came of it."""
    dataset = get_dataset(job.dataset)
    episodes = dataset.read(args.data)
    policy = trained(job, episodes, args.out / "runs" / job.run_name)
    if job.narrow:
        policy = policy.with_sampler(NARROW)
    first, task = EVALUATION_SEED + SEEDS_APART * job.seed, job.task
    played = play_unseen(policy, task.env_id, task.env_kwargs, args.episodes, first)
    return Run(
        agent=job.agent,
        dataset=job.dataset,
        seed=job.seed,
        score=tuple(float(x) for x in dataset.score(played)),
        returns=tuple(float(x) for x in played.returns),
        steps=job.train.steps,
        first_episode_seed=first,
        settings=arguments(job, job.acting),
        versions=versions(),
    )


def unfinished(args: Args) -> list[Job]:
    """Return what is still to be run.

    Raises:
        PolicyError: if a finished run had other settings, or an agent has none.
        DatasetError: if a file is missing.
    """
    left = []
    for job in jobs(args):
        settings, path = arguments(job, job.acting), args.out / "results" / f"{job.name}.json"
        if not path.exists():
            left.append(job)
            get_dataset(job.dataset).find(args.data)
        elif with_defaults(json.loads(path.read_text())["settings"], defaults(job)) != settings:
            raise PolicyError(f"{path} is of other settings than today's; give another --out, or remove it")
    return left


def main() -> None:
    """Run whatever is not finished, then write the table."""
    args = tyro.cli(Args, prog="python scripts/reproduce/offline_rl")
    torch.set_num_threads(1)  # more do not help networks of this size; use several processes on other datasets
    args.out.mkdir(parents=True, exist_ok=True)
    data = {dataset: get_dataset(dataset).score_of_data(args.data) for dataset in args.datasets}
    known = args.out / "data.json"
    scored = {dataset: score for dataset, score in data.items() if score is not None}
    known.write_text(json.dumps({**(json.loads(known.read_text()) if known.exists() else {}), **scored}))
    for job in unfinished(args):
        begin = time.process_time()
        result = run(job, args)
        result.save(args.out / "results")
        mean = sum(result.score) / len(result.score)
        print(f"{job.name}: score {mean:.1f}, {time.process_time() - begin:.0f} s of processor time", flush=True)
    print(write(read(args.out / "results"), json.loads(known.read_text()), args.out))


if __name__ == "__main__":
    main()
