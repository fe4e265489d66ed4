"""Minari's datasets: what minari writes is read number for number, what we write minari reads, the rest is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium import spaces

from diffpolicy.data import store
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.sources import minari as source
from diffpolicy.data.sources.reading import Wanted, in_memory
from diffpolicy.errors import DatasetError, MissingExtraError

minari = pytest.importorskip("minari")
pytestmark = pytest.mark.filterwarnings("ignore:.*is set to None:UserWarning", "ignore:env_spec is None:UserWarning")

BOX = spaces.Box(-1, 1, (2,), np.float32)


@pytest.fixture(autouse=True)
def registry(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "registry"))
    return tmp_path / "registry"


def tree_map(function: Callable, tree: Any, *rest: Any) -> Any:
    """All that minari's collector needs of jax, which is large: a function over the leaves of the first tree."""
    if isinstance(tree, dict):
        return {key: tree_map(function, part, *(other[key] for other in rest)) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(tree_map(function, part, *(other[i] for other in rest)) for i, part in enumerate(tree))
    return function(tree, *rest)


@pytest.fixture
def collector(monkeypatch) -> Callable[..., Any]:
    """Minari's own way to write: play an environment inside of `DataCollector`."""
    jax = SimpleNamespace(tree_util=SimpleNamespace(tree_map=tree_map))
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "jax.tree_util", jax.tree_util)

    def collect(env: gymnasium.Env, name: str, episodes: int = 3, options: dict | None = None, **told: Any) -> Any:
        collecting = minari.DataCollector(env, record_infos=True, **(options or {}))
        env.action_space.seed(0)
        for seed in range(episodes):
            collecting.reset(seed=seed)
            ended = False
            while not ended:
                *_, terminated, truncated, _ = collecting.step(env.action_space.sample())
                ended = terminated or truncated
        dataset = collecting.create_dataset(name, **told)
        collecting.close()
        return dataset

    return collect


class Nested(gymnasium.Env):
    """Nested observations; episode k of seed k is terminated after 3 steps where k is odd, else truncated after 5."""

    observation_space = spaces.Dict(
        {
            "arm": spaces.Dict({"joint": spaces.Box(-9, 9, (2,), np.float64), "grip": spaces.Discrete(4)}),
            "goal": spaces.Tuple((spaces.Box(-9, 9, (3,), np.float32), spaces.Box(-9, 9, (2, 2), np.float32))),
            "said": spaces.Text(9),
        }
    )
    action_space = BOX

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.odd, self.at = bool((seed or 0) % 2), 0
        return self._now(), self._info()

    def _now(self) -> dict:
        arm = {"joint": self.np_random.normal(size=2), "grip": np.int64(self.at % 4)}
        goal = self.np_random.normal(size=3).astype(np.float32), np.full((2, 2), self.at, np.float32)
        return {"arm": arm, "goal": goal, "said": f"at{self.at}"}

    def _info(self) -> dict:
        return {"success": self.at > 2, "pose": {"angle": np.array([self.at, -self.at]) / 8}, "said": f"at{self.at}"}

    def step(self, action):
        self.at += 1
        reward = float(self.np_random.normal())
        return self._now(), reward, self.odd and self.at == 3, not self.odd and self.at == 5, self._info()


def write(name: str = "test/made-v0", action: spaces.Space = BOX, obs: spaces.Space = BOX, **changes: Any) -> Path:
    """Two good episodes of 3 and 2 steps, but for the changes of the first; return the folder."""
    rng = np.random.default_rng(0)

    def sample(space: spaces.Space, rows: int) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: sample(part, rows) for key, part in space.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(sample(part, rows) for part in space)
        if np.issubdtype(space.dtype, np.integer):
            return rng.integers(0, 4, (rows, *(space.shape or ()))).astype(space.dtype)
        return rng.uniform(-1, 1, (rows, *(space.shape or ()))).astype(space.dtype)

    buffers = [
        {
            "observations": sample(obs, steps + 1),
            "actions": sample(action, steps),
            "rewards": np.arange(steps, dtype=np.float64),
            "terminations": [False] * (steps - 1) + [True],
            "truncations": [False] * steps,
            "infos": {},
        }
        for steps in (3, 2)
    ]
    options = {key: changes.pop(key) for key in list(changes) if key in ("jpeg_encoding", "data_format")}
    buffers[0] |= changes
    made = [minari.data_collector.EpisodeBuffer(**buffer) for buffer in buffers]
    dataset = minari.create_dataset_from_buffers(name, made, action_space=action, observation_space=obs, **options)
    return dataset.storage.data_path.parent


