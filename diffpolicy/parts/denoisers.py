"""Schedules, predictions and networks by name; an encoder and a denoiser of these names and of a policy's sizes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion import denoiser as predictions
from diffpolicy.diffusion.denoiser import NetworkDenoiser, Prediction
from diffpolicy.diffusion.schedule import Cosine, Flow, Linear, Schedule
from diffpolicy.errors import SpecError
from diffpolicy.nets.encoder import EmbeddingEncoder, FlattenEncoder, ToldEncoder
from diffpolicy.nets.mlp import Mlp
from diffpolicy.nets.network import Network
from diffpolicy.nets.prefixed import Prefixed
from diffpolicy.nets.unet1d import UNet1d

SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "vp": Linear(0.1, 10.0),  # of Diffusion-QL and IDQL, for few steps: at t = 1 8 % of the signal are left
    "cosine": Cosine(),
    "flow": Flow(),
}


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": predictions.epsilon,
    "sample": predictions.sample,
    "v_prediction": predictions.v_prediction,
    "flow": predictions.flow,
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
    schedule: Literal["linear", "vp", "cosine", "flow"] = "cosine"
    """How signal and noise mix over diffusion time; vp is Diffusion-QL's and IDQL's."""
    prediction: Literal["epsilon", "sample", "v_prediction", "flow"] = "epsilon"
    """What the network is trained to predict."""
    clip: float | None = 1.0
    """Sampling clips the clean estimate to plus or minus this, on the unit scale; None for no clipping."""
    max_delay: int = 0
    """Longest delay, in actions, for which the network learns to continue a chunk being executed; 0 for none."""
    told_embed_dim: int = 0
    """Size of the embedding of what the policy is told to reach, where an agent tells it; 0 for none."""


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
        encoder = EmbeddingEncoder(names, flat_dim(spec, normalizer), config.obs_embed_dim)
    return encoder if config.told_embed_dim == 0 else ToldEncoder(encoder, config.told_embed_dim)


def flat_dim(spec: Spec, normalizer: Normalizer) -> int:
    """Return how many numbers a history is, encoded."""
    return spec.n_obs_steps * sum(normalizer[name].encoded_dim for name in spec.obs_shapes)


def make_denoiser(config: DenoiserConfig, spec: Spec, normalizer: Normalizer) -> NetworkDenoiser:
    """Return a fresh denoiser of the configured network, schedule and prediction, for the sizes of `spec`.

    Raises:
        SpecError: if a name is unknown or the network cannot have these sizes.
    """
    cond_dim = flat_dim(spec, normalizer) + config.obs_embed_dim + config.told_embed_dim
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


def _unet1d(config: DenoiserConfig, spec: Spec, cond_dim: int) -> Network:
    return UNet1d(spec.action_dim, cond_dim, config.down_dims, config.kernel_size, config.groups, config.step_embed_dim)


def _mlp(config: DenoiserConfig, spec: Spec, cond_dim: int) -> Network:
    return Mlp(spec.action_dim, spec.horizon, cond_dim, config.hidden_dim, config.depth, config.step_embed_dim)


NETWORKS: dict[str, Callable[[DenoiserConfig, Spec, int], Network]] = {"unet1d": _unet1d, "mlp": _mlp}
