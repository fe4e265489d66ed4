"""Observations at the door: named, checked and batched, and an environment's spaces compared with a policy's sizes."""

from collections.abc import Mapping

import gymnasium
import numpy as np

from diffpolicy.data.spec import Spec
from diffpolicy.errors import PolicyError

BOX_NAME = "obs"

Obs = Mapping[str, np.ndarray] | np.ndarray


def name_observations(spec: Spec, obs: Obs) -> tuple[dict[str, np.ndarray], bool]:
    """Name, check and batch an observation; also return whether it came as a batch.

    Raises:
        PolicyError: if a name is missing, a shape differs from the policy's, names differ in their number of rows, or a
            number is not finite.
    """
    given = dict(obs) if isinstance(obs, Mapping) else {BOX_NAME: obs}
    arrays: dict[str, np.ndarray] = {}
    rows: dict[str, int | None] = {}
    for name, shape in spec.obs_shapes.items():
        if name not in given:
            raise PolicyError(f"the observation has {sorted(given)}; the policy needs {sorted(spec.obs_shapes)}")
        array = np.asarray(given[name], dtype=np.float32)
        batched = array.ndim > len(shape)
        if array.shape[batched:] != shape:
            many = ", ".join(["N", *map(str, shape)])
            raise PolicyError(f"observation {name!r} has shape {array.shape}; the policy needs {shape} or ({many})")
        if not np.isfinite(array).all():
            raise PolicyError(
                f"observation {name!r} holds a number that is not finite; check the sensor or environment"
            )
        arrays[name] = array if batched else array[None]
        rows[name] = len(array) if batched else None
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{name!r} has {'no batch axis' if n is None else f'{n} rows'}" for name, n in rows.items())
        raise PolicyError(f"of the observation {told}; give every part for the same environments")
    return arrays, None not in rows.values()


def check_spaces(spec: Spec, observation: gymnasium.Space, action: gymnasium.Space) -> None:
    """Compare a policy's sizes with an environment's spaces.

    Raises:
        PolicyError: if they differ.
    """
    spaces = dict(observation.spaces) if isinstance(observation, gymnasium.spaces.Dict) else {BOX_NAME: observation}
    for name, shape in spec.obs_shapes.items():
        found = spaces[name].shape if name in spaces else None
        if found != tuple(shape):
            raise PolicyError(
                f"the environment's observation {name!r} is {found or 'missing'}; the policy was trained on "
                f"{shape}: evaluate it in the environment of its dataset"
            )
    if action.shape != (spec.action_dim,):
        raise PolicyError(
            f"the environment takes actions {action}; the policy makes ({spec.action_dim},): "
            "evaluate it in the environment of its dataset"
        )