def declare(folder: Path, **changes: object) -> Path:
    """Change what the metadata say; None takes it out."""
    file = folder / "data" / "metadata.json"
    metadata = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in metadata.items() if value is not None}))
    return folder


def refused(folder: Path, wanted: Wanted | None = None) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(DatasetError) as caught:
        source.load(folder, wanted or Wanted())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert np.asarray(a).dtype == np.asarray(b).dtype


def assert_same_as_minari(ours: Episodes, theirs: Any, names: dict[str, Callable[[Any], Any]]) -> None:
    """Equal to the bit and in type to minari's own iteration; `names` finds each observation in minari's."""
    assert len(ours) == len(theirs)
    assert set(ours.obs) == set(names)
    for i, episode in enumerate(theirs.iterate_episodes()):
        mine = ours[i]
        for name, find in names.items():
            rows = np.asarray(find(episode.observations))
            same(mine.obs[name], rows.reshape(len(rows), -1))
            assert len(rows) == len(mine) + 1
        same(mine.action, episode.actions)
        same(mine.reward, episode.rewards)
        assert (mine.terminated, mine.truncated) == (bool(episode.terminations[-1]), bool(episode.truncations[-1]))
        assert mine.has_final


NESTED: dict[str, Callable[[Any], Any]] = {
    "arm.joint": lambda obs: obs["arm"]["joint"],
    "arm.grip": lambda obs: obs["arm"]["grip"],
    "goal.0": lambda obs: obs["goal"][0],
    "goal.1": lambda obs: obs["goal"][1],
}


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_nested_observations_of_a_terminated_and_two_truncated_episodes_are_equal_number_for_number(
    collector, data_format
):
    if data_format != "hdf5":
        pytest.importorskip("pyarrow")
    env = Nested()
    if data_format != "hdf5":  # minari's arrow storage cannot write nested infos
        env._info = lambda: {"success": env.at > 2}  # type: ignore[method-assign]
    dataset = collector(env, "test/nested-v0", options={"data_format": data_format})
    ours = source.load_registered("test/nested-v0", Wanted())
    assert_same_as_minari(ours, dataset, NESTED)
    assert (ours.length.tolist(), ours.terminated.tolist()) == ([5, 3, 5], [False, True, False])
    assert ours.truncated.tolist() == [True, False, True]
    # The row of the reset is left out: row i is what step i told.
    same(ours.info["success"], np.array([0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1], dtype=bool))
    if data_format == "hdf5":
        assert set(ours.info) == {"success", "pose.angle"}
        same(ours[1].info["pose.angle"], np.array([[1, -1], [2, -2], [3, -3]]) / 8)


def test_pendulum_is_equal_and_tells_its_environment_authors_and_scores(collector, tmp_path):
    dataset = collector(
        gymnasium.make("Pendulum-v1", g=9.0, max_episode_steps=7),
        "pendulum/random-v3",
        eval_env="Pendulum-v1",
        author="someone",
        code_permalink="https://example.org/code",
        algorithm_name="random",
    )
    dataset.storage.update_metadata({"ref_min_score": -1200.5, "ref_max_score": -150})
    ours = source.load_registered("pendulum/random-v3", Wanted())
    assert_same_as_minari(ours, dataset, {"obs": lambda obs: obs})
    assert (ours.length.tolist(), ours.truncated.tolist(), ours.terminated.any()) == ([7] * 3, [True] * 3, False)
    assert ours.meta == {
        "source": "minari",
        "file": "random-v3",
        "dataset_id": "pendulum/random-v3",
        "minari_version": minari.__version__,
        "env_id": "Pendulum-v1",
        "env_kwargs": {"g": 9.0},
        "eval_env_id": "Pendulum-v1",
        "eval_env_kwargs": {},
        "author": ["someone"],
        "code_permalink": "https://example.org/code",
        "algorithm_name": "random",
        "ref_min_score": -1200.5,
        "ref_max_score": -150.0,
    }


