"""Inspection: each check fires on a dataset with exactly its fault and is silent on a clean one; pages are inert."""

import sys
import tracemalloc
from html.parser import HTMLParser

import gymnasium
import numpy as np
import pytest

from diffpolicy.cli import main
from diffpolicy.data import store
from diffpolicy.data.episodes import Episodes
from diffpolicy.inspection import Severity, inspect, motion, order, ranges
from diffpolicy.inspection.page import page
from diffpolicy.inspection.ranges import PERCENTS

ENV = "InspectionTest-v0"
SCRIPT = "<script>alert(1)</script>"


class Arm(gymnasium.Env):
    """Spaces are all that an inspection asks for."""

    observation_space = gymnasium.spaces.Dict({"state": gymnasium.spaces.Box(-np.inf, np.inf, (3,))})
    action_space = gymnasium.spaces.Box(-1, 1, (2,))


@pytest.fixture(autouse=True)
def registered():
    gymnasium.register(ENV, entry_point=Arm, max_episode_steps=60)
    yield
    del gymnasium.registry[ENV]


def clean(episodes: int = 30) -> dict:
    """A fixture without a fault: a smooth walk follows absolute targets; a clock ticks; some episodes succeed."""
    rng = np.random.default_rng(0)
    length = rng.integers(40, 61, episodes)
    state, action = [], []
    for n in length:
        walk = np.zeros((n + 2, 3))
        for i in range(1, n + 2):
            walk[i] = 0.95 * walk[i - 1] + 0.3 * rng.normal(size=3)
        walk = 0.8 * np.tanh(walk + 0.01 * rng.normal(size=walk.shape))
        state.append(walk[:-1])
        action.append(walk[1:-1, :2] + 0.02 * rng.normal(size=(n, 2)))
    n = int(length.sum())
    return {
        "obs": {"state": np.concatenate(state).astype(np.float32)},
        "action": np.concatenate(action).astype(np.float32),
        "reward": rng.normal(size=n).astype(np.float32),
        "length": length,
        "terminated": np.arange(episodes) % 2 == 0,
        "truncated": np.arange(episodes) % 2 == 1,
        "info": {"timestamp": np.concatenate([0.1 * np.arange(n) for n in length])},
        "meta": {"control_period": 0.1},
    }


def first_rows(length: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(length)[:-1]])


def set_value(name: str, row: int, dim: int, value: float):
    def change(d: dict) -> None:
        (d["obs"][name] if name in d["obs"] else d[name])[row, dim] = value

    return change


def deltas(d: dict) -> None:
    start = first_rows(d["length"])
    rows = np.concatenate([np.arange(n) + s + i for i, (s, n) in enumerate(zip(start, d["length"], strict=True))])
    d["action"] = d["obs"]["state"][rows + 1, :2] - d["obs"]["state"][rows, :2]


def copy_episode(d: dict) -> None:
    n, start = int(min(d["length"][4], d["length"][9])), first_rows(d["length"])
    shorten(d, 4, n)
    shorten(d, 9, n)
    start = first_rows(d["length"])
    d["obs"]["state"][start[9] + 9 : start[9] + 9 + n + 1] = d["obs"]["state"][start[4] + 4 : start[4] + 4 + n + 1]
    d["action"][start[9] : start[9] + n] = d["action"][start[4] : start[4] + n]


def shorten(d: dict, episode: int, n: int) -> None:
    first, cut = first_rows(d["length"])[episode], int(d["length"][episode]) - n
    rows = np.arange(first + n, first + n + cut)
    for name in ("action", "reward"):
        d[name] = np.delete(d[name], rows, axis=0)
    d["info"] = {k: np.delete(v, rows, axis=0) for k, v in d["info"].items()}
    d["obs"] = {k: np.delete(v, rows + episode + 1, axis=0) for k, v in d["obs"].items()}
    d["length"] = np.where(np.arange(len(d["length"])) == episode, n, d["length"])


def add_sensor(d: dict) -> None:
    """A second array that moves at each step but for 25 steps in episode 3."""
    d["obs"]["gripper"] = np.random.default_rng(1).normal(size=(len(d["obs"]["state"]), 1))
    first = first_rows(d["length"])[3] + 3 + 10
    d["obs"]["gripper"][first : first + 26] = 0.5


