"""From names to objects: schedules, predictions, samplers, networks. The only place of the library that knows names.

`Policy.load` reads it to rebuild what a policy file describes; configurations are plain frozen dataclasses.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import nn

from diffpolicy.data import rewards
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion import denoiser as predictions
from diffpolicy.diffusion.denoiser import Denoiser, NetworkDenoiser, Prediction
from diffpolicy.diffusion.guidance import Clipped
from diffpolicy.diffusion.sampler import Ddim, DpmPP2M, Heun, Mip, Sample, Sampler
from diffpolicy.diffusion.schedule import Cosine, Flow, Linear, Schedule
from diffpolicy.diffusion.selection import BestOf
from diffpolicy.errors import DatasetError, SpecError
from diffpolicy.nets import critic as critics
from diffpolicy.nets.critic import Aggregate, Critic, Ensemble, NoisedValue, Value
from diffpolicy.nets.encoder import EmbeddingEncoder, FlattenEncoder, ToldEncoder
from diffpolicy.nets.mlp import Mlp
from diffpolicy.nets.network import Network
from diffpolicy.nets.prefixed import Prefixed
from diffpolicy.nets.unet1d import UNet1d

SCHEDULES: dict[str, Schedule] = {"linear": Linear(), "cosine": Cosine(), "flow": Flow()}

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": predictions.epsilon,
    "sample": predictions.sample,
    "v_prediction": predictions.v_prediction,
    "flow": predictions.flow,
}

SAMPLERS: dict[str, Callable[[float], Sampler]] = {
    "ddpm": lambda eta: Ddim(1.0),
    "ddim": Ddim,
    "euler": lambda eta: Ddim(0.0),
    "heun": lambda eta: Heun(),
    "dpm++2m": lambda eta: DpmPP2M(),
    "mip": lambda eta: Mip(),
    "one_step": lambda eta: Ddim(0.0),
}

# What a network was trained for: any sampler that asks for E[x | x_t], or one alone. The sampler that is saved with a
# policy says which; `why_not` keeps to it.
MOST_STEPS = {"mip": 2, "one_step": 1}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": lambda: nn.GELU("tanh"),
    "mish": nn.Mish,
}

AGGREGATES: dict[str, Callable[[float], Aggregate]] = {
    "min": lambda rho: critics.minimum,
    "mean": lambda rho: critics.mean,
    "lower_bound": critics.LowerBound,
}

REWARDS: dict[str, Callable[[Episodes], tuple[float, float]]] = {
    "plain": rewards.plain,
    "return_range": rewards.return_range,
    "standard": rewards.standard,
}


@dataclass(frozen=True)
class DenoiserConfig:
    """The denoising network and what it predicts."""

    network: Literal["unet1d", "mlp"] = "unet1d"
    """Temporal U-Net, or a plain network over the flattened chunk."""
    down_dims: tuple[int, ...] = (256, 512, 1024)
    """U-Net: channels of each level."""
    kernel_size: int = 5
    """U-Net: width of the convolutions in time steps, odd."""
    groups: int = 8
    """U-Net: groups of each GroupNorm."""
    step_embed_dim: int = 256
    """Size of the diffusion time's embedding."""
    obs_embed_dim: int = 0
    """Size of a learned embedding of the observation history, beside the history itself; 0 for none."""
    hidden_dim: int = 256
    """Mlp: width."""
    depth: int = 3
    """Mlp: residual blocks."""
    schedule: Literal["linear", "cosine", "flow"] = "cosine"
    """How signal and noise mix over diffusion time."""
    prediction: Literal["epsilon", "sample", "v_prediction", "flow"] = "epsilon"
    """What the network is trained to predict."""
    clip: float | None = 1.0
    """Sampling clips the clean estimate to plus or minus this, on the unit scale; None for no clipping."""
    max_delay: int = 0
    """Longest delay, in actions, for which the network learns to continue a chunk being executed; 0 for none."""
    told_embed_dim: int = 0
    """Size of the embedding of what the policy is told to reach, where an agent tells it; 0 for none."""


@dataclass(frozen=True)
class SamplerConfig:
    """How a chunk is sampled; any trained policy runs under any of them."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpm++2m", "mip", "one_step"] = "ddim"
    """Rule of one step; mip and one_step are for networks that were trained for them, and for no others."""
    steps: int = 10
    """Steps from noise to data."""
    eta: float = 0.0
    """Ddim only: 0 is deterministic, 1 is DDPM."""
    temperature: float = 1.0
    """Factor of every draw of noise: below 1 chunks spread less."""


@dataclass(frozen=True)
class CriticConfig:
    """An ensemble of networks that value the executed actions of a chunk."""

    hidden: tuple[int, ...] = (256, 256)
    """Width of each layer."""
    members: int = 2
    """Networks of the ensemble."""
    layer_norm: bool = False
    """LayerNorm before each activation."""
    activation: Literal["relu", "gelu", "mish"] = "relu"
    """Nonlinearity."""
    aggregate: Literal["min", "mean", "lower_bound"] = "min"
    """One value of the members': smallest, mean, or mean minus rho standard deviations."""
    rho: float = 1.0
    """lower_bound only: how many standard deviations."""