def test_a_dataset_is_found_by_its_folder_and_by_its_data_and_other_folders_are_not(tmp_path):
    folder = write()
    assert source.recognises(folder)
    assert source.recognises(folder / "data")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.json").write_text("{}")
    for other in (tmp_path / "other", folder.parent, folder / "data" / "main_data.hdf5", tmp_path / "nowhere"):
        assert not source.recognises(other)
    same(source.load(folder, Wanted()).action, source.load(folder / "data", Wanted()).action)


def test_through_our_store_every_array_is_equal_whether_copied_or_filled_in_place(collector, tmp_path):
    collector(Nested(), "test/nested-v0")
    ours = source.load_registered("test/nested-v0", Wanted())
    store.save(ours, tmp_path / "copied")
    with store.writing(tmp_path / "filled") as folder:
        folder.finish(source.load_registered("test/nested-v0", Wanted(allocate=folder.allocate)))
    for copy in (store.load(tmp_path / "copied"), store.load(tmp_path / "filled")):
        assert_equal(copy, ours)
        assert dict(copy.meta) == dict(ours.meta)


def assert_equal(a: Episodes, b: Episodes) -> None:
    assert (set(a.obs), set(a.info)) == (set(b.obs), set(b.info))
    for name, array in a.arrays().items():
        same(array, b.arrays()[name])
    for name in ("length", "terminated", "truncated", "has_final"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name, array in a.info.items():
        same(array, b.info[name])


def make_episodes(names: dict[str, tuple[int, ...]], meta: dict[str, Any] | None = None, da: int = 2) -> Episodes:
    rng = np.random.default_rng(1)
    return from_list(
        [
            Episode(
                obs={name: rng.normal(size=(n + 1, *shape)).astype(np.float32) for name, shape in names.items()},
                action=rng.uniform(-1, 1, (n, da)).astype(np.float32),
                reward=rng.normal(size=n).astype(np.float32),
                terminated=i == 1,
                truncated=i != 1,
                info={"success": np.arange(n) > 1, "force.left": rng.normal(size=(n, 3))},
            )
            for i, n in enumerate((4, 3, 6))
        ],
        meta,
    )


@pytest.mark.parametrize("names", [{"obs": (3,)}, {"state": (3,)}, {"arm.joint": (2,), "goal": (3,), "obs": (1,)}])
def test_what_we_write_minari_reads_and_we_read_back_to_the_bit_with_its_names_and_provenance(names):
    written = make_episodes(names, {"actor": "me", "seed": 5, "env_id": "Nowhere-v7", "author": ["a", "b"]})
    source.save(written, "ours/some/thing-v1")
    dataset = minari.load_dataset("ours/some/thing-v1")
    for i, episode in enumerate(dataset.iterate_episodes()):
        for name, array in written[i].obs.items():
            same(episode.observations if names == {"obs": (3,)} else episode.observations[name], array)
        same(episode.actions, written[i].action)
        same(episode.rewards, written[i].reward)
        same(episode.infos["force.left"], written[i].info["force.left"])
        ending = np.arange(len(episode)) == len(episode) - 1
        same(episode.terminations, ending & (i == 1))
        same(episode.truncations, ending & (i != 1))
    assert (dataset.total_steps, dataset.env_spec) == (13, None)
    assert dataset.storage.metadata["author"] == {"a", "b"}
    assert list(minari.list_local_datasets()) == ["ours/some/thing-v1"]
    ours = source.load_registered("ours/some/thing-v1", Wanted())
    assert_equal(ours, written)
    assert {name: ours.meta[name] for name in ("actor", "seed", "env_id")} == {
        "actor": "me", "seed": 5, "env_id": "Nowhere-v7",
    }  # fmt: skip


def test_without_an_environment_the_spaces_are_boxes_of_the_data_and_actions_have_its_range():
    written = make_episodes({"obs": (3,)})
    source.save(written, "ours/boxes-v0")
    dataset = minari.load_dataset("ours/boxes-v0")
    assert dataset.observation_space == spaces.Box(-np.inf, np.inf, (3,), np.float32)
    assert dataset.action_space == spaces.Box(written.action.min(0), written.action.max(0), dtype=np.float32)
    assert dataset.spec.total_episodes == 3


def test_an_environment_that_holds_the_data_is_written_with_its_spaces_and_can_be_recovered():
    meta = {"env_id": "Pendulum-v1", "env_kwargs": {"g": 9.0}}
    source.save(make_episodes({"obs": (3,)}, meta, da=1), "pendulum/ours-v0")
    dataset = minari.load_dataset("pendulum/ours-v0")
    assert dataset.action_space == spaces.Box(-2, 2, (1,), np.float32)
    assert dataset.recover_environment().unwrapped.g == 9.0
    assert {k: v for k, v in source.load_registered("pendulum/ours-v0", Wanted()).meta.items() if k in meta} == meta
    source.save(make_episodes({"obs": (5,)}, meta, da=1), "pendulum/other-v0")  # of another size than the environment's
    assert minari.load_dataset("pendulum/other-v0").env_spec is None


class Arm(Nested):
    observation_space = spaces.Dict(
        {"arm": spaces.Dict({"a": BOX, "b": spaces.Box(-9, 9, (2, 2), np.float32)}), "t": spaces.Tuple((BOX,))}
    )


def test_observations_are_hung_into_the_structure_of_a_nested_environment(monkeypatch):
    spec = gymnasium.envs.registration.EnvSpec("Arm-v0", f"{__name__}:Arm")
    monkeypatch.setitem(gymnasium.registry, "Arm-v0", spec)
    written = make_episodes({"arm.a": (2,), "arm.b": (4,), "t.0": (2,)}, {"env_id": "Arm-v0"})
    source.save(written, "ours/arm-v0")
    episode = next(minari.load_dataset("ours/arm-v0").iterate_episodes())
    same(episode.observations["arm"]["b"], written[0].obs["arm.b"].reshape(-1, 2, 2))
    same(episode.observations["t"][0], written[0].obs["t.0"])
    assert_equal(source.load_registered("ours/arm-v0", Wanted()), written)


def test_an_environments_name_that_would_import_a_module_is_not_looked_up_when_writing(monkeypatch):
    monkeypatch.setitem(sys.modules, "innocent", None)
    asked: list[str] = []
    monkeypatch.setattr(gymnasium, "spec", asked.append)
    source.save(make_episodes({"obs": (3,)}, {"env_id": "innocent:Pendulum-v1"}), "ours/colon-v0")
    assert asked == []


def test_episodes_whose_last_observation_is_unknown_stay_so_for_us():
    written = make_episodes({"obs": (3,)})
    written.has_final[1] = False  # type: ignore[index]
    source.save(written, "ours/imitation-v0")
    assert source.load_registered("ours/imitation-v0", Wanted()).has_final.tolist() == [True, False, True]


def test_an_existing_id_is_refused_and_left_as_it_was(registry):
    source.save(make_episodes({"obs": (3,)}), "ours/one-v0")
    before = (registry / "ours/one-v0/data/main_data.hdf5").read_bytes()
    with pytest.raises(DatasetError, match=r"minari:ours/one-v0 exists at .*; give it another version"):
        source.save(make_episodes({"obs": (4,)}), "ours/one-v0")
    assert (registry / "ours/one-v0/data/main_data.hdf5").read_bytes() == before


@pytest.mark.parametrize("failing", ["update_episodes", "update_metadata"])
def test_a_failure_while_writing_leaves_nothing(registry, monkeypatch, failing):
    from minari.dataset._storages.hdf5_storage import HDF5Storage

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(HDF5Storage, failing, full)
    with pytest.raises(OSError, match="No space left"):
        source.save(make_episodes({"obs": (3,)}), "one-v0")
    assert list(registry.iterdir()) == []


@pytest.mark.parametrize("name", ["../../elsewhere-v0", "noversion", "", "a b-v0", "/etc/x-v0"])
def test_a_malformed_id_is_refused_for_reading_and_writing(name):
    for act in (
        lambda: source.save(make_episodes({"obs": (3,)}), name),
        lambda: source.load_registered(name, Wanted()),
    ):
        with pytest.raises(DatasetError, match="is no id of Minari; wanted one such as D4RL/door/human-v2"):
            act()


def test_a_name_that_cannot_stand_in_the_file_is_refused():
    with pytest.raises(DatasetError, match="the array name 'a/b' cannot stand in a file of Minari; rename it"):
        source.save(make_episodes({"a/b": (3,)}), "ours/slash-v0")


def test_a_dataset_that_cannot_be_downloaded_names_the_command_that_does(monkeypatch):
    def offline(name: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(minari, "download_dataset", offline)
    with pytest.raises(DatasetError) as caught:
        source.load_registered("D4RL/door/human-v2", Wanted())
    assert str(caught.value) == (
        "the dataset D4RL/door/human-v2 is not on this machine and could not be downloaded (no route); check its id, "
        "or run minari download D4RL/door/human-v2 where there is a network"
    )


def test_a_dataset_that_is_not_there_is_downloaded(monkeypatch):
    monkeypatch.setattr(minari, "download_dataset", lambda name: write(name))
    assert source.load_registered("test/far-v0", Wanted()).length.tolist() == [3, 2]


def test_without_the_package_the_extra_is_named(monkeypatch):
    folder = write()
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diffpolicy\[minari\]'"):
        source.load(folder, Wanted())


def test_without_spaces_minari_executes_what_the_file_names_and_we_refuse(tmp_path):
    folder, mark = write(), tmp_path / "executed"
    spec = {"id": "Some-v0", "entry_point": "os:mkdir", "kwargs": {"path": str(mark)}, "additional_wrappers": []}
    declare(folder, observation_space=None, env_spec=json.dumps(spec))
    assert refused(folder) == (
        "its metadata hold no observation_space, and the environment that a file names is not executed to ask; write "
        "the dataset again with its spaces"
    )
    assert not mark.exists()
    with pytest.raises(Exception):  # noqa: B017 - a folder is no environment
        minari.MinariDataset(folder / "data")
    assert mark.exists()


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (spaces.Discrete(4), "its actions are Discrete(4); wanted continuous ones: discrete actions are not supported"),
        (spaces.MultiDiscrete([3, 4]), "discrete actions are not supported"),
        (spaces.Box(0, 255, (2,), np.uint8), "discrete actions are not supported"),
        (spaces.Dict({"a": BOX, "b": BOX}), "its actions are a Dict of 2 parts; wanted one Box: flattened, a policy's"),
        (spaces.Tuple((BOX, BOX)), "its actions are a Tuple of 2 parts; wanted one Box"),
    ],
)
def test_actions_that_are_no_continuous_box_are_refused_with_the_reason(action, told):
    assert told in refused(write(action=action))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"total_steps": 6}, "its episodes have 5 steps and its metadata say 6; wanted as many: copy it again"),
        ({"total_steps": 10**12}, "its episodes have 5 steps and its metadata say 1000000000000"),
        ({"total_episodes": 3}, "lacks /episode_2"),
        ({"total_episodes": 0}, "its metadata say total_episodes is 0; wanted a whole number of at least 1"),
        ({"total_episodes": "2"}, "its metadata say total_episodes is '2'"),
        ({"total_episodes": None}, "its metadata say total_episodes is None"),
        ({"data_format": "pickle"}, "its data_format is 'pickle'; wanted one of arrow, hdf5, parquet"),
        ({"minari_version": "9.0.0"}, "it was written by minari 9.0.0; the one installed reads 0.4.0 to"),
        ({"action_space": "{"}, "metadata.json: action_space cannot be read"),
        ({"action_space": '{"type": "Graph"}'}, "metadata.json: action_space cannot be read"),
        ({"env_spec": "{}"}, "metadata.json: env_spec cannot be read ('id')"),
        ({"diffpolicy": {"unknown_final": [7]}}, "its metadata name episodes [7]... without a last observation"),
        (
            {"observation_space": '{"type": "Box", "dtype": "float32", "shape": [9999, 9999], "low": 0, "high": 1}'},
            "its metadata declare a space of shape [9999, 9999] without its bounds",
        ),
    ],
)
def test_metadata_that_cannot_be_right_are_refused(changes, told):
    assert told in refused(declare(write(), **changes))


