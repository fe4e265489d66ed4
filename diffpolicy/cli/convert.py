"""`diffpolicy convert`: a dataset in another format; into our store it streams, whatever its size."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from diffpolicy.cli.shared import console
from diffpolicy.data import sources
from diffpolicy.data.sources.reading import Wanted


@dataclass(frozen=True)
class ConvertArgs:
    """Write a dataset in another format."""

    dataset: tyro.conf.Positional[str]
    """Any one dataset that load() reads."""
    out: tyro.conf.Positional[str]
    """A folder for our store, a .hdf5 file for D4RL's layout, minari:<id> for Minari."""
    obs: tuple[str, ...] | None = None
    """Names of the observations to keep; all but images if not given."""
    part: str | None = None
    """A named part of the dataset, such as robomimic's train."""
    relabel: str | None = None
    """The task whose rewards are wanted, of OGBench's datasets."""


def convert(argv: Sequence[str]) -> None:
    """Run `diffpolicy convert`."""
    args = tyro.cli(ConvertArgs, args=argv, prog="diffpolicy convert")
    sources.check_writable(args.out)
    with console.status(f"converting {args.dataset}"):
        episodes = sources.convert(args.dataset, args.out, Wanted(args.obs, args.part, args.relabel))
    print(f"{len(episodes)} episodes, {episodes.steps} steps: {args.out}")