@dataclass(frozen=True)
class SelectionConfig:
    """How many chunks are sampled to act, and how a critic chooses one of them."""

    samples: int = 1
    """Chunks sampled a plan; 1 chooses nothing."""
    temperature: float = 0.0
    """0 takes the best; above, one is drawn by the softmax of value / temperature."""


@dataclass(frozen=True)
class Selection:
    """A trained critic, what it was made from, and how it chooses."""

    critic: Critic | NoisedValue
    critic_config: CriticConfig
    config: SelectionConfig


@dataclass(frozen=True)
class RewardConfig:
    """What critics see of a reward `r`: `scale k(r) + shift`, with `k` of the kind."""

    kind: Literal["plain", "return_range", "standard"] = "plain"
    """k: r itself; 1000 r / (best return - worst return); or (r - mean) / standard deviation."""
    scale: float = 1.0
    """Factor."""
    shift: float = 0.0
    """Added afterwards."""


def make_encoder(config: DenoiserConfig, spec: Spec, normalizer: Normalizer) -> nn.Module:
    """Return a fresh encoder of the observation history.

    Raises:
        SpecError: if the size of an embedding is negative.
    """
    names = tuple(spec.obs_shapes)
    if min(config.obs_embed_dim, config.told_embed_dim) < 0:
        raise SpecError(
            f"obs_embed_dim is {config.obs_embed_dim} and told_embed_dim {config.told_embed_dim}; give sizes, or 0 for "
            "no embedding"
        )
    encoder = FlattenEncoder(names)
    if config.obs_embed_dim:
        encoder = EmbeddingEncoder(names, _flat_dim(spec, normalizer), config.obs_embed_dim)
    return encoder if config.told_embed_dim == 0 else ToldEncoder(encoder, config.told_embed_dim)


def _flat_dim(spec: Spec, normalizer: Normalizer) -> int:
    return spec.n_obs_steps * sum(normalizer[name].encoded_dim for name in spec.obs_shapes)


def make_denoiser(config: DenoiserConfig, spec: Spec, normalizer: Normalizer) -> NetworkDenoiser:
    """Return a fresh denoiser of the configured network, schedule and prediction, for the sizes of `spec`.

    Raises:
        SpecError: if a name is unknown or the network cannot have these sizes.
    """
    cond_dim = _flat_dim(spec, normalizer) + config.obs_embed_dim + config.told_embed_dim
    try:
        network = _network(config, spec, cond_dim)
        return NetworkDenoiser(network, SCHEDULES[config.schedule], PREDICTIONS[config.prediction])
    except KeyError as error:
        raise SpecError(
            f"there is no network, schedule or prediction {error}; update diffpolicy or correct it"
        ) from error
    except ValueError as error:
        raise SpecError(str(error)) from error


def _network(config: DenoiserConfig, spec: Spec, cond_dim: int) -> Network:
    """Return the network, one that can continue a chunk where the configuration says for how long a delay."""
    if config.max_delay == 0:
        return NETWORKS[config.network](config, spec, cond_dim)
    longest = spec.n_obs_steps - 1 + config.max_delay
    if config.max_delay < 0 or longest >= spec.horizon:
        raise SpecError(
            f"max_delay is {config.max_delay}; give at least 0 and at most horizon {spec.horizon} - n_obs_steps "
            f"{spec.n_obs_steps} = {spec.horizon - spec.n_obs_steps}"
        )
    marked = replace(spec, action_dim=spec.action_dim + 1)
    return Prefixed(NETWORKS[config.network](config, marked, cond_dim), longest)


def make_planner(denoiser: Denoiser, clip: float | None, config: SamplerConfig, repeats: int = 1) -> Sample:
    """Return the planner that samples from `denoiser`, clipped; each step is taken `repeats` times.

    Raises:
        SpecError: if the sampler is unknown or has no steps, or its temperature is negative.
    """
    if config.sampler not in SAMPLERS or config.steps < 1:
        raise SpecError(
            f"got sampler {config.sampler!r} with {config.steps} steps; wanted one of {', '.join(SAMPLERS)} "
            "with at least 1 step"
        )
    if not config.temperature >= 0:
        raise SpecError(f"got a temperature of {config.temperature}; wanted at least 0")
    clipped = denoiser if clip is None else Clipped(denoiser, clip)
    return Sample(clipped, SAMPLERS[config.sampler](config.eta), config.steps, repeats, config.temperature)


