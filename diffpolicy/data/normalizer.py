"""Normalizer: the one border between physical units and the unit box. Fitted once, part of the policy, saved with it.

    limits     [min, max] -> [-1, 1]           a constant dimension maps to 0, with scale 1
    standard   (x - mean) / std
    angle      x -> (cos x, sin x)             for observations that wrap, in radians
    none       unchanged

Encoding and decoding use the same two numbers, `scale` and `offset`, so one is the exact inverse of the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from diffpolicy.data.episodes import CHECK_ROWS, Episodes, check_finite
from diffpolicy.data.windows import Batch
from diffpolicy.errors import DatasetError

KINDS = ("limits", "standard", "angle", "none")
Kinds = str | Sequence[str]


class ArrayNormalizer(nn.Module):
    """Encoding of one named array, dimension by dimension; buffers `scale`, `offset`, and the data's statistics.

    An output row is the linear dimensions in their order, then the cosines of the angles, then their sines.
    """

    at_linear: torch.Tensor
    at_angles: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.linear = [i for i, kind in enumerate(kinds) if kind != "angle"]
        self.angles = [i for i, kind in enumerate(kinds) if kind == "angle"]
        self.register_buffer("at_linear", torch.tensor(self.linear, dtype=torch.long), persistent=False)
        self.register_buffer("at_angles", torch.tensor(self.angles, dtype=torch.long), persistent=False)
        self.register_buffer("scale", torch.ones(len(self.linear)))
        self.register_buffer("offset", torch.zeros(len(self.linear)))
        self.register_buffer("minimum", torch.zeros(len(kinds)))
        self.register_buffer("maximum", torch.zeros(len(kinds)))

    @property
    def encoded_dim(self) -> int:
        """Size of an encoded row."""
        return len(self.linear) + 2 * len(self.angles)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., D)` in physical units to `(..., encoded_dim)`."""
        if not self.angles:
            return x * self.scale + self.offset
        angle = x[..., self.at_angles]
        return torch.cat([x[..., self.at_linear] * self.scale + self.offset, angle.cos(), angle.sin()], dim=-1)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `encode`; angles come back within [-pi, pi]."""
        n, m = len(self.linear), len(self.angles)
        linear = (x[..., :n] - self.offset) / self.scale
        if not m:
            return linear
        out = x.new_empty((*x.shape[:-1], n + m))
        out[..., self.at_linear] = linear
        out[..., self.at_angles] = torch.atan2(x[..., n + m :], x[..., n : n + m])
        return out


class Normalizer(nn.Module):
    """Encodings of every observation and of the action; build one with `Normalizer.fit`."""

    def __init__(self, kinds: Mapping[str, Sequence[str]]) -> None:
        """`kinds[name]` lists the kind of each dimension; the action's name is `action`."""
        super().__init__()
        self.arrays = nn.ModuleDict({_key(name): ArrayNormalizer(k) for name, k in kinds.items()})
        self.names = tuple(name for name in kinds if name != "action")

    def __getitem__(self, name: str) -> ArrayNormalizer:
        """Return the encoding of one array."""
        array = self.arrays[_key(name)]
        assert isinstance(array, ArrayNormalizer)
        return array

    @classmethod
    def fit(
        cls, episodes: Episodes, kinds: Mapping[str, Kinds] | None = None, clipped_actions: bool = True
    ) -> "Normalizer":
        """Fit to the data.

        Args:
            episodes: physical units.
            kinds: kind of each array, one for all dimensions or one a dimension; `limits` where not given.
            clipped_actions: whether sampling will clip actions to the unit box.

        Raises:
            DatasetError: if a kind or name is unknown, an array is not `(rows, D)`, or the action's kind cannot work
                with clipping or decoding.
        """
        kinds = dict(kinds or {})
        if "action" in episodes.obs:
            raise DatasetError("an observation is called 'action', the name of the actions; rename it")
        arrays = {**episodes.obs, "action": episodes.action}
        for name, array in arrays.items():
            if array.ndim > 3:
                raise DatasetError(
                    f"{name!r} holds images, {array.shape}, and this version has no encoder for them; choose other "
                    "observations, load(..., obs=[...]) or --obs"
                )
            if array.ndim != 2:
                raise DatasetError(f"{name!r} has shape {array.shape}; wanted rows of numbers, (rows, D): flatten it")
        if unknown := set(kinds) - set(arrays):
            raise DatasetError(f"normalizer kinds name {sorted(unknown)}; the dataset has {sorted(arrays)}")
        full = {name: _per_dimension(name, kinds.get(name, "limits"), a.shape[-1]) for name, a in arrays.items()}
        if "angle" in full["action"]:
            raise DatasetError("actions cannot be normalised as angle: their cos and sin would not be a free box")
        if clipped_actions and set(full["action"]) - {"limits"}:
            raise DatasetError(
                f"actions normalised as {sorted(set(full['action']))} would be cut by clipping to the unit box; "
                "use limits, or sample without clipping"
            )
        normalizer = cls(full)
        check_finite("reward", episodes.reward)
        for name, array in arrays.items():
            _fit(normalizer[name], name, array)
        return normalizer

    def encode_obs(self, obs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode named observations."""
        return {name: self[name].encode(obs[name]) for name in self.names}

    def encode(self, batch: Batch) -> Batch:
        """Encode a batch of windows: observations and actions."""
        return replace(
            batch,
            obs=self.encode_obs(batch.obs),
            action=self["action"].encode(batch.action),
            next_obs=self.encode_obs(batch.next_obs),
        )

    def decode_action(self, action: torch.Tensor) -> torch.Tensor:
        """Return unit-box actions in physical units."""
        return self["action"].decode(action)

    def to_json(self) -> dict[str, Any]:
        """Return the kinds; the numbers are in the state dict."""
        return {name: list(self[name].kinds) for name in (*self.names, "action")}


def _key(name: str) -> str:
    # nn.ModuleDict refuses dots and names of its own methods.
    return "array_" + name.replace(".", "/")


def _per_dimension(name: str, kind: Kinds, size: int) -> list[str]:
    kinds = [kind] * size if isinstance(kind, str) else list(kind)
    if len(kinds) != size or set(kinds) - set(KINDS):
        raise DatasetError(f"normalizer kinds of {name!r} are {kinds}; wanted {size} of {', '.join(KINDS)}")
    return kinds


def _fit(array: ArrayNormalizer, name: str, data: np.ndarray) -> None:
    low, high, mean, std = _statistics(data)
    if not np.all(np.isfinite(mean)):
        check_finite(name, data)
    constant = high - low <= rounding(low, high)
    scale, offset = np.ones_like(low), np.zeros_like(low)
    for i, kind in enumerate(array.kinds):
        if kind == "limits":
            scale[i] = 1.0 if constant[i] else 2 / (high[i] - low[i])
            offset[i] = -scale[i] * (low[i] + high[i]) / 2
        elif kind == "standard":
            scale[i] = 1.0 if constant[i] else 1 / std[i]
            offset[i] = -scale[i] * mean[i]
    array.scale.copy_(torch.from_numpy(scale[array.linear]))
    array.offset.copy_(torch.from_numpy(offset[array.linear]))
    array.minimum.copy_(torch.from_numpy(low))
    array.maximum.copy_(torch.from_numpy(high))


def rounding(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Range below which a dimension is constant up to rounding: dividing by less would magnify noise."""
    return np.maximum(1e-6, 1e-5 * np.maximum(abs(low), abs(high)))


def _statistics(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Minimum, maximum, mean and standard deviation of `(N, D)`, block by block in float64."""
    shift = np.asarray(data[0], dtype=np.float64)
    low, high, total, square = shift.copy(), shift.copy(), np.zeros_like(shift), np.zeros_like(shift)
    for row in range(0, len(data), CHECK_ROWS):
        block = np.asarray(data[row : row + CHECK_ROWS], dtype=np.float64)
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        total += (block - shift).sum(0)
        square += ((block - shift) ** 2).sum(0)
    mean = total / len(data)
    return low, high, mean + shift, np.sqrt(np.maximum(square / len(data) - mean**2, 0))
