"""Tables: agents and strategies by name, what the command line chooses from beside `tasks.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from diffpolicy.agents.bc import Bc, BcConfig
from diffpolicy.agents.cfgrl import Cfgrl, CfgrlConfig
from diffpolicy.agents.decision_diffuser import DecisionDiffuser, DecisionDiffuserConfig
from diffpolicy.agents.diffuser import Diffuser, DiffuserConfig
from diffpolicy.agents.distill import Distill, DistillConfig
from diffpolicy.agents.dql import Dql, DqlConfig
from diffpolicy.agents.edp import Edp, EdpConfig
from diffpolicy.agents.fql import Fql, FqlConfig
from diffpolicy.agents.idql import Idql, IdqlConfig
from diffpolicy.agents.mip import Mip, MipConfig
from diffpolicy.agents.qc import Qc, QcConfig
from diffpolicy.control.strategies import Bidirectional, Ensemble, RealTime, Strategy, Switch, Synchronous
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Kinds, Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.guidance import Pinned, RealTimeChunk, Spread, Trained, blended
from diffpolicy.diffusion.prefix import exponential, hard, linear
from diffpolicy.errors import look_up
from diffpolicy.learning.imitation import ImitationConfig
from diffpolicy.parts import SamplerConfig
from diffpolicy.tasks import Preset
from diffpolicy.train import Agent, TrainConfig


@dataclass(frozen=True)
class Algorithm:
    """An agent and its settings: `agent(spec, normalizer, config, steps, device, seed)`.

    `like` makes its settings of those of `bc`, for tasks whose preset does not name it.
    """

    agent: Callable[..., Agent]
    config: type
    like: Callable[[BcConfig], Any] | None = None


def _training_of(bc: BcConfig) -> dict[str, Any]:
    return {f.name: getattr(bc, f.name) for f in fields(ImitationConfig) if f.name not in ("denoiser", "sampler")}


def _mip_like(bc: BcConfig) -> MipConfig:
    """Return the settings of `bc` with what MIP needs: the same network and training."""
    return MipConfig(replace(bc.denoiser, schedule="flow", prediction="sample"), **_training_of(bc))


def _distill_like(bc: BcConfig) -> DistillConfig:
    """Return the same training, at 0.4 of the learning rate: a student begins with its teacher's weights."""
    return replace(DistillConfig(**_training_of(bc)), learning_rate=0.4 * bc.learning_rate)


AGENTS: dict[str, Algorithm] = {
    "bc": Algorithm(Bc, BcConfig),
    "mip": Algorithm(Mip, MipConfig, _mip_like),
    "distill": Algorithm(Distill, DistillConfig, _distill_like),
    "idql": Algorithm(Idql, IdqlConfig),
    "dql": Algorithm(Dql, DqlConfig),
    "edp": Algorithm(Edp, EdpConfig),
    "qc": Algorithm(Qc, QcConfig),
    "fql": Algorithm(Fql, FqlConfig),
    "diffuser": Algorithm(Diffuser, DiffuserConfig),
    "decision-diffuser": Algorithm(DecisionDiffuser, DecisionDiffuserConfig),
    "cfgrl": Algorithm(Cfgrl, CfgrlConfig),
}


# Names of the ways of joining chunks whose plans come late; `rtc` is real-time chunking as Black et al. (2025) set it,
# `rtc-guided` the same with the guidance that brings Push-T's chunks nearest.
STRATEGIES: dict[str, Strategy] = {
    "synchronous": Synchronous(),
    "switch": Switch(),
    "ensemble": Ensemble(),
    "rtc": RealTime(RealTimeChunk, exponential),
    "rtc-hard": RealTime(Pinned, hard),
    "rtc-soft": RealTime(Pinned, linear),
    "rtc-guided": RealTime(partial(RealTimeChunk, beta=50.0, variance=Spread(0.1)), exponential),
    "rtc-blended": RealTime(blended, linear),
    "rtc-trained": RealTime(Trained, hard),
    "bid": Bidirectional(),
}


def get_strategy(name: str) -> Strategy:
    """Return a way of joining chunks by its name.

    Raises:
        SpecError: if there is none of that name.
    """
    return look_up("strategy", name, STRATEGIES)


def get_algorithm(name: str) -> Algorithm:
    """Return an algorithm by its name.

    Raises:
        SpecError: if there is none of that name.
    """
    return look_up("agent", name, AGENTS)


def settings_for(name: str, preset: Preset) -> Any:
    """Return an agent's settings: the preset's own, else made of its imitation's, else the agent's defaults.

    Raises:
        SpecError: if there is no agent of that name.
    """
    algorithm = get_algorithm(name)
    if name in preset.agents:
        return preset.agents[name]
    if algorithm.like is not None and "bc" in preset.agents:
        return algorithm.like(preset.agents["bc"])
    return algorithm.config()


def straightened(settings: Any) -> Any:
    """Return an agent's settings with flow matching: straight lines, the velocity predicted, 10 steps of Euler."""
    denoiser = replace(settings.denoiser, schedule="flow", prediction="flow")
    return replace(settings, denoiser=denoiser, sampler=SamplerConfig("euler", 10))


def make_agent(
    name: str,
    config: Any,
    spec: Spec,
    episodes: Episodes,
    kinds: Mapping[str, Kinds],
    train: TrainConfig,
    device: torch.device,
) -> Agent:
    """Return an agent for these episodes, with a normalizer fitted to them."""
    normalizer = Normalizer.fit(episodes, kinds, clipped_actions=config.denoiser.clip is not None)
    return get_algorithm(name).agent(spec, normalizer, config, train.steps, device, train.seed)
