"""The errors a user can act on, each one sentence: what came, what was wanted, what to do.

All of them are `DiffPolicyError`, which the command line prints without a traceback (exit code 2).
"""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class DiffPolicyError(ValueError):
    """Bad input, refused at a door of the library."""


class DatasetError(DiffPolicyError):
    """A dataset that cannot be read, or whose content cannot be right."""


class SpecError(DiffPolicyError):
    """Sizes, horizons or spaces that cannot work together."""


class PolicyError(DiffPolicyError):
    """A saved policy or run that cannot be loaded, or an observation it was not made for."""


class TrainingError(DiffPolicyError):
    """A training run that cannot go on, for example after a loss that is not a number."""


class MissingExtraError(DiffPolicyError):
    """An optional dependency that is not installed."""


class ControlError(DiffPolicyError):
    """A control loop that cannot be safe as it was asked for: its limits, its delay, its start."""


def look_up(what: str, name: str, table: Mapping[str, T]) -> T:
    """Return an entry of a table by its name; `what` is what the table holds.

    Raises:
        SpecError: if there is none of that name.
    """
    if name not in table:
        raise SpecError(f"there is no {what} {name!r}; wanted one of {', '.join(table)}")
    return table[name]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error) or repr(error)).splitlines()[0]