def half_rate(d: dict) -> None:
    rows = np.arange(len(d["obs"]["state"]))
    d["obs"]["state"] = d["obs"]["state"][rows - rows % 2]


def rescale(factor: float):
    def change(d: dict) -> None:
        d["action"] = (factor * d["action"]).astype(np.float32)

    return change


def clip_actions(d: dict) -> None:
    d["action"] = np.clip(5 * d["action"], -1, 1)


def images(d: dict) -> None:
    d["obs"]["camera"] = np.random.default_rng(2).integers(0, 255, (len(d["obs"]["state"]), 6, 6, 3), dtype=np.uint8)
    d["obs"]["camera"][:50] = 0


def put(**changes):
    return lambda d: d.update(changes)


def clock(change):
    return lambda d: d["info"].update(timestamp=change(d["info"]["timestamp"].copy(), first_rows(d["length"])))


def jump(time: np.ndarray, start: np.ndarray) -> np.ndarray:
    time[start[5] + 8 : start[6]] += 0.4
    return time


def backwards(time: np.ndarray, start: np.ndarray) -> np.ndarray:
    time[start[5] + 8 : start[6]] -= 0.12
    return time


def one_far_value(d: dict) -> None:
    d["obs"]["state"][first_rows(d["length"])[7] + 7 + 11, 2] = 40.0


WRONG, SUSPECT, NOTE = Severity
CASES = {
    "NaN": (
        set_value("state", 3, 1, np.nan),
        WRONG,
        "obs 'state'[1]",
        "1 value NaN or infinite, the first in episode 0, step 3",
    ),
    "an infinite action": (set_value("action", 5, 0, np.inf), WRONG, "action[0]", "the first in episode 0, step 5"),
    "a constant observation": (
        set_value("state", slice(None), 2, 7.0),
        NOTE,
        "obs 'state'[2]",
        "never changes: 7 in every row",
    ),
    "a constant action": (set_value("action", slice(None), 1, 0.5), SUSPECT, "action[1]", "never changes: 0.5"),
    "a rare contact": (
        lambda d: [set_value("state", slice(None), 2, 0.0)(d), set_value("state", 9, 2, 1.0)(d)],
        NOTE,
        "obs 'state'[2]",
        "hardly ever changes: 0 in at least 98 %",
    ),
    "one far value": (one_far_value, SUSPECT, "obs 'state'[2]", "the furthest is in episode 7, step 11"),
    "actions beyond the space": (
        set_value("action", 4, 0, 1.3),
        SUSPECT,
        "action[0]",
        "the furthest is 1.3 where -1 to 1",
    ),
    "actions in degrees": (rescale(57.3), WRONG, "action[0], [1]", "lie outside the action space"),
    "actions not yet multiplied by the gain": (rescale(0.02), SUSPECT, "action", "no dimension uses more than"),
    "saturated actions": (clip_actions, NOTE, "action[0], [1]", "is at its bound (-1 or 1)"),
    "a black camera": (images, SUSPECT, "obs 'camera'", "sampled frames are of one single colour"),
    "deltas": (deltas, SUSPECT, "action[0], [1]", "looks like a velocity or a delta"),
    "a copied episode": (copy_episode, SUSPECT, "episodes", "exact copies of earlier ones: 1 of 30 (9 is 4)"),
    "a sensor that froze": (add_sensor, SUSPECT, "obs 'gripper'", "stands still for 25 steps from episode 3, step 10"),
    "observations at half the rate": (half_rate, SUSPECT, "observations", "50 % of the steps change no observation"),
    "a gap of 0.4 s": (
        clock(jump),
        SUSPECT,
        "info 'timestamp'",
        "1 gap of more than 1.5 periods of 0.1, the first after episode 5, step 7",
    ),
    "a step back": (
        clock(backwards),
        WRONG,
        "info 'timestamp'",
        "does not advance in 1 step, the first after episode 5, step 7",
    ),
    "a clock that stands still": (
        clock(lambda time, start: 0 * time),
        WRONG,
        "info 'timestamp'",
        "does not advance in 1,489 steps, the first after episode 0, step 0",
    ),
    "another control period": (
        put(meta={"control_period": 0.05}),
        SUSPECT,
        "info 'timestamp'",
        "the metadata say control_period 0.05",
    ),
    "an episode of 5 steps": (
        lambda d: shorten(d, 11, 5),
        SUSPECT,
        "episodes",
        "far too short for the rest: 1 of 30, of 5 steps",
    ),
    "no rewards": (lambda d: d.update(reward=0 * d["reward"]), NOTE, "reward", "every reward is 0"),
    "no final observations": (put(has_final=np.zeros(30, bool)), NOTE, "observations", "not known in any episode"),
    "no ends": (
        put(terminated=np.zeros(30, bool), truncated=np.ones(30, bool)),
        NOTE,
        "terminated",
        "no episode ever terminates",
    ),
    "another action size": (
        lambda d: d.update(action=np.c_[d["action"], -(d["action"][:, :1] ** 2)]),
        WRONG,
        "action",
        "has 3 dimensions",
    ),
    "another observation size": (
        lambda d: d["obs"].update(state=d["obs"]["state"][:, :2]),
        WRONG,
        "obs 'state'",
        "has shape (2,)",
    ),
    "another observation name": (
        lambda d: d.update(obs={"qpos": d["obs"]["state"]}),
        SUSPECT,
        "observations",
        "observes 'state' (3,)",
    ),
}


