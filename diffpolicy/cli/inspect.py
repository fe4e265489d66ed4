"""`diffpolicy inspect`: what is in a dataset and what looks wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from diffpolicy.cli.shared import console, json_object
from diffpolicy.data.sources import load
from diffpolicy.errors import DatasetError
from diffpolicy.inspection import inspect as inspect_episodes
from diffpolicy.inspection.page import page
from diffpolicy.tasks import Task, get_task, prepare


@dataclass(frozen=True)
class InspectArgs:
    """Say what is in a dataset and what looks wrong, and draw it on a page."""

    dataset: tyro.conf.Positional[str]
    """Any format that load() reads."""
    env: str | None = None
    """Gymnasium id to compare with; the dataset's own if not given."""
    env_kwargs: str = "{}"
    """Arguments of gymnasium.make, JSON; with --env."""
    task: str | None = None
    """Name of a task: its environment, and its names of the observations."""
    out: Path | None = None
    """The page, an HTML file that opens offline; NAME.inspect.html here if not given."""


def inspect(argv: Sequence[str]) -> None:
    """Run `diffpolicy inspect`."""
    args = tyro.cli(InspectArgs, args=argv, prog="diffpolicy inspect")
    task = Task(env_id=args.env, env_kwargs=json_object(args.env_kwargs)) if args.env else get_task(args.task)
    episodes = prepare(task, load(args.dataset))
    name = Path(args.dataset).resolve().name
    with console.status("inspecting"):
        found = inspect_episodes(episodes, task.env_id if task else None, task.env_kwargs if task else None)
        drawn = page(found, episodes, name)
    out = args.out or Path(f"{name}.inspect.html")
    try:
        out.write_text(drawn, encoding="utf-8", errors="replace")
    except OSError as error:
        raise DatasetError(f"{out} could not be written ({error}); give another --out") from error
    print(found)
    print(f"  page         {out}")
