"""A saved policy: a folder of two files.

    policy.json          format number, sizes, parts, sampler, seed, what chooses and what guides, notes
    policy.safetensors   weights and the normalizer

Each is written atomically. Loading executes nothing.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffpolicy import guides
from diffpolicy.data.files import write_atomically
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.denoiser import NetworkDenoiser
from diffpolicy.errors import PolicyError
from diffpolicy.guides import Guidance, ValueGuidance
from diffpolicy.parts import (
    CriticConfig,
    DenoiserConfig,
    SamplerConfig,
    Selection,
    SelectionConfig,
    make_critic,
    make_denoiser,
    make_encoder,
    make_noised_value,
)

FORMAT = 4  # 2: `obs_embed_dim`; 3: `selection`; 4: `guidance`, `told_embed_dim`, `max_delay`, `temperature`

Made = TypeVar("Made")
Contents = tuple[
    Spec, Normalizer, nn.Module, NetworkDenoiser, DenoiserConfig, SamplerConfig, int, Selection | None, Guidance | None
]
"""What a `Policy` is made of, in the order of its arguments."""


def write_description(folder: Path, parts: Contents, notes: Mapping[str, Any]) -> None:
    """Write `policy.json` alone, beside weights that are there; notes are for who reads it."""
    spec, normalizer, _, _, denoiser, sampler, seed, selection, guidance = parts
    description = {
        "format": FORMAT,
        "spec": spec.to_json(),
        "normalizer": normalizer.to_json(),
        "denoiser": asdict(denoiser),
        "sampler": asdict(sampler),
        "seed": seed,
        "selection": None if selection is None else _described(selection),
        "guidance": guides.describe(guidance),
        **notes,
    }
    write_atomically(folder / "policy.json", lambda path: path.write_text(json.dumps(description, indent=1)))


def read_policy(folder: Path, make: Callable[..., Made]) -> Made:
    """Return what `make`, a policy's constructor, makes of `policy.json`, with fresh weights.

    Raises:
        PolicyError: if the file is missing, of a newer format, or not what it should be.
    """
    path = folder / "policy.json"
    description = _checked(path)
    try:
        spec = Spec.from_json(description["spec"])
        normalizer = Normalizer(description["normalizer"])
        denoiser = DenoiserConfig(**_tuples(description["denoiser"]))
        guidance = guides.read(description.get("guidance"))
        noised = denoiser if isinstance(guidance, ValueGuidance) else None
        return make(
            spec,
            normalizer,
            make_encoder(denoiser, spec, normalizer),
            make_denoiser(denoiser, spec, normalizer),
            denoiser,
            SamplerConfig(**description["sampler"]),
            description["seed"],
            _selection(description.get("selection"), noised, spec, normalizer),
            guidance,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise PolicyError(f"{path} does not describe a policy ({error!r}); save it again") from error


def write_weights(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Write `policy.safetensors`: the weights of each module under its name."""
    tensors = {f"{part}.{k}": v for part, module in modules.items() for k, v in module.state_dict().items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / "policy.safetensors", lambda path: save_file(tensors, path))


def read_weights(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Read `policy.safetensors` into the modules.

    Raises:
        PolicyError: if the file is missing, cut short, or does not fit them.
    """
    path = folder / "policy.safetensors"
    try:
        tensors = load_file(path)
        for part, module in modules.items():
            prefix = f"{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except FileNotFoundError as error:
        raise PolicyError(
            f"there is no {path}; a policy is a folder with policy.json and policy.safetensors"
        ) from error
    except (SafetensorError, OSError) as error:
        raise PolicyError(
            f"{path} is not a whole safetensors file ({error}); it may be cut short, or a pickle, which is never "
            "loaded: copy or save it again"
        ) from error
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise PolicyError(f"{path} does not fit policy.json beside it ({first}); save the policy again") from error


def _described(selection: Selection) -> dict[str, Any]:
    return {"critic": asdict(selection.critic_config), **asdict(selection.config)}


def _selection(
    values: Mapping[str, Any] | None, noised: DenoiserConfig | None, spec: Spec, normalizer: Normalizer
) -> Selection | None:
    """Inverse of `_described`, with fresh weights; None where nothing was saved. `noised`: whose chunks it values."""
    if values is None:
        return None
    made = CriticConfig(**_tuples(values["critic"]))
    critic = make_noised_value(made, noised, spec, normalizer) if noised else make_critic(made, spec, normalizer)
    return Selection(critic, made, SelectionConfig(values["samples"], values["temperature"]))


def _checked(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
        version = int(description["format"])
    except FileNotFoundError as error:
        raise PolicyError(f"there is no policy at {path.parent}: {path.name} is missing; check the path") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"{path} cannot be read ({error}); save the policy again") from error
    if version > FORMAT:
        raise PolicyError(f"{path} has format {version}, this version reads up to {FORMAT}; update diffpolicy")
    return description


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
