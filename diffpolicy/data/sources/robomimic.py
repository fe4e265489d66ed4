"""robomimic's HDF5 layout (Mandlekar et al. 2021), which MimicGen and LIBERO use as well.

    data            attributes env_args (JSON: env_name, type, env_kwargs), total
      demo_0        attribute num_samples
        actions (L, Da)   rewards (L,)   dones (L,)   obs/<name> (L, ...)   next_obs/<name> (L, ...), maybe
      demo_1 ...    in the order of their numbers
    mask/<part>     names of the demonstrations of a part, such as train and valid

The observation after the last action comes from `next_obs`; without, it is unknown. `rewards` and `dones` may be
absent from all demonstrations: zeros then, and no end of the task. `states` (the simulator's) are not read. Images are
read only when named.

`dones` mask the bootstrap in robomimic: `r + gamma * (1 - done) * V(next)`. An episode is `terminated` if its last
step is done; and since dones may come earlier, `info` gets a `mask (N,)`, False at each of them. What a done means is
the writer's choice, which the file does not tell (`done_mode` of robomimic's `dataset_states_to_obs.py`): 0, each step
that leads to a success, of which there are often several before the demonstrator stops; 1, the end of each
demonstration, whether it succeeded or not; 2, both. robomimic's own datasets have 0 where a machine acted (MG), 2 where
people did (PH, MH). LIBERO's have 1, and a reward of 1 there, whatever happened.

robomimic's `convert_d4rl.py` writes D4RL's timeouts as dones and repeats each last observation in `next_obs`; both are
read as they stand. Such a file (a gym environment, the one observation `flat`, every last one repeated) comes with a
warning: D4RL's own file tells timeouts from terminals.

LIBERO (Liu et al. 2023), whose `create_dataset.py` appends what `env.step(action)` returned beside that action:

    rows in the file    robomimic  o0 a0 r0  o1 a1 r1 ...  obs i came before action i
                        LIBERO     a5 r5 o6  a6 r6 o7 ...  obs i came after it, and the first five steps are left out

A file with both of the attributes `bddl_file_name` and `macros_image_convention` and without `next_obs` is LIBERO's. Of
its L rows come L-1 actions, rewards and dones, the first ones left out, and L observations, of which the last is known
to follow the last action. `meta` says so as `aligned`.

`meta` gets `control_delta` where the controller's configuration tells whether actions are deltas. Files that were
converted to absolute actions without changing `env_args` still say that they are.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.sources import hdf5
from diffpolicy.data.sources.reading import IMAGE_AXES, Layout, Wanted, assemble, copy_rows, reading
from diffpolicy.errors import DatasetError

LAYOUT = "robomimic's data/demo_<n> with actions and obs"
DEMO = re.compile(r"demo_([0-9]{1,15})")
ENV_TYPES = {1: "robosuite", 2: "gym"}
SCALARS = ("rewards", "dones")
LIBERO = ("bddl_file_name", "macros_image_convention")
ALIGNED = "LIBERO: observations follow their actions, each episode's first action left out"
NAME_BYTES = 256
PACKED_NAMES = 64 << 10


def recognises(path: Path) -> bool:
    """Whether the file has robomimic's group at its root."""
    return hdf5.is_hdf5(path) and "data" in hdf5.names(path)


def load(path: Path, wanted: Wanted) -> Episodes:
    """Read a robomimic file, `wanted.part` of it if one is named.

    Raises:
        DatasetError: if the file is cut short, its arrays or attributes disagree, or there is no such part.
    """
    replace(wanted, part=None).refuse_part_and_task("robomimic's layout")
    with hdf5.opened(path) as file:
        data = hdf5.group(path, file, "data", LAYOUT)
        every = _numbered(path, data)
        _check_counts(path, data, every)
        names = every if wanted.part is None else _part(path, file, every, wanted.part)
        observed = wanted.choose(_shapes(path, data, names[0]))
        follow = all(name in data.attrs for name in LIBERO) and not any(
            "next_obs" in hdf5.group(path, data, name, LAYOUT) for name in every
        )
        demos = [_demo(path, data, name, observed, skip=int(follow)) for name in names]
        _check_alike(path, demos)
        meta = {"source": "robomimic-hdf5", "file": path.name, **_environment(path, data)}
        meta |= {"aligned": ALIGNED} if follow else {}
        episodes = _read(demos, wanted, meta if wanted.part is None else {**meta, "part": wanted.part})
    _warn_of_timeouts(path, episodes)
    return episodes


