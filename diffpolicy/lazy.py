"""Packages whose names are imported when they are first used.

So a robot's computer that only asks a server for actions (`diffpolicy.control.Client`) needs no torch.

    if TYPE_CHECKING: from diffpolicy.policy import Policy            for type checkers
    import_when_used(__name__, {"diffpolicy.policy": ("Policy",)})    for Python
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


class Lazy(ModuleType):
    """A package whose names stand elsewhere.

    A name wins over the submodule of the same name: `diffpolicy.evaluate` is the function, whoever imported the module
    `diffpolicy.evaluate` before.
    """

    _places: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        """Import what is not there yet."""
        if name not in self._places:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(self._places[name]), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Python's import puts a submodule here under its name: keep what the package promises."""
        if isinstance(value, ModuleType) and name in self._places:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """All names, imported or not."""
        return sorted({*super().__dir__(), *self._places})


def import_when_used(package: str, names: Mapping[str, Sequence[str]]) -> None:
    """Let a package offer names of other modules, `{module: names}`, that are imported when they are first used."""
    module = sys.modules[package]
    module.__class__ = Lazy
    module.__dict__["_places"] = {name: place for place, group in names.items() for name in group}
