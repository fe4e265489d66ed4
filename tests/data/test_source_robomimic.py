"""robomimic's layout, as its documentation describes it: files written here, and what is refused."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from diffpolicy.data import store
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.sources import load
from diffpolicy.data.sources.reading import Wanted
from diffpolicy.data.sources.robomimic import load as load_wanted
from diffpolicy.errors import DatasetError

ENV_ARGS = {
    "env_name": "Lift",
    "type": 1,
    "env_kwargs": {"control_freq": 20, "controller_configs": {"type": "OSC_POSE", "control_delta": True}},
}
LENGTHS = {"demo_10": 2, "demo_2": 3, "demo_0": 4}
Arrays = dict[str, np.ndarray]


def make_demo(number: int, steps: int) -> Arrays:
    """Demonstration of which every value tells its number and step; done at the last step."""
    row = 100 * number + np.arange(steps, dtype=np.float64)
    obs = {"eef": np.stack([row, -row], axis=1), "gripper": row.astype(np.float32)}
    return {
        "actions": np.stack([row / 1000, row / 2000, -row / 1000], axis=1),
        "rewards": row,
        "dones": np.arange(steps) == steps - 1,
        "states": np.ones((steps, 7)),
        **{f"obs/{name}": array for name, array in obs.items()},
        **{f"next_obs/{name}": np.concatenate([array[1:], array[-1:] + 0.5]) for name, array in obs.items()},
    }


def make_demos() -> dict[str, Arrays]:
    return {name: make_demo(int(name[5:]), steps) for name, steps in LENGTHS.items()}


def write(
    path: Path,
    demos: Mapping[str, Mapping[str, object]] | None = None,
    masks: Mapping[str, object] | None = None,
    **attributes: object,
) -> Path:
    """A file in robomimic's layout; None leaves an array or an attribute out."""
    demos = make_demos() if demos is None else demos
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        counts = {}
        for name, arrays in demos.items():
            demo = data.create_group(name)
            for key, array in arrays.items():
                if array is not None:
                    demo[key] = array
            counts[name] = len(np.atleast_1d(arrays.get("actions", [])))  # type: ignore[arg-type]
            demo.attrs["num_samples"] = counts[name]
        known = {"total": sum(counts.values()), "env_args": json.dumps(ENV_ARGS), **attributes}
        data.attrs.update({key: value for key, value in known.items() if value is not None})
        for name, value in (masks or {}).items():
            file[f"mask/{name}"] = value
    return path


def without(*keys: str) -> dict[str, Arrays]:
    return {n: {k: a for k, a in d.items() if not k.startswith(keys)} for n, d in make_demos().items()}


def changed(demo: str, key: str, array: object) -> dict[str, dict[str, object]]:
    """The good demonstrations but for one array."""
    demos: dict[str, dict[str, object]] = {name: dict(arrays) for name, arrays in make_demos().items()}
    demos[demo][key] = array
    return demos


def expected() -> Episodes:
    """The same content, episode by episode."""
    episodes = []
    for name in ("demo_0", "demo_2", "demo_10"):
        d = make_demo(int(name[5:]), LENGTHS[name])
        obs = {k: np.concatenate([d[f"obs/{k}"], d[f"next_obs/{k}"][-1:]]) for k in ("eef", "gripper")}
        obs["gripper"] = obs["gripper"][:, None]
        mask = {"mask": ~d["dones"]}
        episodes.append(Episode(obs, d["actions"], d["rewards"], terminated=True, truncated=False, info=mask))
    return from_list(episodes)


