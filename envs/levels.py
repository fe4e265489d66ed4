"""Offline data at levels of quality, as D4RL has them (Fu et al. 2020): `random`, `medium`, `expert` and `replay`.

    train_agent --- steps ---> stops at a return -------------> to the end of its steps
    what acts:  random         medium                           expert
    what the training played:  [------ replay -------]

`random` draws uniform actions. `medium` is an agent of stable-baselines3 whose training stops when its mean return
reaches a level, `expert` one that was trained to the end. `replay` is what the training up to `medium` played, from its
replay buffer: episodes in the order in which they ended, with actions in the environment's units.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from .errors import EnvsError
from .sb3_agents import ALGORITHMS, Sb3Agent

STREAM = 0x4E02  # tells uniform actions from other random numbers of the same seed
EVALUATION = 0x4E03  # added to the seed of a training for that of its evaluations
SEEDS = 2**32 - EVALUATION  # stable-baselines3 knows no larger ones
EVALUATED = 10  # episodes of one evaluation
BUFFER = 1_000_000  # transitions kept at most, stable-baselines3's own size
NOISE = 0.1  # of exploration, for algorithms that have none of their own (Fujimoto et al. 2018)

TRAINABLE = ("crossq", "ddpg", "sac", "td3", "tqc")  # for continuous actions, with a replay buffer
SILENT = ("ddpg", "td3")  # their policies explore by nothing but added noise
GOAL_PARTS = {"observation", "achieved_goal", "desired_goal"}


class UniformActor:
    """Draws actions uniformly from the box: a function of seed, episode and step, which are the state.

    Environment `i` of N plays episodes `i, i + N, ...`; episode `k` of seed `s` is episode 0 of seed `s + k`.
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int) -> None:
        """Makes an actor.

        Args:
            env: whose observations tell one from many, and whose box the actions are drawn from.
            seed: of episode 0, not negative.

        Raises:
            EnvsError: actions without bounds.
        """
        self.box, self.seed = bounded(env), seed
        space = env.observation_space
        parts = space.spaces if isinstance(space, gym.spaces.Dict) else {None: space}
        self._name, part = next(iter(parts.items()))
        self._ndim = len(part.shape or ())

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[np.int64], ...] | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], tuple[NDArray[np.int64], ...]]:
        """Returns actions, `(Da,)` or `(N, Da)`, and the state, in stable-baselines3's protocol.

        Args:
            observation: one or N of them, as the environment gives them.
            state: what the former call returned, episode and step, both `(N,)`; None begins with the first episodes.
            episode_start: `(N,)`, where a new episode starts.
            deterministic: part of the protocol; the seed fixes all.
        """
        first = observation if self._name is None else observation[self._name]
        batch = np.shape(first)[: np.ndim(first) - self._ndim]
        episode, step = self._clock(int(np.prod(batch)), state, episode_start)
        action = [self._draw(*numbers) for numbers in zip(episode, step, strict=True)]
        return np.stack(action).reshape(*batch, *self.box.shape), (episode, step + 1)

    def _clock(self, n: int, state: Any, start: NDArray[np.bool_] | None) -> tuple[NDArray[Any], NDArray[Any]]:
        if state is None:
            return np.arange(n), np.zeros(n, np.int64)
        starts = np.zeros(n, bool) if start is None else np.asarray(start)
        return np.where(starts, state[0] + n, state[0]), np.where(starts, 0, state[1])

    def _draw(self, episode: int, step: int) -> NDArray[Any]:
        generator = np.random.default_rng([STREAM, self.seed + episode, step])
        return generator.uniform(self.box.low, self.box.high).astype(self.box.dtype)


def bounded(env: Any) -> gym.spaces.Box:
    """Returns the box of actions of an environment, of Gymnasium or of stable-baselines3.

    Raises:
        EnvsError: actions that are not a box with bounds.
    """
    space = env.action_space
    if isinstance(space, gym.spaces.Box) and space.is_bounded():
        return space
    raise EnvsError(f"The actions are {space}: wanted is a Box with bounds; rescale them with a wrapper.")


