"""The datasets of the table: which file, which task, and what an episode scores."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import load
from diffpolicy.errors import DatasetError, look_up
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
    comparable: bool = True
    """Whether its episodes are as long as those that are played, so that their scores mean the same."""

    @property
    def task(self) -> Task:
        """Return the task, which has the settings of the agents."""
        task = get_task(self.task_name)
        assert task is not None
        return task

    def find(self, folder: Path) -> Path:
        """Return where its file is.

        Raises:
            DatasetError: if it is not in the folder.
        """
        if not (folder / self.file).exists():
            raise DatasetError(f"there is no {self.file} in {folder}; put it there, or leave the dataset out")
        return folder / self.file

    def read(self, folder: Path) -> Episodes:
        """Return its episodes, with the rewards of its task."""
        return load(str(self.find(folder)), task=self.relabel)

    def score(self, played: Episodes) -> np.ndarray:
        """Score each episode `(E,)`: the task's normalised return, or 100 for a success where it has none."""
        task = self.task
        if task.score is None:
            won = outcomes(played, task.success, None, None).success
            assert won is not None
            return 100.0 * won
        score = outcomes(played, None, task.score, task.reference).score
        assert score is not None
        return score

    def score_of_data(self, folder: Path) -> float | None:
        """Mean score of the recorded episodes, None where they do not say whether they succeeded, or went on longer."""
        if self.task.score is None or not self.comparable:
            return None
        episodes = self.read(folder)
        return float(self.score(replace(episodes, meta={**episodes.meta, "env_id": self.task.env_id})).mean())


DATASETS = {name: Dataset(f"{name}.hdf5", name.rpartition("-")[0]) for name in LOCOMOTION} | {
    "cube-single-play": Dataset("cube-single-play-v0.npz", "cube-single", "cube-single-play-singletask-v0"),
    "door-human": Dataset("door-human.hdf5", "door", comparable=False),
}


def get_dataset(name: str) -> Dataset:
    """Return a dataset by its name.

    Raises:
        SpecError: if there is none of that name.
    """
    return look_up("dataset", name, DATASETS)