def assert_same(a: Episodes, b: Episodes) -> None:
    assert a.arrays().keys() == b.arrays().keys()
    assert a.info.keys() == b.info.keys()
    for name in ("length", "terminated", "truncated", "has_final"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for x, y in zip([*a.arrays().values(), *a.info.values()], [*b.arrays().values(), *b.info.values()], strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_demonstrations_0_2_10_come_by_number_and_equal_the_same_content_through_our_store(tmp_path):
    store.save(expected(), tmp_path / "store")
    data = load(write(tmp_path / "demos.hdf5"))
    assert data.length.tolist() == [4, 3, 2]
    assert data.reward.tolist() == [0, 1, 2, 3, 200, 201, 202, 1000, 1001]
    assert_same(data, load(tmp_path / "store"))
    assert_same(data, expected())


def test_written_into_a_store_block_by_block_it_is_the_same(tmp_path):
    path = write(tmp_path / "demos.hdf5")
    with store.writing(tmp_path / "store") as folder:
        folder.finish(load_wanted(path, replace(Wanted(), allocate=folder.allocate)))
    assert_same(load(tmp_path / "store"), load(path))


@pytest.mark.parametrize("dtype", ["S", object])
def test_the_part_valid_holds_2_demonstrations_by_number(tmp_path, dtype):
    named = [np.array(["demo_10", "demo_0"]).astype(dtype), np.array(["demo_2"]).astype(dtype)]
    path = write(tmp_path / "demos.hdf5", masks=dict(zip(("valid", "train"), named, strict=True)))
    data = load(path, part="valid")
    assert data.length.tolist() == [4, 2]
    assert data.meta["part"] == "valid"
    assert load(path, part="train").reward.tolist() == [200, 201, 202]
    assert len(load(path)) == 3


def test_without_next_obs_the_last_observation_is_repeated_and_not_called_final(tmp_path):
    data = load(write(tmp_path / "demos.hdf5", without("next_obs")))
    assert data.obs["gripper"][:5, 0].tolist() == [0, 1, 2, 3, 3]
    assert data.has_final is not None
    assert not data.has_final.any()


def test_next_obs_in_2_of_3_demonstrations_do_not_make_any_last_observation_final(tmp_path):
    demos = make_demos() | {"demo_2": without("next_obs")["demo_2"]}
    data = load(write(tmp_path / "demos.hdf5", demos))
    assert data.has_final is not None
    assert not data.has_final.any()


def test_dones_before_the_end_are_kept_as_a_mask_and_only_the_last_one_ends_the_task(tmp_path):
    demos = make_demos()
    demos["demo_0"]["dones"] = np.array([0, 1, 1, 1])  # the demonstrator stops 2 steps after the success
    demos["demo_2"]["dones"] = np.array([0, 1, 0])
    data = load(write(tmp_path / "demos.hdf5", demos))
    assert data.terminated.tolist() == [True, False, True]
    assert data.truncated.tolist() == [False, True, False]
    assert data.info["mask"].tolist() == [True, False, False, False, True, False, True, True, False]
    assert data.meta["masked_steps"] == 3


def test_without_rewards_and_dones_nothing_is_known_of_the_task(tmp_path):
    data = load(write(tmp_path / "demos.hdf5", without("rewards", "dones")))
    assert not data.reward.any()
    assert (data.terminated.any(), data.truncated.all(), dict(data.info)) == (False, True, {})
    assert data.meta["rewards"] == "none recorded"


def test_images_keep_their_shape_and_are_read_only_when_named(tmp_path):
    demos = make_demos()
    for name, steps in LENGTHS.items():
        image = np.arange(steps * 12, dtype=np.uint8).reshape(steps, 2, 2, 3)
        demos[name] |= {"obs/camera": image, "next_obs/camera": image + 1}
    path = write(tmp_path / "demos.hdf5", demos)
    assert list(load(path).obs) == ["eef", "gripper"]
    camera = load(path, obs=["camera"]).obs["camera"]
    assert (camera.shape, camera.dtype) == ((12, 2, 2, 3), np.uint8)
    np.testing.assert_array_equal(camera[4], demos["demo_0"]["obs/camera"][-1] + 1)


def test_the_metadata_name_the_environment_20_hertz_and_delta_actions(tmp_path):
    assert load(write(tmp_path / "lift.hdf5")).meta == {
        "source": "robomimic-hdf5",
        "file": "lift.hdf5",
        "env_id": "Lift",
        "env_kwargs": ENV_ARGS["env_kwargs"],
        "env_type": "robosuite",
        "control_period": 0.05,
        "control_delta": True,
    }


@pytest.mark.parametrize(
    ("config", "delta"),
    [
        ({"control_delta": False}, False),
        ([{"control_delta": False}, {"control_delta": True}], True),
        ({"type": "BASIC", "body_parts": {"right": {"type": "OSC_POSE", "input_type": "delta"}}}, True),
        ({"type": "BASIC", "body_parts": {"right": {"type": "OSC_POSE", "input_type": "absolute"}}}, False),
        ({"type": "JOINT_VELOCITY"}, None),
        (None, None),
    ],
)
def test_both_generations_of_controllers_tell_whether_actions_are_deltas(tmp_path, config, delta):
    arguments = {"env_name": "Lift", "type": 1, "env_kwargs": {"controller_configs": config}}
    meta = load(write(tmp_path / "demos.hdf5", env_args=json.dumps(arguments))).meta
    assert meta.get("control_delta") is delta
    assert "control_period" not in meta


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ({"type": 1}, "robosuite"),
        ({"type": 2}, "gym"),
        ({"type": 4}, "4"),
        ({"env_type": 2}, "gym"),
        ({"type": 1, "env_type": 2}, "robosuite"),
        ({}, None),
    ],
)
def test_the_kind_of_environment_is_read_as_robomimic_serialises_it_and_by_its_former_name(tmp_path, given, known):
    path = write(tmp_path / "demos.hdf5", env_args=json.dumps({"env_name": "Lift", "env_kwargs": {}, **given}))
    assert load(path).meta.get("env_type") == known


