"""The datasets of the table: which file, which task, and what an episode scores."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import load
from diffpolicy.errors import SpecError
from diffpolicy.evaluate import outcomes
from diffpolicy.tasks import Task, get_task

ROBOTS = ("hopper", "walker2d", "halfcheetah")
LOCOMOTION = tuple(f"{robot}-{quality}" for quality in ("mixed", "expert", "medium") for robot in ROBOTS)


@dataclass(frozen=True)
class Dataset:
    """A file and the task it belongs to."""

    file: str
    task_name: str
    relabel: str | None = None
    """The task whose rewards are wanted, of OGBench's files."""

    @property
    def task(self) -> Task:
        """Return the task, which has the settings of the agents."""
        task = get_task(self.task_name)
        assert task is not None
        return task

    def read(self, folder: Path) -> Episodes:
        """Return its episodes, with the rewards of its task."""
        return load(str(folder / self.file), task=self.relabel)

    def score(self, played: Episodes) -> np.ndarray:
        """Score each episode `(E,)`: the task's normalised return, or 100 for a success where it has none."""
        task = self.task
        found = outcomes(played, task.success, task.score, task.reference)
        if found.score is not None:
            return found.score
        assert found.success is not None
        return 100.0 * found.success

    def score_of_data(self, folder: Path) -> float | None:
        """Mean score of the recorded episodes, None where they do not say whether they succeeded."""
        if self.task.score is None:
            return None
        episodes = self.read(folder)
        return float(self.score(replace(episodes, meta={**episodes.meta, "env_id": self.task.env_id})).mean())


DATASETS = {name: Dataset(f"{name}.hdf5", name.rpartition("-")[0]) for name in LOCOMOTION} | {
    "cube-single-play": Dataset("cube-single-play-v0.npz", "cube-single", "cube-single-play-singletask-v0"),
    "door-human": Dataset("door-human.hdf5", "door"),
}


def get_dataset(name: str) -> Dataset:
    """Return a dataset by its name.

    Raises:
        SpecError: if there is none of that name.
    """
    if name not in DATASETS:
        raise SpecError(f"there is no dataset {name!r}; wanted one of {', '.join(DATASETS)}")
    return DATASETS[name]