def test_metadata_that_are_no_json_are_refused():
    folder = write()
    (folder / "data" / "metadata.json").write_text('{"data_format": "hdf5", ')
    assert "the metadata cannot be read" in refused(folder)


@pytest.mark.parametrize("keep", [0, 8, 3000, -100])
def test_a_file_that_is_cut_short_is_refused(keep):
    folder = write()
    file = folder / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:keep])
    assert "cannot be read as HDF5, it may be cut short" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"observations": np.ones((3, 2), np.float32)}, "/episode_0/observations has 3 rows; wanted 4"),
        ({"actions": np.ones((4, 2), np.float32)}, "/episode_0/actions has 4 rows; wanted 3"),
        ({"actions": np.ones((3, 3), np.float32)}, "/episode_0/actions has rows of (3,) and its space says (2,)"),
        ({"observations": {"a": np.ones((4, 2))}}, "/episode_0/observations is not an array of numbers"),
        ({"rewards": np.ones((3, 2))}, "/episode_0/rewards has shape (3, 2); wanted one number a step"),
        ({"terminations": [False] * 2}, "/episode_0/terminations has 2 rows; wanted 3"),
        ({"actions": np.full((3, 2), np.nan, np.float32)}, "action holds nan in row 0; wanted finite numbers"),
        ({"terminations": [False, True, False]}, "episode 0 is terminated at step 1 of 3 and goes on; split it there"),
    ],
)
def test_arrays_that_disagree_are_refused(changes, told):
    assert told in refused(write(jpeg_encoding=False, **changes))


