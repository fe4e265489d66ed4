"""OGBench's npz (Park et al. 2025): rows of states, of which the last of each trajectory has no action.

    observations   s0 s1 s2 s3 | s0 s1 s2      R = N + E rows, trajectories of L + 1 rows
    actions        a0 a1 a2 -  | a0 a1 -       N transitions: the action of a last observation means nothing
    terminals       0  0  0  1 |  0  0  1      the end of a trajectory, and nothing about the task

so the observation after the last action is always known. The package's own arrays, saved with `numpy.savez`, are read
too: its regular dataset (`next_observations`: only the N transitions, a terminal at the last) and its compact one
(`valids`: 0 in the rows without an action).

Rewards belong to a task, which the data do not: `task` (`cube-single-play-singletask-task1-v0`) relabels `qpos` and
`button_states` with the `ogbench` package, which makes the task's environment and never renders it. Without a task,
`rewards` and `masks` are those of the file, or zeros and no end of the task.

`masks` are the bootstrap: 0 where the task was solved, in the middle of a trajectory as a rule, which goes on there.
An episode is `terminated` if its last step is masked, and `info` gets a `mask (N,)`, False at every masked step, for
critics; imitation has windows across them.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import npz
from diffpolicy.data.sources.reading import (
    Layout,
    Wanted,
    assemble,
    blocks,
    copy_observations,
    copy_rows,
    row_bytes,
)
from diffpolicy.errors import DatasetError, MissingExtraError, first_line

REQUIRED = ("observations", "actions", "terminals")
OPTIONAL = ("next_observations", "valids", "rewards", "masks", "qpos", "button_states")
SCALARS = ("terminals", "valids", "rewards", "masks")
LAYOUT = f"OGBench's {', '.join(REQUIRED)}"
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*-v[0-9]+")
EXAMPLE = "cube-single-play-singletask-task1-v0"
PARTS = {None: "", "train": "", "val": "-val"}

Read = Callable[[slice], Mapping[str, np.ndarray]]


def recognises(path: Path) -> bool:
    """Whether the file is a zip of OGBench's arrays."""
    return any(name in npz.names(path) for name in REQUIRED)


def load(path: Path, wanted: Wanted) -> Episodes:
    """Read a file, with the rewards of `wanted.task` if one is named.

    Raises:
        DatasetError: if the file is damaged, its arrays disagree, or the task is not one of this environment.
        MissingExtraError: if a task is named and the `ogbench` package is not installed.
    """
    replace(wanted, task=None).refuse_part_and_task("OGBench's file")
    with npz.opened(path) as file:
        arrays = _checked(path, file)
        wanted.choose({"obs": arrays["observations"].shape[1:]})
        rows = _rows(path, arrays)
        if wanted.task is None:
            return _read(path, arrays, rows, wanted, _recorded(path, arrays))
        with _relabelled(path, arrays, wanted.task) as labels:
            return _read(path, arrays, rows, wanted, labels)


def load_named(name: str, wanted: Wanted) -> Episodes:
    """Read `ogbench:<name>`, downloading it where the package's cache folder does not have it.

    The name is a dataset's (`cube-single-play-v0`), or a task's, which then is the task. `part` is `train` or `val`.

    Raises:
        DatasetError: as `load`, or if there is no such dataset, or it cannot be downloaded.
        MissingExtraError: if the `ogbench` package is not installed.
    """
    dataset, task = _dataset_and_task(name, wanted.task)
    if wanted.part not in PARTS:
        raise DatasetError(f"part {wanted.part!r} was asked for; OGBench's datasets have train and val: name one")
    folder = _download(_package(), dataset)
    episodes = load(folder / f"{dataset}{PARTS[wanted.part]}.npz", replace(wanted, part=None, task=task))
    words = dataset.split("-")
    env_id = "-".join(words[:-2] + words[-1:])  # without the kind of the dataset, such as play
    return replace(episodes, meta={"env_id": env_id, "env_kwargs": {}, **episodes.meta, "dataset": dataset})


def _dataset_and_task(name: str, task: str | None) -> tuple[str, str | None]:
    for given in (name, task or name):
        if NAME.fullmatch(given) is None:
            raise DatasetError(
                f"{given!r} is no name of OGBench's; wanted one such as cube-single-play-v0 or {EXAMPLE}"
            )
    dataset = _dataset_of(name)
    if task is None and dataset != name:
        task = name
    if task is not None and _dataset_of(task) != dataset:
        raise DatasetError(f"task {task!r} is of the dataset {_dataset_of(task)!r}; wanted one of {dataset!r}")
    return dataset, task