def why_not(wanted: SamplerConfig, trained: SamplerConfig, prediction: str) -> str:
    """Say in one sentence why a network cannot be sampled as `wanted`, or nothing where it can.

    Args:
        wanted: how to sample.
        trained: a sampler that the network was trained for.
        prediction: what it predicts.
    """
    most = MOST_STEPS.get(wanted.sampler)
    if wanted.sampler != trained.sampler and (most is not None or trained.sampler in MOST_STEPS):
        others = [name for name in SAMPLERS if name not in MOST_STEPS]
        able = trained.sampler if trained.sampler in MOST_STEPS else ", ".join(others)
        return f"the network was not trained for the sampler {wanted.sampler!r}; choose from {able}"
    if most is not None and wanted.steps > most:
        return f"the sampler {wanted.sampler!r} takes at most {most} step{'s' * (most > 1)}, not {wanted.steps}"
    if wanted.steps == 1 and prediction == "epsilon":
        return (
            "one step of a network that predicts the noise divides by alpha, almost 0 there; take 2 steps or more, "
            "or train a student of one step with --agent distill"
        )
    return ""


def make_selector(planner: Sample, selection: Selection | None) -> Sample | BestOf:
    """Return the planner that samples several times and keeps what the critic chooses; `planner` itself for 1 sample.

    Raises:
        SpecError: if the number of samples or the temperature is impossible.
    """
    if selection is None:
        return planner
    n, temperature = selection.config.samples, selection.config.temperature
    if n < 1 or not temperature >= 0:
        raise SpecError(
            f"got {n} samples and temperature {temperature}; wanted at least 1 sample and a temperature of at least 0"
        )
    return planner if n == 1 else BestOf(planner, selection.critic.value, n, temperature)


def make_critic(config: CriticConfig, spec: Spec, normalizer: Normalizer) -> Critic:
    """Return a fresh ensemble of critics over the flat history and the executed actions.

    Raises:
        SpecError: if a name is unknown or a size below 1.
    """
    obs_dim = _flat_dim(spec, normalizer)
    body = _ensemble(config, obs_dim + spec.n_action_steps * spec.action_dim, config.members)
    return Critic(body, obs_dim, spec.executed, _aggregate(config))


def make_value(config: CriticConfig, spec: Spec, normalizer: Normalizer) -> Value:
    """Return a fresh value network over the flat history, of the critics' shape.

    Raises:
        SpecError: if a name is unknown or a size below 1.
    """
    obs_dim = _flat_dim(spec, normalizer)
    return Value(_ensemble(config, obs_dim, 1), obs_dim)


def make_noised_value(
    config: CriticConfig, denoiser: DenoiserConfig, spec: Spec, normalizer: Normalizer
) -> NoisedValue:
    """Return a fresh value of chunks noised by the denoiser's schedule, of the critics' shape.

    Raises:
        SpecError: if a name is unknown or a size below 1.
    """
    obs_dim, time_dim = _flat_dim(spec, normalizer), denoiser.step_embed_dim
    body = _ensemble(config, obs_dim + time_dim + spec.horizon * spec.action_dim, config.members)
    return NoisedValue(body, obs_dim, time_dim, SCHEDULES[denoiser.schedule], _aggregate(config))


def _aggregate(config: CriticConfig) -> Aggregate:
    if config.aggregate not in AGGREGATES:
        raise SpecError(f"there is no aggregate {config.aggregate!r}; wanted one of {', '.join(AGGREGATES)}")
    return AGGREGATES[config.aggregate](config.rho)


def _ensemble(config: CriticConfig, in_dim: int, members: int) -> Ensemble:
    if config.activation not in ACTIVATIONS or members < 1 or min(config.hidden, default=1) < 1:
        raise SpecError(
            f"got {members} critics of layers {config.hidden} with activation {config.activation!r}; wanted at least "
            f"1 critic, layers of at least 1 and one of {', '.join(ACTIVATIONS)}"
        )
    return Ensemble(in_dim, config.hidden, members, ACTIVATIONS[config.activation], config.layer_norm)


def reward_transform(config: RewardConfig, episodes: Episodes) -> tuple[float, float]:
    """Return `(scale, shift)` of what critics see of the rewards of these episodes.

    Raises:
        DatasetError: if the kind needs rewards that differ and they do not.
    """
    scale, shift = REWARDS[config.kind](episodes)
    return config.scale * scale, config.scale * shift + config.shift


def make_rewards(config: RewardConfig, episodes: Episodes) -> Episodes:
    """Return the episodes with their rewards as critics see them.

    Raises:
        DatasetError: if every reward is 0, or the kind needs rewards that differ and they do not.
    """
    if not np.any(episodes.reward):
        raise DatasetError(
            "every reward is 0, so there is nothing to value; name the task whose rewards are wanted (--relabel, of "
            "OGBench's datasets), or imitate"
        )
    return rewards.transformed(episodes, *reward_transform(config, episodes))


def _unet1d(config: DenoiserConfig, spec: Spec, cond_dim: int) -> Network:
    return UNet1d(spec.action_dim, cond_dim, config.down_dims, config.kernel_size, config.groups, config.step_embed_dim)


def _mlp(config: DenoiserConfig, spec: Spec, cond_dim: int) -> Network:
    return Mlp(spec.action_dim, spec.horizon, cond_dim, config.hidden_dim, config.depth, config.step_embed_dim)


NETWORKS: dict[str, Callable[[DenoiserConfig, Spec, int], Network]] = {"unet1d": _unet1d, "mlp": _mlp}