def external(group: h5py.Group, other: Path) -> None:
    group["actions"] = h5py.ExternalLink(str(other), "/x")


def soft(group: h5py.Group, other: Path) -> None:
    group["infos/x"] = h5py.SoftLink("/elsewhere")


def virtual(group: h5py.Group, other: Path) -> None:
    layout = h5py.VirtualLayout((3, 2), "f4")
    layout[:] = h5py.VirtualSource(str(other), "x", (3, 2))
    group.create_virtual_dataset("actions", layout)


def virtual_info(group: h5py.Group, other: Path) -> None:
    layout = h5py.VirtualLayout((3,), "S4")
    layout[:] = h5py.VirtualSource(str(other), "x", (3,))
    group.create_virtual_dataset("infos/x", layout)


def opaque(group: h5py.Group, other: Path) -> None:
    group["infos"].create_dataset("x", data=np.zeros(3, np.void(b"pickle").dtype))


def unwritten(group: h5py.Group, other: Path) -> None:
    group.create_dataset("actions", (3, 2), "f4")


def unwritten_info(group: h5py.Group, other: Path) -> None:
    group["infos"].create_dataset("x", (10**12,), "f8", chunks=(10**6,))


def unwritten_texts(group: h5py.Group, other: Path) -> None:
    group["infos"].create_dataset("x", (10**12,), h5py.string_dtype(), chunks=(10**6,))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (external, "actions points into another file; wanted one whole file"),
        (soft, "infos/x is no array of this file; wanted one whole file"),
        (virtual, "actions keeps its numbers in other files; wanted one whole file"),
        (virtual_info, "infos/x is no array of this file; wanted one whole file"),
        (opaque, "infos/x holds neither numbers nor text"),
        (unwritten, "actions declares (3, 2) and was never written"),
        (unwritten_info, "infos/x has 0 of its 1000000 chunks"),
        (unwritten_texts, "infos/x has 1000000000000 texts for 3 steps"),
    ],
)
def test_what_leads_out_of_the_file_or_was_never_written_is_refused_before_minari_reads_it(tmp_path, change, told):
    folder = write(infos={})
    with h5py.File(tmp_path / "other.hdf5", "w") as other:
        other["x"] = np.zeros((3, 2), np.float32)
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        group = file["episode_0"]
        group.require_group("infos")
        if change in (external, virtual, unwritten):
            del group["actions"]
        change(group, tmp_path / "other.hdf5")
    assert told in refused(folder)


