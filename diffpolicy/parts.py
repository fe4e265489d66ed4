"""From names to objects: schedules, predictions, samplers, networks. The only place of the library that knows names.

`Policy.load` reads it to rebuild what a policy file describes; configurations are plain frozen dataclasses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion import denoiser as predictions
from diffpolicy.diffusion.denoiser import Denoiser, NetworkDenoiser, Prediction
from diffpolicy.diffusion.guidance import Clipped
from diffpolicy.diffusion.sampler import Ddim, DpmPP2M, Heun, Sample, Sampler
from diffpolicy.diffusion.schedule import Cosine, Flow, Linear, Schedule
from diffpolicy.errors import SpecError
from diffpolicy.nets.encoder import EmbeddingEncoder, FlattenEncoder
from diffpolicy.nets.mlp import Mlp
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


@dataclass(frozen=True)
class SamplerConfig:
    """How a chunk is sampled; any trained policy runs under any of them."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpm++2m"] = "ddim"
    """Rule of one step."""
    steps: int = 10
    """Steps from noise to data."""
    eta: float = 0.0
    """Ddim only: 0 is deterministic, 1 is DDPM."""


def make_encoder(config: DenoiserConfig, spec: Spec, normalizer: Normalizer) -> nn.Module:
    """Return a fresh encoder of the observation history.

    Raises:
        SpecError: if the size of the embedding is negative.
    """
    names = tuple(spec.obs_shapes)
    if config.obs_embed_dim < 0:
        raise SpecError(f"obs_embed_dim is {config.obs_embed_dim}; give a size, or 0 for no embedding")
    if config.obs_embed_dim == 0:
        return FlattenEncoder(names)
    return EmbeddingEncoder(names, _flat_dim(spec, normalizer), config.obs_embed_dim)


def _flat_dim(spec: Spec, normalizer: Normalizer) -> int:
    return spec.n_obs_steps * sum(normalizer[name].encoded_dim for name in spec.obs_shapes)


def make_denoiser(config: DenoiserConfig, spec: Spec, normalizer: Normalizer) -> NetworkDenoiser:
    """Return a fresh denoiser of the configured network, schedule and prediction, for the sizes of `spec`.

    Raises:
        SpecError: if a name is unknown or the network cannot have these sizes.
    """
    cond_dim = _flat_dim(spec, normalizer) + config.obs_embed_dim
    try:
        network = NETWORKS[config.network](config, spec, cond_dim)
        return NetworkDenoiser(network, SCHEDULES[config.schedule], PREDICTIONS[config.prediction])
    except KeyError as error:
        raise SpecError(
            f"there is no network, schedule or prediction {error}; update diffpolicy or correct it"
        ) from error
    except ValueError as error:
        raise SpecError(str(error)) from error


def make_planner(denoiser: Denoiser, clip: float | None, config: SamplerConfig) -> Sample:
    """Return the planner that samples from `denoiser`, clipped.

    Raises:
        SpecError: if the sampler is unknown or has no steps.
    """
    if config.sampler not in SAMPLERS or config.steps < 1:
        raise SpecError(
            f"got sampler {config.sampler!r} with {config.steps} steps; wanted one of {', '.join(SAMPLERS)} "
            "with at least 1 step"
        )
    return Sample(
        denoiser if clip is None else Clipped(denoiser, clip), SAMPLERS[config.sampler](config.eta), config.steps
    )


def _unet1d(config: DenoiserConfig, spec: Spec, cond_dim: int) -> nn.Module:
    return UNet1d(spec.action_dim, cond_dim, config.down_dims, config.kernel_size, config.groups, config.step_embed_dim)


def _mlp(config: DenoiserConfig, spec: Spec, cond_dim: int) -> nn.Module:
    return Mlp(spec.action_dim, spec.horizon, cond_dim, config.hidden_dim, config.depth, config.step_embed_dim)


NETWORKS: dict[str, Callable[[DenoiserConfig, Spec, int], nn.Module]] = {"unet1d": _unet1d, "mlp": _mlp}
