"""The environment that a dataset says it is from: make it once, ask its spaces, and compare."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import gymnasium
import numpy as np

from diffpolicy.errors import first_line
from diffpolicy.inspection.findings import Evidence, Finding, Severity, Surroundings
from diffpolicy.inspection.ranges import readable
from diffpolicy.observations import BOX_NAME
from diffpolicy.rollout import make_env


def ask(env_id: str, env_kwargs: Mapping[str, Any]) -> Surroundings:
    """Make the environment and note its spaces; whatever goes wrong becomes the `problem`."""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")  # about newer versions and renderers, of no use here
            env = make_env(env_id, **{k: v for k, v in env_kwargs.items() if k != "render_mode"})
    except Exception as error:  # simulators fail in many ways, none of which should cost the inspection
        return unknown(env_id, first_line(error))
    try:
        return _surroundings(env_id, env)
    finally:
        env.close()


def unknown(env_id: str, problem: str) -> Surroundings:
    """Return an environment that could not be asked, and why."""
    return Surroundings(readable(env_id), {}, np.zeros(0), np.zeros(0), problem=readable(problem, 200))


def of_metadata(meta: Mapping[str, Any]) -> Surroundings | None:
    """Ask the environment that the metadata name, if they do.

    An id with a module, `module:Name`, is not made: a dataset must not choose code to import.
    """
    env_id, env_kwargs = meta.get("env_id"), meta.get("env_kwargs")
    if not isinstance(env_id, str) or not env_id:
        return None
    if ":" in env_id:
        return unknown(env_id, "a dataset's metadata may not import a module; name it with --env if you trust it")
    return ask(env_id, {str(k): v for k, v in env_kwargs.items()} if isinstance(env_kwargs, Mapping) else {})


def _surroundings(env_id: str, env: gymnasium.Env) -> Surroundings:
    space, action = env.observation_space, env.action_space
    assert isinstance(action, gymnasium.spaces.Box)  # make_env refuses others
    named = dict(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else {BOX_NAME: space}
    return Surroundings(
        env_id=readable(env_id),
        obs_shapes={name: tuple(s.shape or ()) for name, s in named.items()},
        low=action.low.astype(np.float64).reshape(-1),
        high=action.high.astype(np.float64).reshape(-1),
        max_steps=env.spec.max_episode_steps if env.spec else None,
    )


def not_asked(e: Evidence) -> Iterator[Finding]:
    """An environment was named and could not be made."""
    if e.environment is not None and e.environment.problem is not None:
        yield Finding(
            Severity.NOTE,
            "environment",
            f"{e.environment.env_id} could not be made, so nothing was compared with it: {e.environment.problem}",
            "Install what it needs, or name another one with --env.",
        )


def other_shapes(e: Evidence) -> Iterator[Finding]:
    """Sizes or names that the environment does not have."""
    env = e.environment
    if env is None or env.problem is not None:
        return
    if len(env.low) != e.action.dims:
        yield Finding(
            Severity.WRONG,
            "action",
            f"has {e.action.dims} dimensions, {env.env_id} takes {len(env.low)}",
            "Name the environment that the data are from: a policy of these data cannot act in this one.",
        )
    have = {name: array.shape[1:] for name, array in e.episodes.obs.items()}
    if missing := [name for name in env.obs_shapes if name not in have]:
        yield Finding(
            Severity.SUSPECT,
            "observations",
            f"{env.env_id} observes {_named(env.obs_shapes)}, the dataset has {_named(have)}",
            f"Rename or build {', '.join(repr(readable(n)) for n in missing)}: Episodes.rename, or a --task that does.",
        )
    for name, shape in env.obs_shapes.items():
        if name in have and have[name] != shape:
            yield Finding(
                Severity.WRONG,
                f"obs {readable(name)!r}",
                f"has shape {have[name]}, {env.env_id} observes {shape}",
                "Name the environment and its arguments as they were when the data were recorded.",
            )


def _named(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{readable(name)!r} {shape}" for name, shape in shapes.items())


def longer_than_allowed(e: Evidence) -> Iterator[Finding]:
    """Episodes that the environment would have cut."""
    env, longest = e.environment, int(e.episodes.length.max())
    if env is not None and env.max_steps is not None and longest > env.max_steps:
        over = int((e.episodes.length > env.max_steps).sum())
        yield Finding(
            Severity.SUSPECT,
            "episodes",
            f"longer than the {env.max_steps} steps of {env.env_id}: {over} of {len(e.episodes)}, up to {longest}",
            "Evaluate with a longer limit, or the policy is stopped before a demonstrator would have finished: "
            f"""diffpolicy evaluate RUN --env {env.env_id} --env-kwargs '{{"max_episode_steps": {longest}}}'.""",
        )


CHECKS = (not_asked, other_shapes, longer_than_allowed)