def test_a_dataset_above_the_memory_limit_is_refused_before_an_array_is_made():
    assert "the dataset declares 1.36e-07 GB" in refused(write(), Wanted(allocate=in_memory(100)))


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (Wanted(part="train"), "part 'train' was asked for; a Minari dataset has no named parts"),
        (Wanted(task="x"), "task 'x' was asked for; a Minari dataset has its own rewards"),
        (Wanted(obs=["x"]), "there is no observation 'x'; the dataset has ['obs']"),
    ],
)
def test_what_a_minari_dataset_does_not_have_is_refused(wanted, told):
    assert told in refused(write(), wanted)


def test_only_the_observations_that_are_named_are_read():
    folder = write(obs=spaces.Dict({"a": BOX, "b": BOX}))
    assert set(source.load(folder, Wanted(obs=["b"])).obs) == {"b"}


def test_two_observations_of_one_dotted_name_are_refused():
    folder = write(obs=spaces.Dict({"a": spaces.Dict({"b": BOX}), "a.b": BOX}))
    assert refused(folder) == "two of its arrays would both be called 'a.b'; rename one"


IMAGE, GREY = (spaces.Box(0, 255, shape, np.uint8) for shape in ((32, 40, 3), (32, 40)))


@pytest.mark.parametrize("jpeg", [True, False])
def test_images_are_read_where_named_as_minari_unpacks_them(jpeg):
    folder = write(obs=spaces.Dict({"camera": IMAGE, "grey": GREY, "state": BOX}), jpeg_encoding=jpeg)
    assert set(source.load(folder, Wanted()).obs) == {"state"}
    ours = source.load(folder, Wanted(obs=["camera", "grey"]))
    for i, episode in enumerate(minari.MinariDataset(folder / "data").iterate_episodes()):
        for name in ("camera", "grey"):
            same(ours[i].obs[name], episode.observations[name])
            assert ours.obs[name].dtype == np.uint8


