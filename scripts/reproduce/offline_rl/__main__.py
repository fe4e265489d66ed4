"""Offline RL on locomotion data in D4RL's layout: datasets x agents x training seeds, one run after the other.

    python scripts/reproduce/offline_rl DATA [--datasets hopper-mixed ...] [--agents bc idql ...] [--seeds 0 1 2]

DATA holds `hopper-mixed.hdf5` and its kin. Settings are the presets of `diffpolicy/tables.py`, one for all datasets;
the last checkpoint plays. A finished run leaves `OUT/results/AGENT-DATASET-SEED.json` at once and is not run again; one
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
from results import EVALUATION_SEED, SEEDS_APART, Run, read
from table import write

from diffpolicy import train as training
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import load
from diffpolicy.data.spec import Spec
from diffpolicy.errors import PolicyError
from diffpolicy.evaluate import outcomes, play_unseen
from diffpolicy.policy import Policy
from diffpolicy.tables import Task, get_task, make_agent
from diffpolicy.train import TrainConfig

ROBOTS = ("hopper", "walker2d", "halfcheetah")
DATASETS = tuple(f"{robot}-{quality}" for quality in ("mixed", "expert", "medium") for robot in ROBOTS)
AGENTS = ("bc", "idql", "dql", "edp", "qc", "fql", "cfgrl", "diffuser", "decision-diffuser")


@dataclass(frozen=True)
class Args:
    """Train and evaluate agents on offline data, one run a dataset, agent and training seed."""

    data: tyro.conf.Positional[Path]
    """Folder of the datasets, DATASET.hdf5."""
    out: Path = Path("runs/offline_rl")
    """Where runs, results and the table go."""
    datasets: tuple[str, ...] = DATASETS
    """Names, ROBOT-QUALITY; the first are run first."""
    agents: tuple[str, ...] = AGENTS
    """Agents that the locomotion preset has settings for."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    episodes: int = 20
    """Episodes played by each trained policy."""
    steps: int | None = None
    """Gradient steps, instead of the preset's."""


@dataclass(frozen=True)
class Job:
    """One run to be made."""

    agent: str
    dataset: str
    seed: int
    task: Task
    train: TrainConfig

    @property
    def name(self) -> str:
        """Return what its folder and its result are called."""
        return f"{self.agent}-{self.dataset}-{self.seed}"

    @property
    def settings(self) -> Any:
        """Return the agent's settings.

        Raises:
            PolicyError: if the preset has none.
        """
        settings = self.task.preset.agents.get(self.agent)
        if settings is None:
            raise PolicyError(
                f"the preset of {self.task.env_id} has no settings for {self.agent!r}; wanted one of "
                f"{', '.join(self.task.preset.agents)}, or an entry in diffpolicy/tables.py"
            )
        return settings


def jobs(args: Args) -> Iterator[Job]:
    """Yield what is asked for: all agents on one dataset, then the next; all datasets with one seed, then the next."""
    for seed in args.seeds:
        for dataset in args.datasets:
            task = get_task(dataset.rpartition("-")[0])
            assert task is not None
            steps = task.preset.train.steps if args.steps is None else args.steps
            for agent in args.agents:
                yield Job(agent, dataset, seed, task, replace(task.preset.train, seed=seed, steps=steps, device="cpu"))


def trained(job: Job, episodes: Episodes, folder: Path) -> Policy:
    """Train, or continue, in a run folder; return the policy of its last checkpoint.

    Raises:
        PolicyError: if the folder holds a run of other settings.
    """
    preset = job.task.preset
    spec = Spec.from_episodes(episodes, preset.horizon, preset.n_obs_steps, preset.n_action_steps)
    agent = make_agent(job.agent, job.settings, spec, episodes, job.task.kinds, job.train, torch.device("cpu"))
    description = described(job, episodes)
    if (folder / "config.json").exists() and json.loads((folder / "config.json").read_text()) != description:
        raise PolicyError(f"{folder} holds a run of other settings, data or versions; give another --out, or remove it")
    for step, metrics in training.train(agent, episodes, job.train, folder, description):
        if step % job.train.validate_every == 0:
            print(f"  {job.name}: step {step}, loss {metrics['loss']:.4f}", flush=True)
    return Policy.load(folder)


def described(job: Job, episodes: Episodes) -> dict[str, Any]:
    """Return what made a run, as JSON values; `diffpolicy evaluate` finds its task there."""
    preset = job.task.preset
    arguments = {
        "task": job.dataset.rpartition("-")[0],
        "agent": job.agent,
        "horizon": preset.horizon,
        "n_obs_steps": preset.n_obs_steps,
        "n_action_steps": preset.n_action_steps,
        job.agent: asdict(job.settings),
        "train": asdict(job.train),
    }
    description = {
        "arguments": arguments,
        "dataset_fingerprint": training.fingerprint(episodes),
        "versions": training.versions(),
    }
    return json.loads(json.dumps(description))


def run(job: Job, args: Args) -> Run:
    """Train and play; return what came of it."""
    episodes = load(str(args.data / f"{job.dataset}.hdf5"))
    policy = trained(job, episodes, args.out / "runs" / job.name)
    first, task = EVALUATION_SEED + SEEDS_APART * job.seed, job.task
    played = play_unseen(policy, task.env_id, task.env_kwargs, args.episodes, first)
    found = outcomes(played, task.success, task.score, task.reference)
    assert found.score is not None
    return Run(
        agent=job.agent,
        dataset=job.dataset,
        seed=job.seed,
        score=tuple(float(x) for x in found.score),
        returns=tuple(float(x) for x in found.returns),
        steps=job.train.steps,
        first_episode_seed=first,
        settings=described(job, episodes)["arguments"],
        versions=training.versions(),
    )


def score_of_data(args: Args, dataset: str) -> float:
    """Mean normalised return of the episodes of a dataset."""
    task, episodes = get_task(dataset.rpartition("-")[0]), load(str(args.data / f"{dataset}.hdf5"))
    assert task is not None
    played = replace(episodes, meta={**episodes.meta, "env_id": task.env_id})
    score = outcomes(played, None, task.score, task.reference).score
    assert score is not None
    return float(score.mean())


def main() -> None:
    """Run whatever is not finished, then write the table."""
    args = tyro.cli(Args, prog="python scripts/reproduce/offline_rl")
    torch.set_num_threads(1)  # more do not help networks of this size; use several processes on other datasets
    args.out.mkdir(parents=True, exist_ok=True)
    data = {dataset: score_of_data(args, dataset) for dataset in args.datasets}
    known = args.out / "data.json"
    known.write_text(json.dumps({**(json.loads(known.read_text()) if known.exists() else {}), **data}))
    for job in jobs(args):
        if (args.out / "results" / f"{job.name}.json").exists():
            continue
        begin = time.process_time()
        result = run(job, args)
        result.save(args.out / "results")
        mean = sum(result.score) / len(result.score)
        print(f"{job.name}: score {mean:.1f}, {time.process_time() - begin:.0f} s of processor time", flush=True)
    print(write(read(args.out / "results"), json.loads(known.read_text()), args.out))


if __name__ == "__main__":
    main()
