"""Gymnasium tasks, wrappers and experts for collecting demonstrations.

Importing the package registers its environments, so `gym.make("diffpolicy_envs:Detour-v0")` works on its own. It needs
Gymnasium and NumPy only; gymnasium-robotics and stable-baselines3 are looked for when something asks for them.
"""

import gymnasium as gym

from .detour import Detour, DetourExpert
from .errors import EnvsError
from .fetch import FetchPickAndPlaceExpert, FetchReachExpert
from .levels import ReplayEpisode, Trained, UniformActor, replay_episodes, save_agent, train_agent
from .pointmaze import PointMazeExpert
from .sb3_agents import Sb3Agent, load_sb3_agent
from .wrappers import ActionNoise

__all__ = [
    "ActionNoise",
    "Detour",
    "DetourExpert",
    "EnvsError",
    "FetchPickAndPlaceExpert",
    "FetchReachExpert",
    "PointMazeExpert",
    "ReplayEpisode",
    "Sb3Agent",
    "Trained",
    "UniformActor",
    "load_sb3_agent",
    "replay_episodes",
    "save_agent",
    "train_agent",
]

gym.register(id="Detour-v0", entry_point="diffpolicy_envs.detour:Detour", max_episode_steps=48)
gym.register(id="FetchReach50Hz-v0", entry_point="diffpolicy_envs.fetch:reach_at_50_hz", max_episode_steps=100)
