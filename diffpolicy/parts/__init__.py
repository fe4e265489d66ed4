"""From names to objects: denoisers, samplers, critics, rewards. The only place of the library that knows names.

`Policy.load` reads it to rebuild what a policy file describes; configurations are plain frozen dataclasses.
"""

from diffpolicy.parts.critics import (
    CriticConfig,
    Selection,
    SelectionConfig,
    make_critic,
    make_noised_value,
    make_selector,
    make_value,
)
from diffpolicy.parts.denoisers import PREDICTIONS, SCHEDULES, DenoiserConfig, make_denoiser, make_encoder
from diffpolicy.parts.rewards import RewardConfig, make_rewards, reward_transform
from diffpolicy.parts.samplers import MOST_STEPS, SAMPLERS, SamplerConfig, make_planner, why_not

__all__ = [
    "MOST_STEPS",
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "CriticConfig",
    "DenoiserConfig",
    "RewardConfig",
    "SamplerConfig",
    "Selection",
    "SelectionConfig",
    "make_critic",
    "make_denoiser",
    "make_encoder",
    "make_noised_value",
    "make_planner",
    "make_rewards",
    "make_selector",
    "make_value",
    "reward_transform",
    "why_not",
]