LIBERO_ATTRIBUTES = {
    "bddl_file_name": "libero/bddl_files/open_the_drawer.bddl",
    "macros_image_convention": "opengl",
    "env_args": json.dumps({"type": 1, "env_name": "Libero_Tabletop", "env_kwargs": {"control_freq": 20}}),
}
LEFT_OUT = 5


class Adder:
    """An environment whose observation is the sum of all actions so far."""

    def __init__(self) -> None:
        self.sum = np.zeros(2)

    def step(self, action: np.ndarray) -> np.ndarray:
        self.sum = self.sum + action
        return self.sum


def played_by_libero(actions: np.ndarray) -> Arrays:
    """A demonstration as the loop of LIBERO's create_dataset.py appends it."""
    env, kept, sums = Adder(), [], []
    for j, action in enumerate(actions):
        obs = env.step(action)
        if j < LEFT_OUT:
            continue
        kept.append(j)
        sums.append(obs)
    last = (np.arange(len(kept)) == len(kept) - 1).astype(np.uint8)
    seen = {"obs/sum": np.stack(sums), "obs/image": np.stack([np.full((2, 2, 3), j, np.uint8) for j in kept])}
    return {"actions": actions[kept], "rewards": last, "dones": last, "states": np.ones((len(kept), 7)), **seen}


def libero_demos(**lengths: int) -> tuple[dict[str, np.ndarray], dict[str, Arrays]]:
    """Actions in whole numbers, so that sums are exact, and the demonstrations LIBERO makes of them."""
    rng = np.random.default_rng(0)
    actions = {name: rng.integers(-9, 9, size=(steps, 2)).astype(np.float64) for name, steps in lengths.items()}
    return actions, {name: played_by_libero(array) for name, array in actions.items()}


def test_in_a_libero_file_each_action_leads_from_its_observation_to_the_next_and_the_last_one_is_final(tmp_path):
    actions, demos = libero_demos(demo_0=12, demo_1=9)
    data = load(write(tmp_path / "libero.hdf5", demos, **LIBERO_ATTRIBUTES), obs=["sum", "image"])
    assert data.length.tolist() == [6, 3]  # 7 and 4 rows
    for i, name in enumerate(demos):
        episode, whole = data[i], actions[name]
        np.testing.assert_array_equal(episode.obs["sum"][0], whole[: LEFT_OUT + 1].sum(axis=0))
        np.testing.assert_array_equal(np.diff(episode.obs["sum"], axis=0), episode.action)
        np.testing.assert_array_equal(episode.obs["sum"][-1], whole.sum(axis=0))
        np.testing.assert_array_equal(episode.action, whole[LEFT_OUT + 1 :])
        assert episode.obs["image"][:, 0, 0, 0].tolist() == list(range(LEFT_OUT, len(whole)))
    assert data.reward.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1]
    assert data.info["mask"].tolist() == [True] * 5 + [False] + [True] * 2 + [False]
    assert data.has_final is not None
    assert (data.terminated.all(), data.truncated.any(), data.has_final.all()) == (True, False, True)
    assert data.meta["aligned"] == "LIBERO: observations follow their actions, each episode's first action left out"
    assert (data.meta["env_type"], data.meta["control_period"]) == ("robosuite", 0.05)


