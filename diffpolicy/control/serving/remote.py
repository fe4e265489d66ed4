"""A policy at a server as a `Runner` wants it: `Runner(RemotePolicy(Client(url)), rate_hz=50, strategy=RealTime())`.

History, strategy and limits stay with the robot; each plan is one message, and so is what the chunk must agree with
(`describe`, read back by `described`). Unlike the client alone this needs torch.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from diffpolicy.control.serving import wire
from diffpolicy.control.serving.client import Client
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.diffusion.guidance import Pinned, RealTimeChunk, Spread, Trained, blended
from diffpolicy.diffusion.prefix import Guide, Prefix
from diffpolicy.errors import ControlError

GUIDES: dict[str, Guide] = {"real_time": RealTimeChunk, "pinned": Pinned, "blended": blended, "trained": Trained}
OPTIONS = {"real_time": ("beta", "std", "jacobian"), "pinned": (), "blended": ("beta", "std"), "trained": ()}
STATISTICS = ("scale", "offset", "minimum", "maximum")
MAX_REPEATS = 16


class RemotePolicy:
    """What a `Runner` needs of a policy, from a server."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.spec = client.spec
        self.normalizer = read_normalizer(client.about["normalizer"], client.numbers)
        self.device = torch.device("cpu")
        self.max_delay = int(client.about.get("max_delay", 0))
        self._draws: dict[int, int] = {}

    def draws(self, repeats: int = 1) -> int:
        """Noise tensors of a plan; asked once."""
        if repeats not in self._draws:
            self._draws[repeats] = self.client.draws(repeats)
        return self._draws[repeats]

    def plan(
        self, history: Mapping[str, torch.Tensor], noise: torch.Tensor, prefix: Prefix | None = None
    ) -> torch.Tensor:
        """Chunks `(B, Tp, Da)`, physical units; arguments as `Policy.plan`.

        Raises:
            ControlError: if the server refuses or fails.
        """
        rows = {name: array.numpy() for name, array in history.items()}
        return torch.from_numpy(self.client.plan(rows, noise.numpy(), None if prefix is None else describe(prefix)))


def describe(prefix: Prefix) -> dict[str, Any]:
    """Return a prefix as a message holds it.

    Raises:
        ControlError: if its guide is none that a server knows.
    """
    guide, options = prefix.guide, {}
    if isinstance(guide, partial):
        guide, options = guide.func, dict(guide.keywords)
    if isinstance(spread := options.pop("variance", None), Spread):
        options["std"] = spread.std
    name = next((name for name, known in GUIDES.items() if known is guide), None)
    if name is None or set(options) - set(OPTIONS[name]) or (spread is not None and "std" not in options):
        raise ControlError(
            f"a server does not know the guide {prefix.guide}; wanted RealTimeChunk (beta, jacobian, a Spread as its "
            "variance), Pinned, blended (beta, std) or Trained"
        )
    weights = prefix.weights.expand(prefix.chunk.shape[:2]).numpy()
    return {
        "chunk": prefix.chunk.numpy(), "weights": weights, "guide": name, "options": options, "repeats": prefix.repeats,
    }  # fmt: skip


def described(value: Any, shape: tuple[int, int, int]) -> Prefix:
    """Read what `describe` made, for chunks of a shape `(B, Tp, Da)`.

    Raises:
        ControlError: if it is anything else.
    """
    value = value if isinstance(value, dict) else {}
    name, repeats = value.get("guide"), read_repeats(value.get("repeats"))
    if not isinstance(name, str) or name not in GUIDES:
        raise ControlError(f"the prefix has the guide {str(name)[:40]!r}; wanted one of {', '.join(GUIDES)}")
    chunk = wire.array(value.get("chunk"), "the prefix", shape)
    weights = wire.array(value.get("weights"), "the prefix's weights", shape[:2])
    if weights.size and (weights.min() < 0 or weights.max() > 1):
        raise ControlError(f"the prefix's weights go from {weights.min()} to {weights.max()}; wanted 0 to 1")
    guide = _guide(name, value.get("options"))
    return Prefix(
        torch.from_numpy(chunk.astype(np.float32)), torch.from_numpy(weights.astype(np.float32)), guide, repeats
    )


def _guide(name: str, options: Any) -> Guide:
    """Return a guide with its options: numbers in [0, 1e6], nothing else."""
    known = isinstance(options, dict) and not set(options) - set(OPTIONS[name])
    if not known or not all(isinstance(v, int | float) and 0 <= v <= 1e6 for v in options.values()):
        raise ControlError(f"the prefix's options are not those of {name}; wanted numbers for {OPTIONS[name]}")
    options = dict(options)
    if name == "real_time" and "std" in options:
        options["variance"] = Spread(options.pop("std"))
    return partial(GUIDES[name], **options) if options else GUIDES[name]


def read_repeats(value: Any) -> int:
    """Read how often each step of a sampler is to be taken.

    Raises:
        ControlError: if it is not a whole number from 1 to 16.
    """
    if type(value) is not int or not 1 <= value <= MAX_REPEATS:
        raise ControlError(f"repeats is {str(value)[:40]}; wanted a whole number from 1 to {MAX_REPEATS}")
    return value


def normalizer_numbers(normalizer: Normalizer) -> dict[str, dict[str, np.ndarray]]:
    """Return a normalizer's arrays as a message holds them."""
    names = (*normalizer.names, "action")
    return {name: {key: getattr(normalizer[name], key).cpu().numpy() for key in STATISTICS} for name in names}


def read_normalizer(kinds: Mapping[str, list[str]], numbers: Mapping[str, Mapping[str, Any]]) -> Normalizer:
    """Read a normalizer from its kinds and its arrays.

    Raises:
        ControlError: if they do not fit.
    """
    normalizer = Normalizer(kinds)
    for name in kinds:
        for key in STATISTICS:
            buffer = getattr(normalizer[name], key)
            read = wire.array(numbers.get(name, {}).get(key), f"{key} of {name!r}", buffer.shape)
            buffer.copy_(torch.from_numpy(read.astype(np.float32)))
    return normalizer