def made(change) -> Episodes:
    """The clean dataset with one change; NaN goes in after construction, as into a memory-mapped file."""
    fields = clean()
    change(fields)
    arrays = {"obs": fields["obs"], "action": fields["action"]}
    hidden = {k: np.nan_to_num(v, posinf=0) for k, v in arrays["obs"].items()}
    episodes = Episodes(**{**fields, "obs": hidden, "action": np.nan_to_num(arrays["action"], posinf=0)})
    for name, array in arrays["obs"].items():
        episodes.obs[name][:] = array
    episodes.action[:] = arrays["action"]
    return episodes


def test_a_clean_dataset_has_no_finding_with_and_without_its_environment():
    assert inspect(made(lambda d: None), ENV).findings == ()
    assert inspect(made(lambda d: None)).findings == ()


@pytest.mark.parametrize("case", CASES)
def test_one_fault_gives_its_one_finding(case):
    change, severity, where, words = CASES[case]
    (finding,) = inspect(made(change), ENV).findings
    assert (finding.severity, finding.where) == (severity, where)
    assert words in finding.what
    assert finding.advice.endswith(".")


def test_episodes_of_61_steps_where_the_environment_stops_at_60():
    fields = clean()
    for name in ("action", "reward"):
        fields[name] = np.concatenate([fields[name], fields[name][:100] * 0.9])
    fields["obs"]["state"] = np.concatenate([fields["obs"]["state"], fields["obs"]["state"][:101] * 0.9])
    fields["info"] = {}
    ends = {"length": np.append(fields["length"], 100), "terminated": np.append(fields["terminated"], True)}
    episodes = Episodes(**{**fields, **ends, "truncated": np.append(fields["truncated"], False)})
    (finding,) = inspect(episodes, ENV).findings
    assert finding.what == f"longer than the 60 steps of {ENV}: 1 of 31, up to 100"
    assert '{"max_episode_steps": 100}' in finding.advice


def test_an_environment_that_cannot_be_made_is_one_line_and_the_rest_is_inspected():
    (finding,) = inspect(made(lambda d: None), "Nowhere-v0").findings
    assert finding.severity == NOTE
    assert "Nowhere-v0 could not be made" in finding.what


