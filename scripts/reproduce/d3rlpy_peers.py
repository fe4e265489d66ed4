"""d3rlpy's IQL and TD3+BC on the same files, seeds and episodes as `offline_rl`, into the same table.

    python -m venv peers && peers/bin/pip install d3rlpy==2.8.1 "gymnasium[mujoco]==1.0.0" mujoco==3.10.0 h5py
    peers/bin/python scripts/reproduce/d3rlpy_peers.py DATA --out runs/offline_rl --seeds 0 1 2

A side environment, because d3rlpy 2.8.1 wants gymnasium 1.0, and nothing of diffpolicy is imported in it. Settings are
those of d3rlpy's own reproductions of the papers (IQL: rewards scaled by the range of returns, expectile 0.7, weight
temperature 3, the actor's rate along half a cosine; TD3+BC: standardised observations, alpha 2.5), which are made for
500,000 steps of batches of 256; here they have as many as ours, 20,000, and with `+longer` after their name three times
as many. All steps are drawn alike. A finished run is not run again; a stopped one starts over.
"""

# pyright: reportMissingImports=false
import argparse
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import d3rlpy
import gymnasium
import h5py
import numpy as np
import torch
from d3rlpy.algos import IQLConfig, TD3PlusBCConfig
from d3rlpy.dataset import MDPDataset
from d3rlpy.optimizers import AdamFactory
from d3rlpy.optimizers.lr_schedulers import CosineAnnealingLRFactory
from d3rlpy.preprocessing import ReturnBasedRewardScaler, StandardObservationScaler

REFERENCES = Path(__file__).parents[2] / "diffpolicy" / "data" / "ref_scores.json"
EVALUATION_SEED, SEEDS_APART = 100_000, 1000  # as in offline_rl/results.py
ROBOTS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
AGENTS = ("d3rlpy-iql", "d3rlpy-td3+bc")
LONGER, TIMES = "+longer", 3
DATASETS = tuple(f"{robot}-{quality}" for quality in ("mixed", "expert", "medium") for robot in ROBOTS)


def agent(name: str, steps: int) -> Any:
    """Return one of d3rlpy's agents with the settings of its reproduction."""
    if name.startswith("d3rlpy-iql"):
        cosine = AdamFactory(lr_scheduler_factory=CosineAnnealingLRFactory(T_max=steps))
        scaler = ReturnBasedRewardScaler(multiplier=1000.0)
        return IQLConfig(actor_optim_factory=cosine, reward_scaler=scaler).create(device="cpu:0")
    return TD3PlusBCConfig(observation_scaler=StandardObservationScaler()).create(device="cpu:0")


def steps_of(name: str, steps: int) -> int:
    """Return the gradient steps of an agent by its name."""
    return steps * TIMES if name.endswith(LONGER) else steps


def read(path: Path) -> Any:
    """Return a file of D4RL's layout as d3rlpy's dataset; what follows its last end is one cut short."""
    with h5py.File(path) as file:
        arrays = [np.asarray(file[key], dtype=np.float32) for key in ("observations", "actions", "rewards")]
        terminals, timeouts = (np.asarray(file[key], dtype=np.float32) for key in ("terminals", "timeouts"))
    timeouts[-1] = 1 - terminals[-1]
    return MDPDataset(*arrays, terminals, np.where(terminals > 0, 0, timeouts))


def play(actor: Any, env_id: str, episodes: int, seed: int) -> list[float]:
    """Return the undiscounted returns of episodes reset with `seed, seed + 1, ...`, the greedy action played."""
    envs = [gymnasium.make(env_id) for _ in range(episodes)]
    obs = np.stack([env.reset(seed=seed + k)[0] for k, env in enumerate(envs)])
    returns, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while running.any():
        rows = np.flatnonzero(running)
        for k, action in zip(rows, actor.predict(obs[rows].astype(np.float32)), strict=True):
            obs[k], reward, terminated, truncated, _ = envs[k].step(action)
            returns[k] += float(reward)
            running[k] = not (terminated or truncated)
    for env in envs:
        env.close()
    return returns.tolist()


def score(returns: list[float], robot: str) -> list[float]:
    """D4RL's normalised score of returns."""
    reference = json.loads(REFERENCES.read_text())["envs"][f"{robot}-medium-v2"]
    low, high = reference["ref_min"], reference["ref_max"]
    return [100 * (r - low) / (high - low) for r in returns]


def run(args: argparse.Namespace, name: str, dataset: str, seed: int) -> dict[str, Any]:
    """Train and play; return what offline_rl/results.py reads."""
    d3rlpy.seed(seed)
    steps = steps_of(name, args.steps)
    actor = agent(name, steps)
    actor.fit(
        read(args.data / f"{dataset}.hdf5"),
        n_steps=steps,
        n_steps_per_epoch=steps,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        show_progress=False,
    )
    robot, first = dataset.rpartition("-")[0], EVALUATION_SEED + SEEDS_APART * seed
    returns = play(actor, ROBOTS[robot], args.episodes, first)
    names = ("d3rlpy", "torch", "gymnasium", "mujoco", "numpy")
    return {
        "agent": name,
        "dataset": dataset,
        "seed": seed,
        "score": score(returns, robot),
        "returns": returns,
        "steps": steps,
        "first_episode_seed": first,
        "settings": {"config": str(actor.config)},
        "versions": {package: version(package) for package in names},
    }


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield agent, dataset and seed of every run, in the order of offline_rl."""
    return ((name, dataset, seed) for seed in args.seeds for dataset in args.datasets for name in args.agents)


def result_of(args: argparse.Namespace, name: str, dataset: str, seed: int) -> Path:
    """Return the file of a run's result."""
    return args.out / "results" / f"{name}-{dataset}-{seed}.json"


def main() -> None:
    """Run whatever is not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the datasets, DATASET.hdf5")
    parser.add_argument("--out", type=Path, default=Path("runs/offline_rl"), help="where results go")
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--agents", nargs="+", default=AGENTS, choices=(*AGENTS, *(name + LONGER for name in AGENTS)))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    for name, dataset, seed in wanted(args):
        path, steps = result_of(args, name, dataset, seed), steps_of(name, args.steps)
        if path.exists() and (found := json.loads(path.read_text())["steps"]) != steps:
            parser.error(f"{path} has {found} steps, not {steps}; give another --out, or remove it")
    for name, dataset, seed in wanted(args):
        path = result_of(args, name, dataset, seed)
        if not path.exists():
            result = run(args, name, dataset, seed)
            temporary = path.with_name(f".{path.name}")
            temporary.write_text(json.dumps(result, indent=1))
            temporary.replace(path)
            print(f"{path.stem}: score {np.mean(result['score']):.1f}", flush=True)


if __name__ == "__main__":
    main()
