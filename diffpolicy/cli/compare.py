"""`diffpolicy compare`: two evaluated runs, pair by pair over the same seeds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from diffpolicy import pictures
from diffpolicy.errors import PolicyError
from diffpolicy.report import compare as compare_reports


@dataclass(frozen=True)
class CompareArgs:
    """Compare two evaluated runs, pair by pair over the same seeds."""

    a: tyro.conf.Positional[Path]
    """Run folder, or a report.json."""
    b: tyro.conf.Positional[Path]
    """Run folder, or a report.json."""
    out: Path | None = None
    """Picture of the differences, a PNG file."""


def compare(argv: Sequence[str]) -> None:
    """Run `diffpolicy compare`."""
    args = tyro.cli(CompareArgs, args=argv, prog="diffpolicy compare")
    rows = compare_reports(_read_report(args.a), _read_report(args.b))
    print(*rows, sep="\n")
    if args.out is not None:
        pictures.comparison(rows, (args.a.name, args.b.name)).savefig(args.out, dpi=120)


def _read_report(path: Path) -> dict[str, Any]:
    path = path if path.suffix == ".json" else path / "eval" / "report.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise PolicyError(f"there is no {path}; run diffpolicy evaluate first") from error
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path} cannot be read ({error}); run diffpolicy evaluate again") from error