def test_dones_and_rewards_of_a_libero_file_stay_with_their_actions(tmp_path):
    _, demos = libero_demos(demo_0=10)
    demos["demo_0"] |= {"rewards": np.array([9, 1, 2, 3, 4]), "dones": np.array([1, 0, 1, 0, 0])}
    data = load(write(tmp_path / "libero.hdf5", demos, **LIBERO_ATTRIBUTES))
    np.testing.assert_array_equal(data.action, demos["demo_0"]["actions"][1:])
    assert data.reward.tolist() == [1, 2, 3, 4]
    assert data.info["mask"].tolist() == [True, False, True, True]
    assert (data.terminated.tolist(), data.truncated.tolist()) == ([False], [True])


def test_a_libero_file_read_row_by_row_into_a_store_is_the_same_and_so_is_a_part_of_it(tmp_path, monkeypatch):
    _, demos = libero_demos(demo_0=12, demo_1=9, demo_2=10)
    masks = {"valid": np.array([b"demo_2", b"demo_0"])}
    path = write(tmp_path / "libero.hdf5", demos, masks, **LIBERO_ATTRIBUTES)
    whole = load(path)
    assert_same(load(path, part="valid"), whole.select([0, 2]))
    monkeypatch.setattr("diffpolicy.data.sources.reading.BLOCK_BYTES", 1)
    with store.writing(tmp_path / "store") as folder:
        folder.finish(load_wanted(path, replace(Wanted(), allocate=folder.allocate)))
    assert_same(load(tmp_path / "store"), whole)


def test_a_libero_file_takes_the_memory_of_its_rows_but_the_first_actions(tmp_path):
    _, demos = libero_demos(demo_0=12, demo_1=9)
    path = write(tmp_path / "libero.hdf5", demos, **LIBERO_ATTRIBUTES)
    rows, actions = 7 + 4, 6 + 3
    needed = rows * 2 * 8 + actions * (2 * 8 + 1 + 1)
    assert load(path, max_bytes=needed).steps == actions
    with pytest.raises(DatasetError, match="may be taken"):
        load(path, max_bytes=needed - 1)


def test_a_libero_demonstration_of_one_row_is_refused_unless_the_part_is_without_it(tmp_path):
    _, demos = libero_demos(demo_0=12, demo_1=6)
    path = write(tmp_path / "libero.hdf5", demos, {"long": np.array([b"demo_0"])}, **LIBERO_ATTRIBUTES)
    assert refused(path) == (
        "PATH: data/demo_1 has 1 step, and LIBERO records no observation before the first; wanted at least 2: leave it "
        "out"
    )
    assert load(path, part="long").length.tolist() == [6]


@pytest.mark.parametrize("missing", ["bddl_file_name", "macros_image_convention"])
def test_without_one_of_liberos_attributes_observations_come_before_their_actions_as_in_robomimic(tmp_path, missing):
    _, demos = libero_demos(demo_0=12)
    data = load(write(tmp_path / "demos.hdf5", demos, **{**LIBERO_ATTRIBUTES, missing: None}))
    np.testing.assert_array_equal(data.obs["sum"][:-1], demos["demo_0"]["obs/sum"])
    np.testing.assert_array_equal(data.action, demos["demo_0"]["actions"])
    assert data.has_final is not None
    assert ("aligned" in data.meta, data.has_final.any()) == (False, False)


def test_a_file_with_liberos_attributes_and_next_obs_says_itself_what_came_before_and_after(tmp_path):
    data = load(write(tmp_path / "demos.hdf5", **LIBERO_ATTRIBUTES))
    assert_same(data, expected())
    assert "aligned" not in data.meta


def converted_from_d4rl(path: Path, repeated: bool = True, **arguments: object) -> Path:
    """As robomimic's convert_d4rl.py writes a timeout: a done, and the last observation again."""
    demos = {}
    for name, demo in make_demos().items():
        rows = demo["obs/eef"]
        after = np.concatenate([rows[1:], rows[-1:] if repeated else rows[-1:] + 1])
        demos[name] = {**{key: demo[key] for key in ("actions", "rewards", "dones")}, "obs/flat": rows}
        demos[name]["next_obs/flat"] = after
    return write(path, demos, env_args=json.dumps({"env_name": "hopper-medium-v2", "type": 2, **arguments}))


def test_a_file_of_robomimics_convert_d4rl_warns_that_its_ends_may_be_timeouts(tmp_path):
    path = converted_from_d4rl(tmp_path / "hopper.hdf5")
    with pytest.warns(UserWarning, match=r"hopper\.hdf5: every episode ends with a done .* read D4RL's own file"):
        data = load(path)
    assert data.terminated.all()