@dataclass(frozen=True)
class _Demo:
    """One demonstration, its arrays looked at but not read; `next_obs` is empty where it is absent.

    The first `skip` rows of its arrays came before its first observation. Its length is without them.
    """

    name: str
    arrays: Mapping[str, h5py.Dataset]
    obs: Mapping[str, h5py.Dataset]
    next_obs: Mapping[str, h5py.Dataset]
    skip: int = 0

    def __len__(self) -> int:
        return len(self.arrays["actions"]) - self.skip

    def rows(self) -> dict[str, str]:
        """Shape of one row of each array, to compare and to show."""
        arrays = {**dict.fromkeys(SCALARS), **self.arrays, **{f"obs/{name}": item for name, item in self.obs.items()}}
        return {name: "absent" if item is None else str(item.shape[1:]) for name, item in arrays.items()}


def _numbered(path: Path, data: h5py.Group) -> list[str]:
    """Names of all demonstrations, by number."""
    numbers = {name: DEMO.fullmatch(name) for name in map(str, data)}
    if odd := [name for name, match in numbers.items() if match is None]:
        raise DatasetError(f"{path}: data holds {odd[0]!r}; wanted demonstrations named demo_0, demo_1, ...")
    if not numbers:
        raise DatasetError(f"{path} has zero demonstrations in its group data; wanted {LAYOUT}")
    return sorted(numbers, key=lambda name: int(name.removeprefix("demo_")))


def _check_counts(path: Path, data: h5py.Group, names: Sequence[str]) -> None:
    """Refuse attributes that count other steps than there are."""
    total = 0
    for name in names:
        demo = hdf5.group(path, data, name, LAYOUT)
        steps = len(hdf5.dataset(path, demo, "actions", LAYOUT))
        _check_count(path, demo, "num_samples", steps)
        if steps == 0:
            raise DatasetError(f"{path}: data/{name} has 0 steps; wanted at least 1: leave it out")
        total += steps
    _check_count(path, data, "total", total)


def _check_count(path: Path, item: h5py.Group, attribute: str, steps: int) -> None:
    declared = item.attrs.get(attribute, steps)
    if not np.array_equal(declared, steps):
        shown = repr(np.asarray(declared).tolist())[:40]
        raise DatasetError(
            f"{path}: {item.name} declares {attribute} {shown} and has {steps} actions; wanted as many: write it again"
        )


def _part(path: Path, file: h5py.File, every: Sequence[str], part: str) -> list[str]:
    """Names of the demonstrations of a part, by number."""
    parts = [str(name) for name in hdf5.group(path, file, "mask", LAYOUT)] if "mask" in file else []
    if part not in parts:
        raise DatasetError(f"{path} has no part {part!r}; it has {', '.join(sorted(parts)) or 'none'}: leave it out")
    wanted = _texts(path, hdf5.group(path, file, "mask", LAYOUT), part, len(every))
    if odd := [name for name in wanted if name not in every]:
        raise DatasetError(f"{path}: mask/{part} names {odd[0]!r:.40}, which data does not have; write it again")
    if not wanted or len(set(wanted)) < len(wanted):
        raise DatasetError(f"{path}: mask/{part} names a demonstration twice, or none at all; write it again")
    return [name for name in every if name in set(wanted)]


def _texts(path: Path, group: h5py.Group, name: str, most: int) -> list[str]:
    """Read a list of names, which no part has more of than there are demonstrations."""
    item = group[name]
    elsewhere = item.file.filename != group.file.filename
    if elsewhere or not isinstance(item, h5py.Dataset) or item.ndim != 1 or item.external or item.is_virtual:
        raise DatasetError(f"{path}: mask/{name} is not a list of names within the file; write it again")
    text = item.dtype.kind == "S" or h5py.check_string_dtype(item.dtype) is not None
    packed = 0 if item.chunks is None else item.id.get_storage_size()
    if not text or len(item) > most or item.dtype.itemsize > NAME_BYTES or packed > PACKED_NAMES:
        raise DatasetError(
            f"{path}: mask/{name} has {len(item)} rows of {item.dtype}; wanted names of the {most} demonstrations"
        )
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in item[:]]