def _dataset_of(task: str) -> str:
    """`cube-single-play-singletask-task1-v0` is a task of `cube-single-play-v0`."""
    words = task.split("-")
    return "-".join([*words[: words.index("singletask")], words[-1]]) if "singletask" in words else task


def _download(ogbench: ModuleType, dataset: str) -> Path:
    from ogbench.utils import DEFAULT_DATASET_DIR

    folder = Path(DEFAULT_DATASET_DIR).expanduser()
    try:
        with redirect_stdout(sys.stderr):
            ogbench.download_datasets([dataset], str(folder))
    except OSError as error:
        raise DatasetError(
            f"ogbench:{dataset} could not be downloaded ({first_line(error)}); check the name, or place {dataset}.npz "
            f"and {dataset}-val.npz in {folder}"
        ) from error
    return folder


def _package() -> ModuleType:
    try:
        with _quiet():
            import ogbench
    except Exception as error:  # a missing package, or a renderer that MUJOCO_GL names and the system lacks
        raise MissingExtraError(
            f"OGBench's names and tasks need the ogbench package ({first_line(error)}); pip install "
            "'diffpolicy[ogbench]', and if its renderer is what fails, set MUJOCO_GL=disable"
        ) from error
    return ogbench


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop warnings about a missing display and the precision of spaces, of no use here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class _Rows:
    """Rows of a file: `total` of them, `ends (E,)` the transition after the last one of each trajectory.

    `without (E,)` are the rows that have no action, None where every row is a transition.
    """

    total: int
    ends: np.ndarray
    without: np.ndarray | None

    def steps(self, part: slice) -> np.ndarray:
        """Which rows of a slice are transitions."""
        steps = np.ones(part.stop - part.start, dtype=bool)
        if self.without is not None:
            first, last = np.searchsorted(self.without, [part.start, part.stop])
            steps[self.without[first:last] - part.start] = False
        return steps


def _checked(path: Path, file: npz.Npz) -> dict[str, npz.Array]:
    if missing := [name for name in REQUIRED if name not in file]:
        raise DatasetError(f"{path} lacks {', '.join(missing)}; wanted {LAYOUT}")
    arrays = {name: file.array(name) for name in (*REQUIRED, *OPTIONAL) if name in file}
    rows = len(arrays["observations"])
    for name, array in arrays.items():
        if len(array) != rows:
            raise DatasetError(
                f"{path}: {name} has {len(array)} rows and observations {rows}; wanted as many: write it again"
            )
        if name in SCALARS and len(array.shape) != 1:
            raise DatasetError(f"{path}: {name} has shape {array.shape}; wanted one number a row: reshape it")
    if (after := arrays.get("next_observations")) and after.shape != arrays["observations"].shape:
        raise DatasetError(f"{path}: next_observations has shape {after.shape}; wanted that of observations")
    return arrays


def _rows(path: Path, arrays: Mapping[str, npz.Array]) -> _Rows:
    """Find the trajectories: by `valids` of a compact dataset, else by `terminals`."""
    total, regular = len(arrays["observations"]), "next_observations" in arrays
    flags, is_end = ("valids", np.logical_not) if "valids" in arrays and not regular else ("terminals", np.asarray)
    read = arrays[flags].rows()
    found = [part.start + np.flatnonzero(is_end(read(part))) for part in blocks(total, row_bytes(arrays[flags]))]
    last = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    if len(last) == 0 or last[-1] != total - 1:
        raise DatasetError(
            f"{path}: the last of {total} rows ends no trajectory in {flags}, it may be cut short; copy it again"
        )
    length = np.diff(last, prepend=-1) - (0 if regular else 1)
    if np.min(length) < 1:
        row = last[np.argmin(length)]
        raise DatasetError(f"{path}: the trajectory that ends in row {row} has no transition; leave it out")
    return _Rows(total, np.cumsum(length), None if regular else last)


@dataclass(frozen=True)
class _Labels:
    """A reader of `reward` and, where it is known, `info/mask`; their types; and what `meta` says of them."""

    read: Read
    types: Mapping[str, np.dtype]
    meta: Mapping[str, Any]


def _recorded(path: Path, arrays: Mapping[str, npz.Array]) -> _Labels:
    """Rewards and masks of the file, where it has them."""
    columns = {"rewards": "reward", "masks": "info/mask"}
    readers = {columns[name]: arrays[name].rows() for name in columns if name in arrays}

    def read(part: slice) -> dict[str, np.ndarray]:
        found = {name: reader(part) for name, reader in readers.items()}
        if "info/mask" in found and not np.isin(found["info/mask"], (0, 1)).all():
            raise DatasetError(f"{path}: masks holds other numbers than 0 and 1; wanted 0 where the task ended")
        return {"reward": np.zeros(part.stop - part.start, np.float32), **found}

    types: dict[str, np.dtype] = {"reward": np.dtype(np.float32)}
    if "masks" in arrays:
        types["info/mask"] = np.dtype(bool)
    if "rewards" not in arrays:
        return _Labels(read, types, {"rewards": "none recorded; name a task"})
    return _Labels(read, {**types, "reward": arrays["rewards"].dtype.newbyteorder("=")}, {})


