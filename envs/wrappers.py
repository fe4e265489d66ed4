"""Wrappers for collecting demonstrations: `ActionNoise` disturbs what is executed, so that they show recoveries.

The caller asks for `a` and records it; the environment executes `clip(a + n)`, with a stationary Ornstein-Uhlenbeck
process

    n_0 = std xi_0,    n_k = c n_{k-1} + std sqrt(1 - c^2) xi_k,    xi_k ~ N(0, I),

so `n` has standard deviation `std` at each step and autocorrelation `c^j` at a lag of `j` steps; `c = 0` is white
noise. The idea is that of Laskey et al. (2017), "DART: Noise injection for robust imitation learning".
"""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from .errors import EnvsError

STREAM = 0x4E01  # tells the noise's random numbers from those of an environment with the same seed


class ActionNoise(gym.Wrapper[Any, NDArray[Any], Any, NDArray[Any]], gym.utils.RecordConstructorArgs):
    """Adds noise to the executed action and clips it to the box; `info["executed_action"]` tells what was executed.

    The noise is drawn from `reset(seed=...)`: the same seed gives the same noise. A reset without a seed goes on
    drawing from the former generator. The environment's own random numbers are not touched.

    Example:
        >>> env = ActionNoise(gym.make("diffpolicy_envs:Detour-v0"), std=0.2, correlation=0.8)
        >>> observation, info = env.reset(seed=0)
    """

    def __init__(self, env: gym.Env[Any, NDArray[Any]], std: float, correlation: float = 0.0) -> None:
        """Wraps an environment.

        Args:
            env: with a `Box` of actions.
            std: standard deviation of the noise in units of the action; 0 changes nothing but the clipping.
            correlation: of the noise from one step to the next, from 0 to less than 1.

        Raises:
            EnvsError: actions that are not a `Box`, a negative `std`, a `correlation` outside [0, 1).
        """
        gym.utils.RecordConstructorArgs.__init__(self, std=std, correlation=correlation)
        gym.Wrapper.__init__(self, env)
        if not isinstance(env.action_space, gym.spaces.Box):
            raise EnvsError(f"The actions are {env.action_space}: ActionNoise wants a Box of continuous actions.")
        if not (std >= 0.0 and 0.0 <= correlation < 1.0):
            raise EnvsError(f"std {std}, correlation {correlation}: wanted are std >= 0 and 0 <= correlation < 1.")
        self.box = env.action_space
        self.std, self.correlation = std, correlation
        self._generator = np.random.default_rng()
        self._noise = self._draw()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets the environment and the noise."""
        if seed is not None:
            self._generator = np.random.default_rng([STREAM, seed])
        self._noise = self._draw()
        return self.env.reset(seed=seed, options=options)

    def step(self, action: NDArray[Any]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Executes `action` plus the present noise, clipped to the box."""
        executed = np.clip(action + self._noise, self.box.low, self.box.high).astype(self.box.dtype)
        self._noise = self.correlation * self._noise + np.sqrt(1.0 - self.correlation**2) * self._draw()
        observation, reward, terminated, truncated, info = self.env.step(executed)
        return observation, reward, terminated, truncated, {**info, "executed_action": executed}

    def _draw(self) -> NDArray[np.float64]:
        return self.std * self._generator.standard_normal(self.box.shape)