def test_a_file_whose_last_observations_are_true_or_of_another_simulator_comes_without_that_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(converted_from_d4rl(tmp_path / "true.hdf5", repeated=False))
        load(converted_from_d4rl(tmp_path / "robosuite.hdf5", type=1))


def test_without_env_args_and_counts_the_arrays_speak_for_themselves(tmp_path):
    path = write(tmp_path / "demos.hdf5", env_args=None, total=None)
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            del demo.attrs["num_samples"]
    assert load(path).meta == {"source": "robomimic-hdf5", "file": "demos.hdf5"}


def test_more_than_the_memory_that_may_be_taken_is_refused_before_it_is_taken(tmp_path):
    with pytest.raises(DatasetError, match="may be taken; convert it to a store"):
        load(write(tmp_path / "demos.hdf5"), max_bytes=400)


def refused(path: Path, **asked: object) -> str:
    """The one line with which loading is refused, without the path that it must contain."""
    with pytest.raises(DatasetError) as caught:
        load(path, **asked)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "PATH")


@pytest.mark.parametrize(
    ("demos", "message"),
    [
        ({}, "PATH has zero demonstrations in its group data; wanted"),
        ({"episode_0": make_demo(0, 2)}, "PATH: data holds 'episode_0'; wanted demonstrations named demo_0, demo_1"),
        ({"demo_1e9": make_demo(0, 2)}, "data holds 'demo_1e9'"),
        (without("obs", "next_obs"), "data/demo_0 has no observations, only the simulator's states; extract them with"),
        (without("actions"), "PATH lacks /data/demo_0/actions; wanted"),
        (changed("demo_2", "rewards", None), "a row of data/demo_2/rewards is absent and one of demo_0 ();"),
        (changed("demo_2", "dones", None), "a row of data/demo_2/dones is absent and one of demo_0 ();"),
        (changed("demo_2", "obs/eef", None), "PATH lacks /data/demo_2/obs/eef"),
        (
            changed("demo_2", "next_obs/eef", np.ones((3, 3))),
            "data/demo_2/next_obs/eef has shape (3, 3); wanted (3, 2)",
        ),
        (
            changed("demo_2", "obs/gripper", np.ones((3, 2))),
            "next_obs/gripper has shape (3,); wanted (3, 2), as in obs",
        ),
        (changed("demo_2", "actions", np.ones((3, 4))), "a row of data/demo_2/actions is (4,) and one of demo_0 (3,);"),
        (changed("demo_2", "rewards", np.ones(4)), "/data/demo_2/rewards has 4 rows; wanted 3, one an action"),
        (
            changed("demo_2", "rewards", np.ones((3, 2))),
            "data/demo_2/rewards has shape (3, 2); wanted one number a step",
        ),
        (changed("demo_2", "obs/eef", np.ones((2, 2))), "/data/demo_2/obs/eef has 2 rows; wanted 3, one an action"),
        (changed("demo_2", "obs/eef", np.array([b"a"] * 3)), "/data/demo_2/obs/eef is not an array of numbers"),
        (changed("demo_2", "actions", np.full((3, 3), np.nan)), "action holds nan in row 4; wanted finite numbers"),
        (changed("demo_10", "actions", np.ones((0, 3))), "data/demo_10 has 0 steps; wanted at least 1: leave it out"),
        ({"demo_0": {**make_demo(0, 2), "actions": np.ones((2, 1), int)}}, "discrete action spaces are not supported"),
    ],
)
def test_demonstrations_that_cannot_be_right_are_refused(tmp_path, demos, message):
    assert message in refused(write(tmp_path / "demos.hdf5", demos))


def test_a_file_with_something_else_than_a_group_data_is_refused(tmp_path):
    with h5py.File(tmp_path / "demos.hdf5", "w") as file:
        file["data"] = np.ones(3)
    assert refused(tmp_path / "demos.hdf5").startswith("PATH: /data is not a group; wanted robomimic's")


@pytest.mark.parametrize("lie", [8, 10, -9, 9.5, "nine", [9, 9], 10**18])
def test_a_total_that_is_not_the_9_actions_there_are_is_refused(tmp_path, lie):
    message = refused(write(tmp_path / "demos.hdf5", total=lie))
    assert message == f"PATH: /data declares total {lie!r} and has 9 actions; wanted as many: write it again"


