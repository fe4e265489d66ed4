"""Tasks by name, with presets that are known to work: what `--task` chooses from.

A task says which environment belongs to a dataset, how its observations are named and normalised, what success is,
and which settings train on it. Only this module and the command line import the environments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium

from diffpolicy.agents.bc import BcConfig
from diffpolicy.agents.cfgrl import CfgrlConfig
from diffpolicy.agents.decision_diffuser import DecisionDiffuserConfig
from diffpolicy.agents.diffuser import DiffuserConfig
from diffpolicy.agents.dql import DqlConfig
from diffpolicy.agents.edp import EdpConfig
from diffpolicy.agents.fql import FqlConfig
from diffpolicy.agents.idql import IdqlConfig
from diffpolicy.agents.qc import QcConfig
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Kinds
from diffpolicy.data.scores import Reference
from diffpolicy.errors import SpecError, look_up
from diffpolicy.guides import ClassifierFreeGuidance
from diffpolicy.learning.actor import ActorConfig
from diffpolicy.learning.critics import TdConfig
from diffpolicy.parts import CriticConfig, DenoiserConfig, RewardConfig, SamplerConfig, SelectionConfig
from diffpolicy.rollout import Actor, make_env, make_envs
from diffpolicy.train import TrainConfig
from diffpolicy_envs import ActionNoise, DetourExpert, FetchPickAndPlaceExpert, FetchReachExpert, PointMazeExpert

TINY = DenoiserConfig(down_dims=(32, 64, 128), kernel_size=3, step_embed_dim=64)
SMALL = DenoiserConfig(down_dims=(64, 128, 256), kernel_size=3, step_embed_dim=128)
REACH = BcConfig(replace(TINY, obs_embed_dim=64), learning_rate=1e-3, warmup_steps=200)

# Locomotion, sized for one CPU core: the same small actor and the same critics for all agents.
MLP = DenoiserConfig("mlp", hidden_dim=128, depth=3, step_embed_dim=32, prediction="v_prediction")
TOLD = replace(MLP, told_embed_dim=32)
FIVE = SamplerConfig("ddpm", 5)
# After 20,000 steps samples spread more than the data and the best of many is an outlier: who must do better than the
# data samples narrowly.
NARROW = replace(FIVE, temperature=0.25)
TRAINING: dict[str, Any] = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "warmup_steps": 0}
PREFERENCE = 10.0  # Hong et al.'s with IQL: mixed data have agents of every quality, and who acts well is one of them
CRITICS: dict[str, Any] = {
    "denoiser": MLP,
    "sampler": NARROW,
    "actor": ActorConfig(learning_rate=1e-3),
    "critic": CriticConfig((256, 256)),
    "td": TdConfig(polyak=0.01, learning_rate=1e-3, rewards=RewardConfig("return_range", scale=0.1)),
    "selection": SelectionConfig(samples=32),
    "preference": PREFERENCE,
}
ONE = SelectionConfig()
LOCOMOTION: dict[str, Any] = {
    "bc": BcConfig(MLP, FIVE, **TRAINING),
    "idql": IdqlConfig(**CRITICS),
    # Without LayerNorm its values ran away on hopper: 1,000 after 9,000 steps, where no return exceeds 18. At the
    # paper's eta of 1 it scored 40, 2 and -1 on the mixed sets, at 0.1 101, 68 and 76.
    "dql": DqlConfig(**{**CRITICS, "critic": CriticConfig((256, 256), layer_norm=True)}, eta=0.1),
    "edp": EdpConfig(**CRITICS),
    "qc": QcConfig(**CRITICS, backup_samples=4),
    "fql": FqlConfig(**{**CRITICS, "sampler": SamplerConfig("ddim", 5), "selection": ONE}),
    "cfgrl": CfgrlConfig(**{**CRITICS, "denoiser": TOLD, "selection": ONE}, tau=0.7),
    "diffuser": DiffuserConfig(
        MLP, NARROW, **TRAINING, gamma=0.99, selection=SelectionConfig(samples=32), preference=PREFERENCE
    ),
    "decision-diffuser": DecisionDiffuserConfig(
        TOLD,
        SamplerConfig("ddim", 10, temperature=0.0),
        **TRAINING,
        guidance=ClassifierFreeGuidance(weight=1.2, goal=0.95),
        whole_episode=True,
        preference=PREFERENCE,
    ),
}

# Manipulation: chunks of 5 are valued as a whole (Li et al. 2025).
FLOW = DenoiserConfig("mlp", hidden_dim=256, depth=3, step_embed_dim=32, schedule="flow", prediction="flow")
EULER = SamplerConfig("euler", 5)
CHUNKED: dict[str, Any] = {
    "denoiser": FLOW,
    "sampler": EULER,
    "actor": ActorConfig(learning_rate=1e-3),
    "critic": CriticConfig((256, 256, 256), layer_norm=True, activation="gelu", aggregate="mean"),
    "td": TdConfig(polyak=0.01, learning_rate=1e-3),
    "selection": SelectionConfig(samples=32),
}
CUBE: dict[str, Any] = {  # rewards -1, and 0 once it is done
    "bc": BcConfig(FLOW, EULER, **TRAINING),
    "idql": IdqlConfig(**CHUNKED, tau=0.9),
    "qc": QcConfig(**CHUNKED, backup_samples=4),
    "fql": FqlConfig(**{**CHUNKED, "selection": ONE}, alpha=300.0, normalize_q=False),
}
CAREFUL = {  # 25 demonstrations: the data are nearly all that is good
    **CHUNKED,
    "critic": replace(CHUNKED["critic"], aggregate="min"),
    "td": replace(CHUNKED["td"], rewards=RewardConfig("standard")),
}
DOOR: dict[str, Any] = {
    "bc": CUBE["bc"],
    "idql": IdqlConfig(**CAREFUL, tau=0.7),
    "qc": QcConfig(**CAREFUL, backup_samples=4),
    "fql": FqlConfig(**{**CAREFUL, "selection": ONE}, alpha=10.0),
}


@dataclass(frozen=True)
class Preset:
    """Horizons and settings that are known to work for a task."""

    horizon: int = 16
    n_obs_steps: int = 2
    n_action_steps: int = 8
    agents: Mapping[str, Any] = field(default_factory=dict)
    """Settings of agents by name; an agent not named here has its own defaults."""
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Task:
    """An environment and the data that belongs to it.

    Args:
        env_id: Gymnasium id.
        env_kwargs: arguments of `gymnasium.make`.
        rename: observation names of foreign datasets, `{name in the environment: name in the dataset}`.
        kinds: how observations are normalised, `limits` where not given.
        success: name of the `info` value that says success, None if the task has none.
        score: which number of an episode is its score: `max_reward`, `d4rl` (normalised return), or None.
        reference: of the score: D4RL's name, or the reference itself.
        preset: settings.
        expert: from an environment of this task, who demonstrates it; None where nobody can.
        noise: standard deviation and correlation of the noise on the executed action of demonstrations.
    """

    env_id: str
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Kinds] = field(default_factory=dict)
    success: str | None = None
    score: str | None = None
    reference: str | Reference | None = None
    preset: Preset = field(default_factory=Preset)
    expert: Callable[[gymnasium.Env], Actor] | None = None
    noise: tuple[float, float] = (0.0, 0.0)


def _maze(env_id: str, denoiser: DenoiserConfig, steps: int, speed: float) -> Task:
    bc = BcConfig(denoiser=denoiser, learning_rate=1e-3, warmup_steps=200)
    return Task(
        env_id=env_id,
        env_kwargs={"continuing_task": False},
        success="success",
        preset=Preset(agents={"bc": bc}, train=TrainConfig(steps=steps)),
        expert=lambda env: PointMazeExpert.from_env(env, speed),
        noise=(0.5, 0.9),
    )


def _fetch(env_id: str, bc: BcConfig, steps: int, expert: type[Actor], noise: tuple[float, float]) -> Task:
    return Task(
        env_id=env_id,
        success="is_success",
        preset=Preset(agents={"bc": bc}, train=TrainConfig(steps=steps)),
        expert=lambda env: expert(),
        noise=noise,
    )


def _locomotion(name: str) -> Task:
    train = TrainConfig(steps=20_000, batch_size=256, validate_every=5000)
    preset = Preset(horizon=1, n_obs_steps=1, n_action_steps=1, agents=LOCOMOTION, train=train)
    reference = f"{name.lower()}-medium-v2"
    return Task(env_id=f"{name}-v4", kinds={"obs": "standard"}, score="d4rl", reference=reference, preset=preset)


def _manipulation(env_id: str, agents: Mapping[str, Any], reference: str | None = None) -> Task:
    train = TrainConfig(steps=20_000, batch_size=256, validate_every=5000)
    preset = Preset(horizon=5, n_obs_steps=1, n_action_steps=5, agents=agents, train=train)
    score = None if reference is None else "d4rl"
    return Task(env_id, kinds={"obs": "standard"}, success="success", score=score, reference=reference, preset=preset)


TASKS: dict[str, Task] = {
    "pusht": Task(
        env_id="gym_pusht/PushT-v0",
        env_kwargs={"obs_type": "state"},
        rename={"obs": "state"},
        kinds={"obs": ("limits", "limits", "limits", "limits", "angle")},
        success="is_success",
        score="max_reward",
        preset=Preset(
            agents={"bc": BcConfig(denoiser=replace(SMALL, obs_embed_dim=128), learning_rate=4e-4)},
            train=TrainConfig(steps=24_000),
        ),
    ),
    "pointmaze-umaze": _maze("PointMaze_UMaze-v3", TINY, 3000, speed=4.0),
    "pointmaze-medium": _maze("PointMaze_Medium-v3", SMALL, 9_000, speed=3.0),
    "detour": Task(
        env_id="diffpolicy_envs:Detour-v0",
        success="success",
        preset=Preset(agents={"bc": BcConfig(denoiser=TINY, learning_rate=1e-3)}, train=TrainConfig(steps=2000)),
        expert=lambda env: DetourExpert(),
    ),
    "fetch-reach": _fetch("FetchReach-v4", REACH, 3000, FetchReachExpert, noise=(0.2, 0.0)),
    "fetch-reach-50hz": _fetch("diffpolicy_envs:FetchReach50Hz-v0", REACH, 3000, FetchReachExpert, noise=(0.2, 0.0)),
    "fetch-pick-and-place": _fetch(
        "FetchPickAndPlace-v4", BcConfig(SMALL, learning_rate=4e-4), 12_000, FetchPickAndPlaceExpert, noise=(0.2, 0.8)
    ),
    "halfcheetah": _locomotion("HalfCheetah"),
    "hopper": _locomotion("Hopper"),
    "walker2d": _locomotion("Walker2d"),
    "cube-single": _manipulation("cube-single-singletask-v0", CUBE),
    "door": _manipulation("AdroitHandDoor-v1", DOOR, reference="door-human-v1"),
}


def get_task(name: str | None) -> Task | None:
    """Return a task by its name.

    Raises:
        SpecError: if there is none of that name.
    """
    return None if name is None else look_up("task", name, TASKS)


def prepare(task: Task | None, episodes: Episodes) -> Episodes:
    """Name the observations of a dataset as the task's environment does."""
    if task is None or not task.rename or set(task.rename) <= set(episodes.obs):
        return episodes
    return episodes.rename(task.rename)


def demonstrator(task: Task) -> Actor:
    """Return the task's expert.

    Raises:
        SpecError: if nobody can demonstrate this task.
    """
    if task.expert is None:
        able = [name for name, other in TASKS.items() if other.expert is not None]
        raise SpecError(
            f"nobody here can demonstrate {task.env_id}; wanted one of {', '.join(able)}, --sb3-agent or --quality"
        )
    env = make_env(task.env_id, **task.env_kwargs)
    try:
        return task.expert(env)
    finally:
        env.close()


def noisy_envs(task: Task, n: int, noise: tuple[float, float]) -> gymnasium.vector.VectorEnv:
    """Return N environments that add noise (standard deviation, correlation) to the executed action.

    Demonstrations must show how to come back from an error: the clean action is what is recorded.
    """
    std, correlation = noise
    return make_envs(
        task.env_id, n, task.env_kwargs, wrapper=lambda env: ActionNoise(env, std, correlation) if std != 0 else env
    )