def _shapes(path: Path, data: h5py.Group, name: str) -> dict[str, tuple[int, ...]]:
    """Shape of one row of each observation of a demonstration."""
    demo = hdf5.group(path, data, name, LAYOUT)
    if "obs" not in demo:
        raise DatasetError(
            f"{path}: data/{name} has no observations, only the simulator's states; extract them with robomimic's "
            "dataset_states_to_obs.py"
        )
    obs = hdf5.group(path, demo, "obs", LAYOUT)
    return {key: hdf5.dataset(path, obs, key, LAYOUT).shape[1:] for key in map(str, obs)}


def _demo(path: Path, data: h5py.Group, name: str, observed: Sequence[str], skip: int) -> _Demo:
    demo = hdf5.group(path, data, name, LAYOUT)
    arrays = {key: hdf5.dataset(path, demo, key, LAYOUT) for key in ("actions", *SCALARS) if key in demo}
    obs = _arrays(path, demo, "obs", observed)
    next_obs = _arrays(path, demo, "next_obs", observed) if "next_obs" in demo else {}
    steps = len(arrays["actions"])
    if steps <= skip:
        raise DatasetError(
            f"{path}: data/{name} has {steps} step, and LIBERO records no observation before the first; wanted at "
            "least 2: leave it out"
        )
    hdf5.check_rows(path, [*arrays.values(), *obs.values(), *next_obs.values()], steps, "one an action")
    for key in SCALARS:
        if key in arrays and arrays[key].size != steps:
            raise DatasetError(
                f"{path}: data/{name}/{key} has shape {arrays[key].shape}; wanted one number a step: reshape it"
            )
    for key, item in next_obs.items():
        if item.shape != obs[key].shape:
            raise DatasetError(f"{path}: {item.name} has shape {item.shape}; wanted {obs[key].shape}, as in obs")
    return _Demo(name, arrays, obs, next_obs, skip)


def _arrays(path: Path, demo: h5py.Group, name: str, observed: Sequence[str]) -> dict[str, h5py.Dataset]:
    inner = hdf5.group(path, demo, name, LAYOUT)
    return {key: hdf5.dataset(path, inner, key, LAYOUT) for key in observed}


def _check_alike(path: Path, demos: Sequence[_Demo]) -> None:
    """Refuse demonstrations that differ in what they record."""
    first = demos[0].rows()
    for demo in demos[1:]:
        for key, shape in demo.rows().items():
            if shape != first[key]:
                raise DatasetError(
                    f"{path}: a row of data/{demo.name}/{key} is {shape} and one of {demos[0].name} {first[key]}; "
                    "wanted all alike: leave that demonstration out, or write it again"
                )


def _environment(path: Path, data: h5py.Group) -> dict[str, Any]:
    """Return what env_args tell of the environment."""
    text = data.attrs.get("env_args")
    if text is None:
        return {}
    with reading(path, "its attribute env_args"):
        arguments = json.loads(text)
        kwargs = dict(arguments.get("env_kwargs") or {})
        known = {"env_id": str(arguments["env_name"]), "env_kwargs": kwargs}
        kind = arguments.get("type", arguments.get("env_type"))
        if kind is not None:
            known["env_type"] = ENV_TYPES.get(kind, str(kind))
        if kwargs.get("control_freq") is not None:
            known["control_period"] = _period(kwargs["control_freq"])
        if deltas := set(_deltas(kwargs.get("controller_configs"))):
            known["control_delta"] = any(deltas)
    return known


def _period(frequency: Any) -> float:
    if isinstance(frequency, bool) or not isinstance(frequency, int | float) or not 0 < frequency < float("inf"):
        raise ValueError(f"control_freq is {frequency!r:.40}, wanted a number above 0")
    return 1 / frequency


def _deltas(config: Any) -> Iterator[bool]:
    """Whether each arm's actions are deltas, wherever the configuration says so.

    robosuite before 1.5 has `control_delta`, later ones `input_type`, one for each part of the body.
    """
    if isinstance(config, Mapping):
        if isinstance(config.get("control_delta"), bool):
            yield config["control_delta"]
        if config.get("input_type") in ("delta", "absolute"):
            yield config["input_type"] == "delta"
    if isinstance(config, Mapping | list):
        for inner in config.values() if isinstance(config, Mapping) else config:
            yield from _deltas(inner)