def test_the_metadata_name_the_environment_but_never_a_module_to_import(tmp_path, monkeypatch):
    (tmp_path / "evil_of_a_dataset.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert inspect(made(put(meta={"env_id": ENV}))).environment.max_steps == 60
    (finding,) = inspect(made(put(meta={"env_id": "evil_of_a_dataset:X-v0"}))).findings
    assert "may not import a module" in finding.what
    assert "evil_of_a_dataset" not in sys.modules


def test_numbers_equal_numpy_on_the_whole_arrays_in_blocks_of_7_rows(monkeypatch):
    monkeypatch.setattr(ranges, "CHECK_ROWS", 7)
    array = np.random.default_rng(3).normal(1e4, 2.0, (500, 3, 2)).astype(np.float32)
    flat = array.reshape(500, 6).astype(np.float64)
    found = ranges.measure("x", array)
    for value, truth in (
        (found.low, flat.min(0)), (found.high, flat.max(0)), (found.mean, flat.mean(0)), (found.std, flat.std(0)),
        (found.percentiles, np.percentile(flat, PERCENTS, axis=0)),
    ):  # fmt: skip
        np.testing.assert_allclose(value, truth, rtol=1e-10)
    np.testing.assert_array_equal(found.low_row, flat.argmin(0))
    np.testing.assert_array_equal(found.high_row, flat.argmax(0))


def test_numbers_leave_out_what_is_not_finite(monkeypatch):
    monkeypatch.setattr(ranges, "CHECK_ROWS", 3)
    array = np.array([[np.nan, 1], [2, np.inf], [4, 3], [6, 8], [np.nan, -1]])
    found = ranges.measure("x", array)
    assert (found.bad.tolist(), found.first_bad) == ([2, 1], 0)
    assert (found.low.tolist(), found.high.tolist(), found.low_row.tolist()) == ([2, -1], [6, 8], [1, 4])
    np.testing.assert_allclose(found.mean, [4, 2.75])
    np.testing.assert_allclose(found.percentiles[2], [4, 2])
    assert ranges.measure("x", np.full((4, 1), np.nan)).bad.tolist() == [4]


def test_images_are_measured_by_channel_from_256_frames_evenly_spaced():
    array = np.random.default_rng(4).integers(0, 256, (600, 8, 6, 3), dtype=np.uint8)
    picked = array[np.linspace(0, 599, 256).astype(int)].reshape(-1, 3)
    for frames in (array, np.moveaxis(array, -1, 1)):
        found = ranges.measure("x", frames)
        assert (found.rows, found.seen, found.blank) == (600, 256, 0)
        np.testing.assert_allclose(found.mean, picked.mean(0))
        np.testing.assert_array_equal(found.low, picked.min(0))


@pytest.mark.parametrize("rows", [1, 7, 1 << 18])
def test_findings_do_not_depend_on_the_size_of_the_blocks(monkeypatch, rows):
    whole = inspect(made(lambda d: [add_sensor(d), clock(jump)(d), rescale(57.3)(d)]), ENV)
    monkeypatch.setattr(ranges, "CHECK_ROWS", rows)
    again = inspect(made(lambda d: [add_sensor(d), clock(jump)(d), rescale(57.3)(d)]), ENV)
    assert again.findings == whole.findings
    assert len(whole.findings) == 3


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_still_stretch_is_that_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 9, 12)
    n, e = int(length.sum()), len(length)
    value = rng.integers(0, 2, (n + e, 1))
    known = rng.random(e) < 0.5
    episodes = Episodes(
        {"x": value}, np.zeros((n, 1)), np.zeros(n), length, known, ~known, has_final=known
    )  # fmt: skip
    best = (0, 0)
    for i, start in enumerate(episodes.start):
        run = 0
        for step in range(length[i]):
            same = value[start + i + step] == value[start + i + step + 1] and (known[i] or step < length[i] - 1)
            run = run + 1 if same else 0
            best = max(best, (run, -(start + step - run + 1)), key=lambda b: b[0])
    assert order.longest_run(episodes, order.still(episodes, value)) == (best[0], -best[1])


def of_motion(position: np.ndarray, action: np.ndarray, *others: np.ndarray) -> Episodes:
    """40 episodes of 50 steps from arrays (40, 51, ...) and actions (40, 50, ...)."""
    joined = np.concatenate([position, *others], axis=-1).reshape(40 * 51, -1)
    flags = np.arange(40) % 2 == 0
    return Episodes({"x": joined}, action.reshape(2000, -1), np.ones(2000), np.full(40, 50), flags, ~flags)