@dataclass(frozen=True)
class Trained:
    """What a training has come to. The agent is the same object in all of one training: it goes on learning.

    Args:
        agent: acts by its distribution's mode, or with `deterministic=False` by a draw, as it explored.
        steps: of the environment, so far.
        mean_return: of `EVALUATED` episodes of the mode, undiscounted; their starts are the same each time.
    """

    agent: Sb3Agent
    steps: int
    mean_return: float


def train_agent(
    make_env: Callable[[], gym.Env[Any, Any]],
    algorithm: str,
    steps: int,
    seed: int,
    stop_at_return: float | None = None,
    check_every: int | None = None,
    settings: Mapping[str, Any] | None = None,
    on_step: Callable[[int], object] = lambda steps: None,
) -> Iterator[Trained]:
    """Trains an agent with stable-baselines3's defaults, and yields what it has come to each time it is evaluated.

    Environments with goals are trained with hindsight (Andrychowicz et al. 2017): sparse rewards teach nothing else.

    Args:
        make_env: called twice, for training and for evaluation.
        algorithm: one of `TRAINABLE`.
        steps: of the environment, at most.
        seed: of the training; the same seed trains the same agent on a CPU.
        stop_at_return: the mean return at which the training is over; None trains all steps.
        check_every: steps from one evaluation to the next; None evaluates 100 times, but not before 500 steps.
        settings: arguments of the algorithm, instead of the defaults.
        on_step: hears how many steps are done, after each.

    Raises:
        EnvsError: an unknown algorithm, no steps, actions that are not a box with bounds, or a missing package.
    """
    check_every = max(500, steps // 100) if check_every is None else check_every
    if steps < 1 or check_every < 1 or not 0 <= seed < SEEDS:
        raise EnvsError(
            f"steps is {steps}, check_every {check_every}, seed {seed}: wanted are at least 1, 1, and 0 to {SEEDS - 1}."
        )
    model_class = _class(algorithm)
    env, checked = _vectorised(make_env), _vectorised(make_env)
    try:
        model = model_class(
            env=env, seed=seed, **{**_defaults(algorithm, env, steps), **deepcopy(dict(settings or {}))}
        )
        yield from _train(model, checked, steps, seed, stop_at_return, check_every, on_step)
    finally:
        env.close()
        checked.close()


def _train(
    model: Any,
    checked: Any,
    steps: int,
    seed: int,
    stop_at_return: float | None,
    check_every: int,
    on_step: Callable[[int], object],
) -> Iterator[Trained]:
    while model.num_timesteps < steps:
        part = min(check_every, steps - model.num_timesteps)
        model.learn(part, callback=lambda *_: _tell(on_step, model), reset_num_timesteps=False)
        trained = Trained(Sb3Agent(model, None), model.num_timesteps, _evaluate(model, checked, seed + EVALUATION))
        yield trained
        if stop_at_return is not None and trained.mean_return >= stop_at_return:
            return


def _tell(on_step: Callable[[int], object], model: Any) -> bool:
    on_step(model.num_timesteps)
    return True  # stable-baselines3 stops at anything else


def _evaluate(model: Any, env: Any, seed: int) -> float:
    from stable_baselines3.common.evaluation import evaluate_policy

    env.seed(seed)  # takes effect at the reset that follows
    returns, _ = evaluate_policy(model, env, EVALUATED, return_episode_rewards=True, warn=False)
    return float(np.mean(returns))


def _vectorised(make_env: Callable[[], gym.Env[Any, Any]]) -> Any:
    from stable_baselines3.common.vec_env import DummyVecEnv

    return DummyVecEnv([make_env])


def _defaults(algorithm: str, env: Any, steps: int) -> dict[str, Any]:
    bounded(env)
    return {
        "policy": "MultiInputPolicy" if isinstance(env.observation_space, gym.spaces.Dict) else "MlpPolicy",
        "buffer_size": min(BUFFER, steps + 1),  # a place more than steps: a full buffer has forgotten something
        **_exploration(algorithm, env),
        **_hindsight(env),
    }


def _class(algorithm: str) -> Any:
    if algorithm not in TRAINABLE:
        raise EnvsError(f"'{algorithm}' cannot be trained here: wanted is one of {', '.join(TRAINABLE)}.")
    package, name = ALGORITHMS[algorithm]
    try:
        with redirect_stderr(StringIO()):  # it imports gym where that is installed, which prints a notice
            return getattr(importlib.import_module(package), name)
    except ImportError as error:
        install = package.replace("_", "-")
        raise EnvsError(f"'{algorithm}' needs {install}, which is not installed: pip install {install}.") from error


def _exploration(algorithm: str, env: Any) -> dict[str, Any]:
    from stable_baselines3.common.noise import NormalActionNoise

    if algorithm not in SILENT:
        return {}
    shape = env.action_space.shape
    return {"action_noise": NormalActionNoise(np.zeros(shape), np.full(shape, NOISE))}


def _hindsight(env: Any) -> dict[str, Any]:
    from stable_baselines3 import HerReplayBuffer

    space, spec = env.observation_space, env.envs[0].spec
    if not (isinstance(space, gym.spaces.Dict) and set(space.spaces) >= GOAL_PARTS):
        return {}
    first = spec.max_episode_steps if spec and spec.max_episode_steps else 0  # hindsight wants one whole episode
    return {"replay_buffer_class": HerReplayBuffer, "learning_starts": max(100, first)}


def save_agent(agent: Sb3Agent, path: str | Path) -> None:
    """Saves a trained agent as a zip that `load_sb3_agent` reads; its replay buffer is not part of it.

    Args:
        agent: of `train_agent`.
        path: of the zip; folders are made.
    """
    # Without these two: an agent trained with hindsight could not be loaded without an environment.
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    agent.model.save(path, exclude=["replay_buffer_class", "replay_buffer_kwargs"])


@dataclass(frozen=True)
class ReplayEpisode:
    """One episode of L steps from a replay buffer.

    Args:
        obs: `(L+1, ...)`, or of each part by its name; the last one is what followed the last action.
        action: `(L, Da)`, what was executed, in the environment's units.
        reward: `(L,)`.
        terminated: the task ended; stable-baselines3 says only this where both happened at once.
        truncated: time ran out, and the task had not ended.
    """

    obs: NDArray[Any] | dict[str, NDArray[Any]]
    action: NDArray[Any]
    reward: NDArray[np.float32]
    terminated: bool
    truncated: bool


def replay_episodes(model: Any) -> Iterator[ReplayEpisode]:
    """Yields the episodes of a model's replay buffer in the order in which they ended.

    A buffer that is full has overwritten its past: what it holds of the episode before its first end is left out, be it
    whole or cut, and so are episodes without an end.

    Args:
        model: of stable-baselines3, with a replay buffer, as in `Trained.agent.model`.

    Raises:
        EnvsError: no replay buffer, or one that does not tell observations and kinds of end apart.
    """
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

    buffer = model.replay_buffer if isinstance(model, OffPolicyAlgorithm) else None
    if buffer is None:
        raise EnvsError(f"{type(model).__name__} keeps no replay buffer: train one of {', '.join(TRAINABLE)}.")
    if buffer.optimize_memory_usage or not buffer.handle_timeout_termination:
        raise EnvsError(
            "The replay buffer was made with optimize_memory_usage or without handle_timeout_termination and has lost "
            "how episodes ended: train with stable-baselines3's defaults of both."
        )
    order = np.roll(np.arange(buffer.buffer_size), -buffer.pos) if buffer.full else np.arange(buffer.pos)
    begins = [None if buffer.full else 0] * buffer.n_envs
    for row, env in np.argwhere(buffer.dones[order] > 0):
        first, begins[env] = begins[env], row + 1
        if first is not None:
            yield _episode(buffer, model.policy, order[first : row + 1], env)


def _episode(buffer: Any, policy: Any, rows: NDArray[np.int64], env: int) -> ReplayEpisode:
    def path(before: NDArray[Any], after: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([before[rows, env], after[rows[-1:], env]])

    before, after = buffer.observations, buffer.next_observations
    obs = (
        {name: path(before[name], after[name]) for name in before} if isinstance(before, dict) else path(before, after)
    )
    scaled = buffer.actions[rows, env].reshape(len(rows), *buffer.action_space.shape)
    action = policy.unscale_action(scaled).reshape(len(rows), -1)
    timeout = bool(buffer.timeouts[rows[-1], env])
    return ReplayEpisode(obs, action, buffer.rewards[rows, env].copy(), not timeout, timeout)