def test_num_samples_that_are_not_the_actions_there_are_are_refused(tmp_path):
    path = write(tmp_path / "demos.hdf5")
    with h5py.File(path, "a") as file:
        file["data/demo_2"].attrs["num_samples"] = 2
    assert "/data/demo_2 declares num_samples 2 and has 3 actions" in refused(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "its attribute env_args cannot be read (Expecting property name"),
        ("[]", "its attribute env_args cannot be read ("),
        ('{"env_type": 1}', "its attribute env_args cannot be read ('env_name')"),
        ('{"env_name": "Lift", "env_kwargs": 3}', "its attribute env_args cannot be read ("),
        ('{"env_name": "Lift", "env_kwargs": {"control_freq": 0}}', "(control_freq is 0, wanted a number above 0)"),
        (
            '{"env_name": "Lift", "env_kwargs": {"control_freq": "20"}}',
            "(control_freq is '20', wanted a number above 0)",
        ),
        ("[" * 100_000, "its attribute env_args cannot be read ("),
        (np.arange(3), "its attribute env_args cannot be read ("),
    ],
)
def test_env_args_that_cannot_be_read_are_refused(tmp_path, text, message):
    path = write(tmp_path / "demos.hdf5", env_args=None)
    with h5py.File(path, "a", libver="latest") as file:
        file["data"].attrs["env_args"] = text if isinstance(text, np.ndarray) else text[:60_000]
    assert message in refused(path)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.array([b"demo_0", b"demo_7"]), "mask/train names 'demo_7', which data does not have; write it again"),
        (np.array([b"demo_0/obs"]), "mask/train names 'demo_0/obs', which data does not have"),
        (np.array([b"demo_0", b"demo_0"]), "mask/train names a demonstration twice, or none at all"),
        (np.array([], dtype="S6"), "mask/train names a demonstration twice, or none at all"),
        (np.array([b"demo_0"] * 4), "mask/train has 4 rows of |S6; wanted names of the 3 demonstrations"),
        (np.array([b"demo_0".ljust(300, b"x")]), "mask/train has 1 rows of |S300; wanted names of the 3"),
        (np.array([[b"demo_0"]]), "mask/train is not a list of names within the file"),
        (np.arange(2), "mask/train has 2 rows of int64; wanted names of the 3 demonstrations"),
        (h5py.ExternalLink("other.hdf5", "/mask/train"), "PATH"),
    ],
)
def test_a_part_that_is_no_list_of_the_demonstrations_is_refused(tmp_path, mask, message):
    write(tmp_path / "other.hdf5", masks={"train": np.array([b"demo_0"])})
    assert message in refused(write(tmp_path / "demos.hdf5", masks={"train": mask}), part="train")


def test_a_part_in_another_file_is_refused_by_whatever_link_it_is_reached(tmp_path):
    write(tmp_path / "other.hdf5", masks={"train": np.array([b"demo_0"])})
    path = write(tmp_path / "demos.hdf5", masks={"train": h5py.SoftLink("/elsewhere")})
    with h5py.File(path, "a") as file:
        file["elsewhere"] = h5py.ExternalLink("other.hdf5", "/mask/train")
    assert refused(path, part="train") == "PATH: mask/train is not a list of names within the file; write it again"


def test_a_part_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = write(tmp_path / "a.hdf5", masks={name: np.array([b"demo_0"]) for name in ("train", "20_percent")})
    assert refused(path, part="valid") == "PATH has no part 'valid'; it has 20_percent, train: leave it out"
    assert refused(write(tmp_path / "b.hdf5"), part="valid") == "PATH has no part 'valid'; it has none: leave it out"


def test_a_task_is_refused_and_so_is_an_observation_that_is_not_there(tmp_path):
    path = write(tmp_path / "demos.hdf5")
    assert "task 'lift' was asked for; robomimic's layout has its own rewards" in refused(path, task="lift")
    assert "there is no observation 'object'; the dataset has ['eef', 'gripper']" in refused(path, obs=["object"])


def test_an_array_in_another_file_is_refused(tmp_path):
    write(tmp_path / "other.hdf5")
    link = h5py.ExternalLink("other.hdf5", "/data/demo_2/obs/eef")
    assert "points into another file" in refused(write(tmp_path / "demos.hdf5", changed("demo_2", "obs/eef", link)))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = write(tmp_path / "demos.hdf5")
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    assert refused(path).endswith("; copy it again")