def test_velocities_are_told_from_targets_and_from_forces():
    rng = np.random.default_rng(5)
    command = np.zeros((40, 50, 2))
    for i in range(1, 50):
        command[:, i] = 0.7 * command[:, i - 1] + rng.normal(size=(40, 2))
    summed = np.concatenate([np.zeros((40, 1, 2)), np.cumsum(command, axis=1)], axis=1)
    summed_twice = np.concatenate([np.zeros((40, 1, 2)), np.cumsum(summed[:, 1:], axis=1)], axis=1)
    noisy = summed + 0.1 * rng.normal(size=summed.shape)

    def fires(episodes: Episodes) -> bool:
        return any("velocity" in finding.what for finding in inspect(episodes).findings)

    assert fires(of_motion(noisy, command))
    assert not fires(of_motion(noisy, noisy[:, 1:]))
    assert not fires(of_motion(summed_twice, command, summed))
    assert fires(of_motion(noisy, np.concatenate([command, rng.normal(size=(40, 50, 1))], axis=-1)))
    assert not fires(of_motion(noisy, rng.normal(size=(40, 50, 2))))


def test_correlation_is_numpys():
    x, y = np.random.default_rng(6).normal(size=(2, 100, 3))
    np.testing.assert_allclose(motion.correlation(x, y), abs(np.corrcoef(x.T, y.T)[:3, 3:]))
    assert motion.correlation(x, np.ones((100, 1))).tolist() == [[0], [0], [0]]


def test_a_store_of_13_MB_is_inspected_with_4_MB_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "CHECK_ROWS", 4096)
    monkeypatch.setattr(ranges, "SAMPLE_ROWS", 1000)
    monkeypatch.setattr(order, "SAMPLE_ROWS", 1000)
    monkeypatch.setattr(motion, "SAMPLE_WINDOWS", 1000)
    rng, n = np.random.default_rng(7), 200_000
    obs = {"x": rng.normal(size=(n + 200, 16)).astype(np.float32)}
    ends = {"terminated": np.ones(200, bool), "truncated": np.zeros(200, bool), "length": np.full(200, 1000)}
    store.save(Episodes(obs, np.ones((n, 1), np.float32), np.ones(n, np.float32), **ends), tmp_path / "d")
    episodes = store.load(tmp_path / "d")
    tracemalloc.start()
    inspect(episodes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


class Tags(HTMLParser):
    """Every tag and attribute of a page, as a browser would read them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


def hostile() -> Episodes:
    def change(d: dict) -> None:
        images(d)
        d["obs"][f"{SCRIPT}$\\x$\x1b[31m"] = d["obs"].pop("state")
        d["meta"] = {"by": SCRIPT, f'"><img src=x onerror=alert(2)>{SCRIPT}': {SCRIPT: [1]}, "env_id": f"{SCRIPT}\x1b"}

    return made(change)


def test_what_a_dataset_says_is_inert_on_its_page_and_in_a_terminal():
    episodes = hostile()
    found = inspect(episodes)
    text = page(found, episodes, f"{SCRIPT}.hdf5")
    parsed = Tags(text)
    assert "script" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "\x1b" not in text + str(found)


def test_a_page_is_one_file_that_asks_nothing_of_anywhere():
    episodes = hostile()
    text = page(inspect(episodes), episodes, "demos")
    parsed = Tags(text)
    assert not parsed.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert value.startswith(("data:image/png;base64,", "#"))
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert text.count("url(") == text.count("url(#")
    assert "default-src 'none'" in text


@pytest.mark.parametrize("dims", [12, 13])
def test_tables_of_more_than_12_dimensions_are_folded(dims):
    fields = clean()
    fields["obs"] = {"state": np.random.default_rng(8).normal(size=(len(fields["obs"]["state"]), dims))}
    episodes = Episodes(**fields)
    assert ("<details>" in page(inspect(episodes), episodes, "demos")) == (dims > 12)


def test_the_command_line_writes_a_page_and_says_what_looks_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store.save(made(copy_episode), "demos")
    assert main(["inspect", "demos", "--env", ENV]) == 0
    out = capsys.readouterr().out
    assert "(9 is 4)" in out
    assert len(out.splitlines()) <= 12
    assert "Exact copies" in (tmp_path / "demos.inspect.html").read_text()
    assert main(["inspect", "demos", "--out", "other.html"]) == 0
    assert (tmp_path / "other.html").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "there is no dataset"),
        (["demos", "--task", "chess"], "no task 'chess'"),
        (["demos", "--out", "no/folder.html"], "give another --out"),
        (["demos", "--env", ENV, "--env-kwargs", "3"], "wanted a JSON object"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    store.save(made(lambda d: None), "demos")
    assert main(["inspect", *argv]) == 2
    assert words in capsys.readouterr().err
