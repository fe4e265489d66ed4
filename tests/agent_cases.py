"""Small agents of every kind, which learn the worlds of `worlds.py` in seconds."""

from dataclasses import replace

import torch

from diffpolicy.agents.bc import Bc, BcConfig
from diffpolicy.agents.cfgrl import Cfgrl, CfgrlConfig
from diffpolicy.agents.decision_diffuser import DecisionDiffuser, DecisionDiffuserConfig
from diffpolicy.agents.diffuser import Diffuser, DiffuserConfig
from diffpolicy.agents.dql import Dql, DqlConfig
from diffpolicy.agents.edp import Edp, EdpConfig
from diffpolicy.agents.fql import Fql, FqlConfig
from diffpolicy.agents.idql import Idql, IdqlConfig
from diffpolicy.agents.qc import Qc, QcConfig
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Batch
from diffpolicy.learning.actor import ActorConfig
from diffpolicy.learning.critics import TdConfig
from diffpolicy.parts import CriticConfig, DenoiserConfig, SamplerConfig, SelectionConfig
from diffpolicy.train import Agent, TrainConfig, fit

MLP = DenoiserConfig("mlp", hidden_dim=32, depth=1, step_embed_dim=16, prediction="v_prediction")
FLOW = replace(MLP, schedule="flow", prediction="flow")
UNET = DenoiserConfig("unet1d", down_dims=(8, 16), kernel_size=3, step_embed_dim=16, schedule="flow", prediction="flow")
DDPM, EULER, DPM = (SamplerConfig(name, 5) for name in ("ddpm", "euler", "dpm++2m"))
GAMMA = 0.9
COMMON = {
    "actor": ActorConfig(learning_rate=3e-3),
    "critic": CriticConfig((64, 64)),
    "td": TdConfig(gamma=GAMMA, polyak=0.05, learning_rate=2e-3),
}
IMITATION = {"learning_rate": 3e-3, "warmup_steps": 10}
VALUE = CriticConfig((64, 64), members=1, layer_norm=True, activation="mish")
BEST_OF_8, SOFT = SelectionConfig(8), SelectionConfig(20, temperature=1.0)

AGENTS = {
    "bc": (Bc, BcConfig(MLP, DDPM, **IMITATION)),
    "idql": (Idql, IdqlConfig(MLP, DDPM, selection=BEST_OF_8, **COMMON)),
    "dql": (Dql, DqlConfig(MLP, DDPM, selection=SOFT, **COMMON)),
    "dql max-Q": (Dql, DqlConfig(MLP, DDPM, selection=SelectionConfig(1), backup_samples=5, **COMMON)),
    "edp": (Edp, EdpConfig(MLP, DPM, selection=SelectionConfig(1), alpha=8.0, **COMMON)),
    "qc": (Qc, QcConfig(FLOW, EULER, selection=BEST_OF_8, backup_samples=8, **COMMON)),
    "fql": (Fql, FqlConfig(FLOW, EULER, alpha=0.1, **COMMON)),
    "cfgrl": (Cfgrl, CfgrlConfig(replace(FLOW, told_embed_dim=8), EULER, **COMMON)),
    "diffuser": (Diffuser, DiffuserConfig(MLP, DDPM, value=VALUE, selection=SelectionConfig(1), **IMITATION)),
    "decision-diffuser": (
        DecisionDiffuser,
        DecisionDiffuserConfig(
            replace(MLP, told_embed_dim=8), replace(DDPM, temperature=0.5), dropout=0.5, **IMITATION
        ),
    ),
}
WITH_CRITICS = ["idql", "dql", "edp", "qc", "fql", "cfgrl"]
OFFLINE_RL = [name for name in AGENTS if name != "bc"]


def make(
    name: str, episodes: Episodes, steps: int, chunk: int = 1, horizon: int | None = None, **changes: object
) -> Agent:
    agent, config = AGENTS[name]
    spec = Spec.from_episodes(episodes, horizon=horizon or chunk, n_obs_steps=1, n_action_steps=chunk)
    normalizer = Normalizer.fit(episodes, {"obs": "none"})
    return agent(spec, normalizer, replace(config, **changes), steps, "cpu", 0)


def small_bc(episodes: Episodes, steps: int = 4, seed: int = 0, **settings: object) -> Bc:
    """Imitation by a small network, of chunks of 4 of which 2 are executed."""
    spec = Spec.from_episodes(episodes, horizon=4, n_obs_steps=1, n_action_steps=2)
    return Bc(spec, Normalizer.fit(episodes), BcConfig(replace(MLP, hidden_dim=16), **settings), steps, "cpu", seed)


def everything(agent: Agent, episodes: Episodes) -> Batch:
    """All windows of the agent's, encoded."""
    windows = agent.windows(episodes)
    return agent.normalizer.encode(windows.gather(torch.arange(len(windows))))


def say(critic: torch.nn.Module, *values: float) -> None:
    """Have each member, or all of them, say one number of anything."""
    for parameter in critic.parameters():
        torch.nn.init.zeros_(parameter)
    critic.body[-1].bias.data += torch.tensor(values).view(-1, 1, 1)


def shake(module: torch.nn.Module) -> None:
    """Move its weights a little, always alike."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def learn(agent: Agent, episodes: Episodes, steps: int, batch_size: int = 64) -> None:
    windows = agent.windows(episodes, torch.device("cpu"))
    for _ in fit(agent, windows, TrainConfig(steps=steps, batch_size=batch_size)):
        pass