def _read(demos: Sequence[_Demo], wanted: Wanted, meta: Mapping[str, Any]) -> Episodes:
    length = np.array([len(demo) for demo in demos], dtype=np.int64)
    n, first = int(length.sum()), demos[0]
    rewards, dones = "rewards" in first.arrays, "dones" in first.arrays
    layout: Layout = {
        **{
            f"obs/{name}": ((n + len(demos), *_flat(item)), _dtype(demo.obs[name] for demo in demos))
            for name, item in first.obs.items()
        },
        "action": ((n, *first.arrays["actions"].shape[1:]), _dtype(demo.arrays["actions"] for demo in demos)),
        "reward": ((n,), _dtype(demo.arrays["rewards"] for demo in demos) if rewards else np.dtype(np.float32)),
        **({"info/mask": ((n,), np.dtype(bool))} if dones else {}),
    }
    out = wanted.allocate(layout)
    if not rewards:
        out["reward"][:] = 0
    for i, (demo, start) in enumerate(zip(demos, np.cumsum(length) - length, strict=True)):
        _fill(out, demo, int(start), i)
    ends = np.cumsum(length)
    terminated = ~out["info/mask"][ends - 1] if dones else np.zeros(len(demos), dtype=bool)
    masked = int(n - np.count_nonzero(out["info/mask"]) - np.count_nonzero(terminated)) if dones else 0
    return assemble(
        out,
        length=length,
        terminated=np.asarray(terminated),
        truncated=np.asarray(~terminated),
        has_final=np.full(len(demos), all(demo.next_obs or demo.skip for demo in demos)),
        meta={
            **meta,
            **({} if rewards else {"rewards": "none recorded"}),
            **({"masked_steps": masked} if masked else {}),
        },
    )


def _flat(item: h5py.Dataset) -> tuple[int, ...]:
    """Shape of one row: images keep theirs, all else is flat."""
    shape = item.shape[1:]
    return shape if len(shape) >= IMAGE_AXES else (int(np.prod(shape)),)


def _dtype(items: Iterator[h5py.Dataset]) -> np.dtype:
    return np.result_type(*{item.dtype.newbyteorder("=") for item in items})


def _fill(out: Mapping[str, np.ndarray], demo: _Demo, start: int, number: int) -> None:
    """Copy demonstration `number`, whose first step is `start`."""
    n = len(demo)
    steps = slice(start, start + n)
    columns = {"actions": "action", "rewards": "reward", "dones": "info/mask"}
    for key, item in demo.arrays.items():
        target = out[columns[key]][steps]
        copy_rows(target, _reader(item, target, key == "dones", demo.skip), hdf5.chunk_rows(item))
    for name, item in demo.obs.items():
        target = out[f"obs/{name}"][start + number : start + number + n + 1]
        copy_rows(target[: n + demo.skip], _reader(item, target), hdf5.chunk_rows(item))
        if demo.skip == 0:
            last = demo.next_obs.get(name, item)
            target[n:] = _reader(last, target)(slice(n - 1, n))


def _reader(
    item: h5py.Dataset, target: np.ndarray, negate: bool = False, skip: int = 0
) -> Callable[[slice], np.ndarray]:
    """Return a reader of rows in the shape of the target's, counted from row `skip` on."""

    def read(rows: slice) -> np.ndarray:
        block = np.asarray(item[rows.start + skip : rows.stop + skip]).reshape(-1, *target.shape[1:])
        return block == 0 if negate else block

    return read


def _warn_of_timeouts(path: Path, episodes: Episodes) -> None:
    """Say so where timeouts were written as dones."""
    known = episodes.meta.get("env_type") == "gym" and list(episodes.obs) == ["flat"]
    if not (known and np.all(episodes.terminated) and np.all(episodes.has_final)):
        return
    last = episodes.start + episodes.length + np.arange(len(episodes))
    if np.array_equal(episodes.obs["flat"][last], episodes.obs["flat"][last - 1]):
        warnings.warn(
            f"{path}: every episode ends with a done and its last observation twice, as robomimic's convert_d4rl.py "
            "writes timeouts, too; critics take them for true ends: read D4RL's own file",
            stacklevel=5,
        )