def test_packed_images_of_another_size_than_declared_are_refused_before_they_are_unpacked():
    folder = write(obs=IMAGE)
    space = json.dumps({"type": "Box", "dtype": "uint8", "shape": [32, 32, 3], "low": np.zeros((32, 32, 3)).tolist(),
                        "high": np.full((32, 32, 3), 255).tolist()})  # fmt: skip
    declare(folder, observation_space=space)
    told = refused(folder, Wanted(obs=["obs"]))
    assert "/episode_0/observations has images of 32 x 40 and its space says (32, 32, 3)" in told


def test_images_that_are_no_bytes_are_refused():
    folder = write(obs=spaces.Box(0, 1, (4, 4, 3), np.float32))
    assert "the images 'obs' have type float32; wanted uint8, 0 to 255" in refused(folder, Wanted(obs=["obs"]))


def test_an_episode_that_ends_with_neither_flag_counts_as_truncated():
    data = source.load(write(terminations=[False] * 3), Wanted())
    assert (data.terminated.tolist(), data.truncated.tolist()) == ([False, True], [True, False])


def test_an_episode_that_ends_with_both_flags_keeps_both():
    data = source.load(write(truncations=[False, False, True]), Wanted())
    assert (data.terminated.tolist(), data.truncated.tolist()) == ([True, True], [True, False])


def test_infos_that_not_every_episode_has_are_left_out():
    assert source.load(write(infos={"x": np.arange(3.0)}), Wanted()).info == {}
