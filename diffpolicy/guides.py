"""Guidance of a policy: plain settings, saved with it, that make a guided denoiser of its own when it acts.

    classifier_free   D + w (D(told a goal) - D)            its encoder knows how to tell a goal (`ToldEncoder`)
    better            the same, told 1                      the goal of CFGRL is always 1: better than expected
    value             D + w sigma^2 / alpha grad V(x_t)     its critic values noised chunks (`NoisedValue`)

The weight w is chosen when the policy acts (`Policy.with_guidance`): 0 is no guidance.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from diffpolicy.diffusion.denoiser import Denoiser
from diffpolicy.diffusion.guidance import ClassifierFree, ValueGuided
from diffpolicy.errors import SpecError
from diffpolicy.nets.critic import NoisedValue
from diffpolicy.nets.encoder import ToldEncoder


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Towards what the policy does when it is told a goal."""

    weight: float = 1.0
    """0 tells nothing, 1 tells the goal, above 1 exaggerates what telling it changes."""
    goal: float = 1.0
    """What it is told to reach, on the scale that its agent trains with."""

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if not math.isfinite(self.goal):
            raise SpecError(f"the goal of the guidance is {self.goal}; give a finite number")

    def guide(self, denoiser: Denoiser, encoder: nn.Module, critic: nn.Module | None) -> Denoiser:
        """Return the guided denoiser.

        Raises:
            SpecError: if the encoder has no room for a goal.
        """
        if not isinstance(encoder, ToldEncoder):
            raise SpecError("classifier-free guidance tells a goal; give --denoiser.told-embed-dim a size above 0")
        return ClassifierFree(denoiser, partial(encoder.tell, goal=self.goal), self.weight)

    def changed(self, weight: float | None, goal: float | None) -> "ClassifierFreeGuidance":
        """Return it with what is given.

        Raises:
            SpecError: if the weight or the goal is impossible.
        """
        return replace(self, weight=self.weight if weight is None else weight, goal=self.goal if goal is None else goal)


@dataclass(frozen=True)
class BetterGuidance(ClassifierFreeGuidance):
    """Towards what the policy does when it is told `better`, 1: the only thing that its encoder was ever told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.goal != 1:
            raise SpecError(f"got the goal {self.goal}, and this policy knows only better, 1; give it a weight alone")


@dataclass(frozen=True)
class ValueGuidance:
    """Uphill on a value of noised chunks."""

    weight: float = 1.0
    """In units of 1 / value; 0 is no guidance."""
    until: float = 0.1
    """Diffusion time at and below which there is none."""

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def guide(self, denoiser: Denoiser, encoder: nn.Module, critic: nn.Module | None) -> Denoiser:
        """Return the guided denoiser.

        Raises:
            SpecError: if the critic cannot value noised chunks.
        """
        if not isinstance(critic, NoisedValue):
            raise SpecError("value guidance needs a value of noised chunks; train one with --agent diffuser")
        return ValueGuided(denoiser, critic.noised, self.weight, self.until)

    def changed(self, weight: float | None, goal: float | None) -> "ValueGuidance":
        """Return it with the weight given.

        Raises:
            SpecError: if a goal is given.
        """
        if goal is not None:
            raise SpecError(f"got the goal {goal}, and this policy climbs a value; give it a weight alone")
        return self if weight is None else replace(self, weight=weight)


Guidance = ClassifierFreeGuidance | ValueGuidance
KINDS: dict[str, type[Guidance]] = {
    "classifier_free": ClassifierFreeGuidance,
    "better": BetterGuidance,
    "value": ValueGuidance,
}


def describe(guidance: Guidance | None) -> dict[str, Any] | None:
    """Return plain values that `read` takes."""
    if guidance is None:
        return None
    (kind,) = (name for name, each in KINDS.items() if type(guidance) is each)
    return {"kind": kind, **asdict(guidance)}


def read(values: Mapping[str, Any] | None) -> Guidance | None:
    """Inverse of `describe`.

    Raises:
        KeyError, TypeError: if that is not what the values are.
    """
    if values is None:
        return None
    settings = dict(values)
    return KINDS[settings.pop("kind")](**settings)


def _check_weight(weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise SpecError(f"the weight of the guidance is {weight}; give a finite number of at least 0")
