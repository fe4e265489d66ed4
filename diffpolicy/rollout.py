"""Rollout: an actor plays Gymnasium environments, and what happened comes back as `Episodes`, the type of the files.

An actor is anything with stable-baselines3's `predict(obs, state, episode_start, deterministic) -> (action, state)`.
Environment `i` of N plays episodes `i, i + N, i + 2N, ...`; with our own environments (`make_envs`) episode `k` is
reset with seed `seed + k`, so the result does not depend on N. Vector environments made elsewhere reset by
themselves: then only the first episode of each is seeded, and the step that a NEXT_STEP environment spends on its
reset is not recorded, nor is its action used. Numbers and truths of `info` are recorded, 0 at steps that lack them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from diffpolicy.data.environments import make, register
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.errors import MissingExtraError, SpecError
from diffpolicy.observations import BOX_NAME


class Actor(Protocol):
    """Anything that acts: stable-baselines3's models, our `Policy`, scripted experts."""

    def predict(
        self, obs: Any, /, state: Any = None, episode_start: np.ndarray | None = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Return actions for a batch of observations, and the state for the next call."""
        ...


def make_env(env_id: str, **kwargs: Any) -> gymnasium.Env:
    """Return one environment; the packages that register robotics, Push-T and OGBench are imported when needed.

    Raises:
        MissingExtraError: if no installed package registers `env_id`.
        SpecError: if its actions are not continuous.
    """
    register(env_id)
    try:
        env = make(env_id, **kwargs)
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        raise MissingExtraError(
            f"no installed package makes the environment {env_id!r} ({error}); check its name, "
            "or pip install 'diffpolicy[envs]' (OGBench's: 'diffpolicy[ogbench]')"
        ) from error
    if not isinstance(env.action_space, gymnasium.spaces.Box):
        raise SpecError(f"{env_id} has the action space {env.action_space}; a diffusion policy needs a continuous Box")
    return env


def make_envs(
    env_id: str,
    n: int,
    env_kwargs: Mapping[str, Any] | None = None,
    asynchronous: bool = False,
    wrapper: Callable[[gymnasium.Env], gymnasium.Env] = lambda env: env,
) -> VectorEnv:
    """Return N copies of an environment that reset only when told (`AutoresetMode.DISABLED`)."""
    makers = [lambda: wrapper(make_env(env_id, **(env_kwargs or {})))] * n
    kind = AsyncVectorEnv if asynchronous else SyncVectorEnv
    envs = kind(makers, autoreset_mode=AutoresetMode.DISABLED)
    envs.spec = deepcopy(gymnasium.spec(env_id.split(":")[-1]))
    envs.spec.kwargs.update(env_kwargs or {})
    return envs


@dataclass
class _Recording:
    """What one environment has shown since its episode began."""

    obs: list[Mapping[str, np.ndarray]]
    action: list[np.ndarray] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    info: list[dict[str, float]] = field(default_factory=list)

    def episode(self, terminated: bool, truncated: bool) -> Episode:
        return Episode(
            obs={name: np.stack([o[name] for o in self.obs]).astype(np.float32) for name in self.obs[0]},
            action=np.stack(self.action).astype(np.float32),
            reward=np.array(self.reward, dtype=np.float32),
            terminated=terminated,
            truncated=truncated,
            info={
                key: np.array([told.get(key, 0.0) for told in self.info], dtype=np.float32)
                for key in dict.fromkeys(key for told in self.info for key in told)
            },
        )


def play(
    actor: Actor, envs: VectorEnv, episodes: int, seed: int, deterministic: bool = True
) -> Iterator[tuple[int, Episode]]:
    """Yield `(k, episode)` as episodes end, each `k < episodes` once; see the module for seeds and order."""
    n = envs.num_envs
    mode = envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
    current = np.arange(n)
    obs, _ = envs.reset(seed=_seeds(seed, current))
    recordings = [_Recording([row]) for row in _rows(obs, n)]
    state, start, resetting = None, np.ones(n, dtype=bool), np.zeros(n, dtype=bool)
    remaining = episodes
    while remaining:
        action, state = actor.predict(obs, state=state, episode_start=start, deterministic=deterministic)
        obs, reward, terminated, truncated, info = envs.step(action)
        ended = (terminated | truncated) & ~resetting
        rows = _rows(obs, n)
        final = _rows(info["final_obs"], n) if mode == AutoresetMode.SAME_STEP and ended.any() else rows
        for i in range(n):
            if resetting[i]:
                recordings[i] = _Recording([rows[i]])
                continue
            record = recordings[i]
            record.action.append(np.asarray(action[i]))
            record.reward.append(float(reward[i]))
            record.info.append(_numbers(info, i))
            record.obs.append(final[i] if ended[i] else rows[i])
            if ended[i]:
                if current[i] < episodes:
                    remaining -= 1
                    yield int(current[i]), record.episode(bool(terminated[i]), bool(truncated[i]))
                current[i] += n
        if mode == AutoresetMode.DISABLED and ended.any() and remaining:
            obs, _ = envs.reset(seed=_seeds(seed, current), options={"reset_mask": ended})
            rows = _rows(obs, n)
        if mode != AutoresetMode.NEXT_STEP:
            for i in np.flatnonzero(ended):
                recordings[i] = _Recording([rows[i]])
            start = ended
        else:
            start, resetting = resetting, ended


def _seeds(first: int, episode: np.ndarray) -> Any:
    return [first + int(k) for k in episode]  # vector environments take a list, which their base class does not say


def rollout(
    actor: Actor,
    envs: VectorEnv,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    on_episode: Callable[[int], object] = lambda done: None,
) -> Episodes:
    """Play `episodes` episodes and return them in the order of their seeds; `on_episode` hears how many are done."""
    played: dict[int, Episode] = {}
    for k, episode in play(actor, envs, episodes, seed, deterministic):
        played[k] = episode
        on_episode(len(played))
    keys = dict.fromkeys(key for k in range(episodes) for key in played[k].info)
    whole = [_with_all(played[k], keys) for k in range(episodes)]
    return from_list(whole, meta=_provenance(envs, seed))


def _with_all(episode: Episode, keys: Iterable[str]) -> Episode:
    untold = np.zeros(len(episode), dtype=np.float32)
    return replace(episode, info={key: episode.info.get(key, untold) for key in keys})


def record(
    actor: Actor, env_id: str, env_kwargs: Mapping[str, Any] | None, seed: int
) -> tuple[list[np.ndarray], float]:
    """Film one episode: RGB frames `(H, W, 3)`, and frames a second."""
    env = make_env(env_id, **{**(env_kwargs or {}), "render_mode": "rgb_array"})
    try:
        obs, _ = env.reset(seed=seed)
        frames, state, start, ended = [_frame(env)], None, np.ones(1, dtype=bool), False
        while not ended:
            action, state = actor.predict(obs, state=state, episode_start=start)
            obs, _, terminated, truncated, _ = env.step(action)
            frames.append(_frame(env))
            start, ended = np.zeros(1, dtype=bool), terminated or truncated
        return frames, float(env.metadata.get("render_fps") or 20)
    finally:
        env.close()


def _frame(env: gymnasium.Env) -> np.ndarray:
    return np.asarray(env.render())


def _provenance(envs: VectorEnv, seed: int) -> dict[str, Any]:
    """Return what identifies the environments of a rollout, as JSON values."""
    seeded = envs.metadata.get("autoreset_mode") == AutoresetMode.DISABLED
    return {
        "env_id": envs.spec.id if envs.spec else None,
        "env_kwargs": {k: v for k, v in (envs.spec.kwargs if envs.spec else {}).items() if _is_json(v)},
        "seed": seed,
        "seeds": "seed + episode" if seeded else "first episode of each environment only",
    }


def _is_json(value: object) -> bool:
    return isinstance(value, (bool, int, float, str, type(None)))


def _rows(obs: Any, n: int) -> list[dict[str, np.ndarray]]:
    """Split a batch of observations into one mapping an environment."""
    if isinstance(obs, np.ndarray) and obs.dtype == object:  # `final_obs`: one entry an environment, None where running
        return [_named(obs[i]) if obs[i] is not None else {} for i in range(n)]
    named = _named(obs)
    return [{name: np.array(array[i]) for name, array in named.items()} for i in range(n)]


def _named(obs: Any) -> dict[str, np.ndarray]:
    return dict(obs) if isinstance(obs, Mapping) else {BOX_NAME: obs}


def _numbers(info: Mapping[str, Any], i: int) -> dict[str, float]:
    """Return what environment `i` told of itself in a vector environment's `info`; the final numbers where it reset."""
    ended = "final_info" in info and info["_final_info"][i]
    source = info["final_info"] if ended else info
    return {
        key: float(values[i])
        for key, values in source.items()
        if isinstance(values, np.ndarray)
        and values.ndim == 1
        and not key.startswith("_")
        and (f"_{key}" not in source or source[f"_{key}"][i])
        and isinstance(values[i], (bool, np.bool_, int, float, np.number))
    }
