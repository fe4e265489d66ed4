"""LeRobot's datasets, v2.0, v2.1 and v3.0: parquet files of rows, and in `meta/` what they mean.

    meta/info.json          version, fps, totals, splits, features {name: dtype, shape}
    v2.0, v2.1              meta/episodes.jsonl, tasks.jsonl      data/chunk-000/episode_000000.parquet, one an episode
    v3.0                    meta/episodes/, meta/tasks.parquet    data/chunk-000/file-000.parquet, episodes concatenated

`action` (or `actions`) is the action and `next.reward` (or `reward`) the reward, zeros without it; `timestamp`,
`task_index`, `next.done` and `next.success` go to info. Observations are the features of numbers whose names begin with
`observation`, as LeRobot's own policies have it; where there are none, all but those of the future (`next.*`) and those
that tell by their names what was done and how it went, such as `is_terminal` and `action_dict.position`. What is left
out, video, images and text among it, is named in a warning; other features of numbers can be asked for by name.
`next.done` is true in an episode's last row whatever ended it, and a success need not end one: the format cannot tell,
so `terminated` is False throughout. The observation after the last action is not recorded.

Files are found by their folder, never by the templates of info.json, and each row must say that it is the row that its
place makes it.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources.parquet import INFO, NUMBERS, Feature, File, batches, check_column, numbers_of, opened
from diffpolicy.data.sources.reading import BLOCK_BYTES, IMAGE_AXES, Layout, Wanted, assemble, reading
from diffpolicy.errors import DatasetError

OLD_INFO = "meta_data/info.json"
ORDER = ("episode_index", "frame_index")
PER_STEP = ("timestamp", "task_index", "next.done", "next.success")
ACTIONS, REWARDS = ("action", "actions"), ("next.reward", "reward")
NOT_OBSERVED = ("index", *ACTIONS, *ORDER, *PER_STEP)
NOT_OBSERVED_PREFIXES = ("action.", "next.")
OBSERVED_PREFIX = "observation"
OUTCOME = re.compile(
    r"(^|[._])(actions?|rewards?|return|done|success\w*|\w*successful|terminal|discount|is|complementary_info)([._]|$)"
)


@dataclass(frozen=True)
class _Version:
    """Where a version of the format keeps its files, and how its tables in `meta/` are read."""

    files: str
    one_an_episode: bool
    table: Callable[[Path, str], Iterator[Mapping[str, Any]]]


@dataclass(frozen=True)
class _Info:
    """What info.json declares; `others` are the features that are no numbers, with their type."""

    path: Path
    version: _Version
    episodes: int
    frames: int
    features: Mapping[str, Feature]
    others: Mapping[str, str]
    splits: Mapping[str, Any]
    meta: Mapping[str, Any]

    def wrong(self, what: str) -> DatasetError:
        """Return the error that something in info.json is wrong."""
        return DatasetError(f"{self.path}: {INFO} {what}")


@dataclass(frozen=True)
class _Chosen:
    """Episodes to read: the number of the first, the row where it begins, and the length of each."""

    episode: int
    row: int
    length: np.ndarray


def recognises(path: Path) -> bool:
    """Whether the path is the folder of a LeRobot dataset, v1 included, which `load` refuses by its name."""
    return (path / INFO).is_file() or (path / OLD_INFO).is_file()


def load(path: Path, wanted: Wanted) -> Episodes:
    """Read a dataset; a part is one of the splits of its info.json.

    Raises:
        DatasetError: if files, totals, episodes and rows disagree, or a column is not what info.json declares.
        MissingExtraError: if the `pyarrow` package is not installed.
    """
    replace(wanted, part=None).refuse_part_and_task("a LeRobot dataset")
    info = _read_info(path)
    columns = _columns(info, wanted)
    files = _survey(info, columns.values())
    chosen, tasks = _choose(info, _lengths(info), wanted.part), _tasks(info)
    e, n = len(chosen.length), int(np.sum(chosen.length))
    arrays = wanted.allocate(_layout(columns, n, e))
    if "reward" not in columns:
        arrays["reward"][:] = 0
    _fill(arrays, columns, files, chosen)
    return assemble(
        arrays,
        length=chosen.length,
        terminated=np.zeros(e, dtype=bool),
        truncated=np.ones(e, dtype=bool),
        has_final=np.zeros(e, dtype=bool),
        meta={
            **info.meta,
            **({} if wanted.part is None else {"part": wanted.part}),
            **({} if "reward" in columns else {"rewards": "none recorded"}),
            "tasks": tasks,
        },
    )


# What info.json declares.


def _read_info(path: Path) -> _Info:
    file = next(file for file in (path / INFO, path / OLD_INFO) if file.is_file())
    with reading(path, str(file.relative_to(path))):
        declared = dict(json.loads(file.read_text(encoding="utf-8")))
    name = declared.get("codebase_version")
    if not isinstance(name, str) or name not in VERSIONS:
        raise DatasetError(
            f"{path} is of LeRobot's format {str(name)[:40]!r}; wanted one of {', '.join(VERSIONS)}: convert an older "
            "one with lerobot, update diffpolicy for a newer one"
        )
    fps, features = _field(path, declared, "fps", (int, float)), _field(path, declared, "features", dict)
    if not 1e-6 < fps < 1e6:
        raise DatasetError(f"{path}: {INFO} has fps {fps}; wanted frames per second above 0: correct it")
    if unclear := [name for name in features if not name.isprintable() or not name or "/" in name]:
        raise DatasetError(f"{path}: {INFO} has a feature {_shown(unclear[0])}; wanted a name without '/': rename it")
    others = {name: _kind(feature) for name, feature in features.items() if _kind(feature) not in NUMBERS}
    robot = declared.get("robot_type")
    return _Info(
        path=path,
        version=VERSIONS[name],
        episodes=_field(path, declared, "total_episodes", int),
        frames=_field(path, declared, "total_frames", int),
        features={name: _feature(path, name, features[name]) for name in features if name not in others},
        others=others,
        splits=_field(path, {"splits": {}} | declared, "splits", dict),
        meta={
            "source": "lerobot",
            "file": path.absolute().name,
            "codebase_version": name,
            "control_period": 1 / fps,
            **({"robot_type": robot} if isinstance(robot, str) else {}),
            **({"left_out": others} if others else {}),
        },
    )


def _field(path: Path, declared: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = declared.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DatasetError(f"{path}: {INFO} has {name} {_shown(value)}; wanted what lerobot writes: write it again")
    return value


def _shown(value: object) -> str:
    return repr(value)[:60]


def _kind(declared: Any) -> str:
    kind = declared.get("dtype") if isinstance(declared, dict) else None
    return kind[:40] if isinstance(kind, str) and kind.isprintable() else "of no type"


def _feature(path: Path, name: str, declared: Mapping[str, Any]) -> Feature:
    shape = declared.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise DatasetError(f"{path}: {INFO} has {name} of shape {_shown(shape)}; wanted sizes above 0: correct it")
    return Feature(name, np.dtype(declared["dtype"]), tuple(shape) or (1,))


# What to read of it.


def _columns(info: _Info, wanted: Wanted) -> dict[str, Feature]:
    """Features to read, by the name of the array that each fills."""
    features = info.features
    action, reward = (next((n for n in names if n in features), names[0]) for names in (ACTIONS, REWARDS))
    if missing := [name for name in (action, *ORDER) if name not in features]:
        raise info.wrong(f"has no feature {missing[0]} of numbers; it has {sorted([*features, *info.others])}: add it")
    if len(features[action].shape) != 1:
        raise info.wrong(f"has actions of shape {features[action].shape}; wanted a flat row: reshape them")
    columns = {f"obs/{name}": features[name] for name in _observations(info, wanted)}
    columns["action"] = features[action]
    single = {reward: "reward", **{name: f"info/{name}" for name in PER_STEP}, **{name: name for name in ORDER}}
    for name in (name for name in single if name in features):
        if features[name].shape != (1,):
            raise info.wrong(f"has {name} of shape {features[name].shape}; wanted one number a row: correct it")
        columns[single[name]] = features[name]
    return columns


def _observations(info: _Info, wanted: Wanted) -> list[str]:
    """Names of the observations to read; one warning names what is left out, unless the caller names observations."""
    shapes = {
        name: feature.shape
        for name, feature in info.features.items()
        if name not in NOT_OBSERVED and not name.startswith(NOT_OBSERVED_PREFIXES)
    }
    left_out = ", ".join(f"{name} ({kind})" for name, kind in info.others.items())
    if asked := [name for name in wanted.obs or () if name in info.others]:
        raise info.wrong(
            f"says that {asked[0]} is {info.others[asked[0]]}, which is not read; choose of {sorted(shapes)}"
        )
    if not shapes:
        raise info.wrong(f"has no observations of numbers, only {left_out or 'actions'}; this version reads numbers")
    if wanted.obs is not None:
        return wanted.choose(shapes)
    given = [name for name in shapes if name.startswith(OBSERVED_PREFIX)]
    given = given or [name for name in shapes if not OUTCOME.search(name)]
    if left_out:
        warnings.warn(f"{info.path}: left out {left_out}; this version reads numbers only", stacklevel=4)
    if others := [name for name in shapes if name not in given and name not in REWARDS]:
        warnings.warn(
            f"{info.path}: left out {', '.join(others)}, by their names no observations; name them to read them, "
            "load(..., obs=[...]) or --obs",
            stacklevel=4,
        )
    return wanted.choose({name: shapes[name] for name in given})


def _lengths(info: _Info) -> np.ndarray:
    """Length of each episode, in the order of their numbers."""
    with reading(info.path, "the table of episodes in meta/"):
        table = info.version.table(info.path, "episodes")
        rows = sorted((int(row["episode_index"]), int(row["length"])) for row in table)
    if len(rows) != info.episodes or any(number != i for i, (number, _) in enumerate(rows)):
        raise info.wrong(
            f"declares {info.episodes} episodes, the table of episodes has {len(rows)} rows; wanted each number from 0 "
            "on once: copy the dataset again"
        )
    lengths = [length for _, length in rows]
    if min(lengths, default=0) < 1 or sum(lengths) != info.frames:
        raise info.wrong(
            f"declares {info.frames} frames, the table of episodes {sum(lengths)}, of at least "
            f"{min(lengths, default=0)} each; wanted as many, of at least 1 each: copy the dataset again"
        )
    return np.array(lengths, dtype=np.int64)


def _choose(info: _Info, length: np.ndarray, part: str | None) -> _Chosen:
    """All episodes, or those of a split such as `"train": "0:100"`."""
    if part is None:
        return _Chosen(0, 0, length)
    if part not in info.splits:
        raise info.wrong(f"has no split {part!r}; it has {sorted(info.splits)}: choose one, or leave the part out")
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(info.splits[part]))
    first, stop = (int(match[1]), int(match[2])) if match else (0, 0)
    if not first < stop <= len(length):
        raise info.wrong(
            f"has the split {part!r} {_shown(info.splits[part])}; wanted 'first:stop' within the {len(length)} "
            "episodes: correct it"
        )
    return _Chosen(first, int(np.sum(length[:first])), length[first:stop])


def _layout(columns: Mapping[str, Feature], n: int, e: int) -> Layout:
    """Shapes of the arrays: images keep theirs, other observations are flat, one number a step has no axis."""
    layout: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name, feature in columns.items():
        if name.startswith("obs/"):
            flat = len(feature.shape) < IMAGE_AXES
            layout[name] = (n + e, *((math.prod(feature.shape),) if flat else feature.shape)), feature.dtype
        elif name not in ORDER:
            layout[name] = (n, *(feature.shape if name == "action" else ())), feature.dtype
    return layout | {"reward": ((n,), np.dtype(np.float32))}


def _tasks(info: _Info) -> dict[str, str]:
    """Descriptions by number. Their column has no fixed name in v3.0: it is the one of text."""
    with reading(info.path, "the table of tasks in meta/"):
        return {
            str(int(row["task_index"])): next((value for value in row.values() if isinstance(value, str)), "")
            for row in info.version.table(info.path, "tasks")
        }


def _survey(info: _Info, features: Iterable[Feature]) -> list[File]:
    """Find the files of data, and hold their footers against info.json."""
    files: list[File] = []
    row = 0
    for path in _find(info):
        with opened(path) as parquet:
            for feature in features:
                check_column(path, parquet.schema_arrow, feature)
            files.append(File(path, row, parquet.metadata.num_rows))
        row += files[-1].rows
    if row != info.frames:
        raise info.wrong(
            f"declares {info.frames} frames, the files in data/ have {row} rows; wanted as many: a file is missing or "
            "of another dataset, copy it again"
        )
    return files


def _find(info: _Info) -> list[Path]:
    """Files of data, in the order of the numbers in their names."""
    matches = ((re.fullmatch(info.version.files, f"{p.parent.name}/{p.name}"), p) for p in info.path.glob("data/*/*"))
    found = sorted((int(match[1]), int(match[2]), path) for match, path in matches if match and path.is_file())
    if info.version.one_an_episode and len(found) < info.episodes:
        numbers = [number for _, number, _ in found]
        missing = next((i for i, number in enumerate(numbers) if number != i), len(found))
        raise DatasetError(f"{info.path} lacks data/chunk-*/episode_{missing:06d}.parquet; copy the dataset again")
    return [path for *_, path in found]


def _fill(arrays: Mapping[str, np.ndarray], columns: Mapping[str, Feature], files: list[File], chosen: _Chosen) -> None:
    """Copy the rows of the chosen episodes, batch by batch; see the picture in `episodes.py`."""
    ends = np.cumsum(chosen.length)
    rows = range(chosen.row, chosen.row + int(ends[-1]))
    row_bytes = sum(math.prod(feature.shape) * feature.dtype.itemsize for feature in columns.values())
    names = [feature.name for feature in columns.values()]
    for file, row, batch in batches(files, rows, names, max(BLOCK_BYTES // row_bytes, 1)):
        steps = np.arange(len(batch)) + row - rows.start
        episode = np.searchsorted(ends, steps, side="right")
        expected = {"episode_index": chosen.episode + episode, "frame_index": steps - (ends - chosen.length)[episode]}
        last = np.flatnonzero(steps == ends[episode] - 1)
        for name, feature in columns.items():
            block = numbers_of(file.path, batch, feature)
            if name in expected:
                _check_order(file, row, name, block[:, 0], expected[name])
                continue
            out = arrays[name]
            block = block.reshape(len(block), *out.shape[1:])
            if name.startswith("obs/"):
                out[steps + episode] = block
                out[steps[last] + episode[last] + 1] = block[last]
            else:
                out[steps[0] : steps[-1] + 1] = block


def _check_order(file: File, row: int, name: str, found: np.ndarray, expected: np.ndarray) -> None:
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        raise DatasetError(
            f"{file.path}: {name} is {found[wrong[0]]} in row {row - file.row + wrong[0]}; wanted "
            f"{expected[wrong[0]]}, whole episodes in order as meta/ lists them: write the dataset again"
        )


def _json_lines(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    """Rows of `meta/<name>.jsonl`."""
    with (path / "meta" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _parquet_rows(path: Path, name: str) -> Iterator[Mapping[str, Any]]:
    """Rows of `meta/<name>/*/*.parquet` or `meta/<name>.parquet`; columns with a `/` are statistics and places."""
    for file in sorted((path / "meta" / name).glob("*/*.parquet")) or [path / "meta" / f"{name}.parquet"]:
        with opened(file) as parquet:
            columns = [column for column in parquet.schema_arrow.names if "/" not in column]
            for batch in parquet.iter_batches(columns=columns):
                yield from batch.to_pylist()


VERSIONS = {
    "v2.0": _Version(r"chunk-(\d+)/episode_(\d+)\.parquet", True, _json_lines),
    "v2.1": _Version(r"chunk-(\d+)/episode_(\d+)\.parquet", True, _json_lines),
    "v3.0": _Version(r"chunk-(\d+)/file-(\d+)\.parquet", False, _parquet_rows),
}