@contextmanager
def _relabelled(path: Path, arrays: Mapping[str, npz.Array], task: str) -> Iterator[_Labels]:
    """Rewards and masks of a task, from the package: its environment says what the goal is."""
    if NAME.fullmatch(task) is None or "singletask" not in task.split("-"):
        raise DatasetError(f"{task!r} names no task of OGBench's; wanted a name such as {EXAMPLE}")
    ogbench = _package()
    try:
        with _quiet():
            env = ogbench.make_env_and_datasets(task, env_only=True)
            shape = env.observation_space.shape
    except Exception as error:  # of Gymnasium's registry, or of the simulator
        raise DatasetError(
            f"ogbench has no task {task!r} ({first_line(error)}); wanted a name such as {EXAMPLE}"
        ) from error
    with closing(env):
        observed = arrays["observations"].shape[1:]
        if shape != observed:
            raise DatasetError(
                f"{path} has observations {observed} and task {task!r} {shape}; name one of its own tasks"
            )
        types = {"reward": np.dtype(np.float32), "info/mask": np.dtype(bool)}
        yield _Labels(_relabelling(path, arrays, env), types, _of_task(task, env))


def _relabelling(path: Path, arrays: Mapping[str, npz.Array], env: Any) -> Read:
    from ogbench.relabel_utils import relabel_dataset

    readers = {name: arrays[name].rows() for name in ("qpos", "button_states") if name in arrays}

    def read(part: slice) -> dict[str, np.ndarray]:
        block = {name: reader(part) for name, reader in readers.items()}
        try:
            with _quiet():
                relabel_dataset(env.spec.id, env, block)
        except (KeyError, IndexError, ValueError) as error:
            raise DatasetError(
                f"{path} cannot be relabelled for {env.spec.id} ({first_line(error)}); wanted the task's own qpos and "
                "button_states, as OGBench publishes them"
            ) from error
        return {"reward": block["rewards"], "info/mask": block["masks"] != 0}

    return read


def _of_task(task: str, env: Any) -> dict[str, Any]:
    robot = "manipspace" in env.spec.entry_point
    period = env.unwrapped.control_timestep() if robot else env.unwrapped.dt
    return {"env_id": env.spec.id, "env_kwargs": {}, "control_period": float(period), "task": task}


def _read(path: Path, arrays: Mapping[str, npz.Array], rows: _Rows, wanted: Wanted, labels: _Labels) -> Episodes:
    n, obs, action = int(rows.ends[-1]), arrays["observations"], arrays["actions"]
    layout: Layout = {
        "obs/obs": ((n + len(rows.ends), *obs.shape[1:]), obs.dtype.newbyteorder("=")),
        "action": ((n, *action.shape[1:]), action.dtype.newbyteorder("=")),
        **{name: ((n,), dtype) for name, dtype in labels.types.items()},
    }
    out = wanted.allocate(layout)
    if rows.without is None:
        copy_observations(out["obs/obs"], rows.ends, obs.rows(), arrays["next_observations"].rows())
    else:
        copy_rows(out["obs/obs"], obs.rows())
    actions = action.rows()
    _copy_steps(out, rows, lambda part: {"action": actions(part)}, row_bytes(action))
    _copy_steps(out, rows, labels.read, sum(row_bytes(array) for array in arrays.values() if array is not obs))
    mask = out.get("info/mask")
    terminated = np.zeros(len(rows.ends), dtype=bool) if mask is None else ~np.asarray(mask[rows.ends - 1])
    masked = 0 if mask is None else n - int(np.count_nonzero(mask)) - int(np.count_nonzero(terminated))
    return assemble(
        out,
        length=np.diff(rows.ends, prepend=0),
        terminated=terminated,
        truncated=~terminated,
        has_final=np.ones(len(rows.ends), dtype=bool),
        meta={
            "source": "ogbench-npz",
            "file": path.name,
            **({"masked_steps": masked} if masked else {}),
            **labels.meta,
        },
    )


def _copy_steps(out: Mapping[str, np.ndarray], rows: _Rows, read: Read, row_bytes: int) -> None:
    """Copy the rows that are transitions, block by block."""
    done = 0
    for part in blocks(rows.total, row_bytes):
        steps = rows.steps(part)
        count = int(np.count_nonzero(steps))
        for name, block in read(part).items():
            out[name][done : done + count] = block[steps]
        done += count
