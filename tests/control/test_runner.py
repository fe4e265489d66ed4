"""The control loop under a virtual clock, where anything can be late, and for a second under the real one."""

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffpolicy.control.clock import Metronome, ThreadWorker, VirtualClock, VirtualWorker
from diffpolicy.control.limits import Limits
from diffpolicy.control.loop import Safety, Stamped
from diffpolicy.control.runner import Runner
from diffpolicy.control.strategies import Bidirectional, Ensemble, RealTime, Strategy, Switch, Synchronous
from diffpolicy.data.episodes import Episode, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.guidance import Trained
from diffpolicy.diffusion.prefix import Prefix, hard
from diffpolicy.errors import ControlError

STRATEGIES: dict[str, Strategy] = {
    "synchronous": Synchronous(),
    "switch": Switch(),
    "ensemble": Ensemble(),
    "real_time": RealTime(),
    "bidirectional": Bidirectional(samples=3),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
PERIOD = 0.02
HZ = 50.0


@cache
def normalizer(high: float = 1.0) -> Normalizer:
    obs = np.array([[0, 0], [high, high]], dtype=np.float32)
    episode = Episode({"obs": obs}, obs[:1], np.zeros(1, dtype=np.float32), terminated=False, truncated=True)
    return Normalizer.fit(from_list([episode]))


class Scripted:
    """Plans that say where they come from. An observation is (moment, actions consumed by then); every action of its
    chunk is (that moment, its own number)."""

    device = torch.device("cpu")
    max_delay = 0

    def __init__(self, horizon: int = 16, n_obs_steps: int = 2, n_action_steps: int = 8, high: float = 1e6) -> None:
        self.spec = Spec({"obs": (2,)}, 2, horizon, n_obs_steps, n_action_steps)
        self.normalizer = normalizer(high)
        self.asked: list[SimpleNamespace] = []

    def draws(self, repeats: int = 1) -> int:
        return 1

    def plan(self, history, noise: torch.Tensor, prefix: Prefix | None = None) -> torch.Tensor:
        self.asked.append(SimpleNamespace(history=history["obs"], noise=noise, prefix=prefix))
        last = history["obs"][:, -1:]
        number = torch.arange(self.spec.horizon) - (self.spec.n_obs_steps - 1)
        step = torch.stack([torch.zeros(self.spec.horizon), number.float()], -1)
        return last + step


class Saying(Scripted):
    """Plans what it is told to, one chunk after the other; an exception is raised."""

    def __init__(self, say: Iterator, **sizes: int) -> None:
        super().__init__(**sizes)
        self.say = say

    def plan(self, history, noise: torch.Tensor, prefix: Prefix | None = None) -> torch.Tensor:
        said = next(self.say)
        if isinstance(said, BaseException):
            raise said
        return torch.full((noise.shape[1], self.spec.horizon, 2), 0.0) + torch.as_tensor(said, dtype=torch.float32)


class Blocked(Exception):
    """The loop asked to sleep for too long."""


class StrictClock(VirtualClock):
    """Refuses to sleep longer than a period."""

    def sleep_until(self, moment: float) -> None:
        if moment - self.time > PERIOD + 1e-9:
            raise Blocked(moment - self.time)
        super().sleep_until(moment)


@dataclass
class Played:
    """What one run wrote, beat by beat (None where nothing was)."""

    loop: object
    written: list
    report: object


def play(runner: Runner, beats: int, durations, start=None, observe=None) -> Played:
    """Run on a virtual clock; `durations` in periods, one a plan (the last for ever)."""
    clock = StrictClock()
    waits = iter(durations)
    last = [0.0]

    def duration() -> float:
        last[0] = next(waits, last[0])
        return (last[0] - 0.5) * PERIOD if last[0] > 0 else 0.0

    loop = runner.start(VirtualWorker(clock, duration), start)
    metronome, written = Metronome(clock, PERIOD), []
    for beat in range(beats):
        metronome.wait()
        obs = np.array([clock.now(), loop.counts.consumed]) if observe is None else observe(beat, clock.now(), loop)
        written.append(loop.step(clock.now(), obs))
        if loop.ended:
            break
    return Played(loop, written, loop.report)


def numbers(played: Played) -> list:
    """Number of each written action, None where nothing was written."""
    return [None if action is None else round(action[1]) for action in played.written]


# --- delay, counted in consumed actions ---


@every_strategy
def test_without_a_delay_every_strategy_writes_the_action_of_each_number(strategy: Strategy):
    played = play(Runner(Scripted(), HZ, strategy, warm_up=0), 40, [0])
    assert numbers(played) == list(range(40))
    assert played.report.counts.over_budget == 0


def test_the_synchronous_way_repeats_the_last_action_until_the_late_chunk_is_there():
    played = play(Runner(Scripted(n_action_steps=4), HZ, warm_up=0), 18, [3])
    assert numbers(played) == [None, None, None, 0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 7, 7, 7, 8]


@pytest.mark.parametrize("strategy", [Switch(), RealTime(), Bidirectional(2)])
def test_beside_the_loop_a_delay_of_3_costs_no_beat_and_no_action_is_taken_twice_or_left_out(strategy: Strategy):
    played = play(Runner(Scripted(n_action_steps=4), HZ, strategy, delay=3, warm_up=0), 40, [3])
    assert numbers(played)[:3] == [None] * 3
    assert numbers(played)[3:] == list(range(37))
    assert set(played.report.counts.delays) == {3}
    assert played.report.counts.rested == 3  # at the start


def test_chunks_are_asked_for_as_often_as_ta_says_and_more_often_where_the_delay_leaves_less():
    for n_action_steps, delay, every in ((4, 3, 4), (8, 3, 8), (8, 7, 8), (12, 3, 12)):
        policy = Scripted(n_action_steps=n_action_steps)
        play(Runner(policy, HZ, RealTime(), delay=delay, warm_up=0), 100, [delay])
        origins = [round(float(one.history[0, -1, 1])) for one in policy.asked]
        assert set(np.diff(origins)) == {every}
    policy = Scripted(n_action_steps=12)  # H = 15: with a delay of 5 no more than 10 can be executed
    played = play(Runner(policy, HZ, RealTime(), delay=3, warm_up=2), 200, [1, 1, 5])
    assert set(np.diff([round(float(one.history[0, -1, 1])) for one in policy.asked[2:]])) == {10}
    assert numbers(played)[-1] is not None and played.report.counts.over_budget == 0


def test_the_first_plans_are_thrown_away_and_count_neither_as_actions_nor_as_delay():
    """Two warm-up plans of 30 periods, then 4: the third is used, and its 4 periods are the first estimate."""
    policy = Scripted(n_action_steps=8)
    played = play(Runner(policy, HZ, RealTime(), warm_up=2), 120, [30, 30, 4])
    assert numbers(played)[:64] == [None] * 64 and numbers(played)[64:] == list(range(56))
    assert set(played.report.counts.delays) == {4}
    assert [float(one.prefix.weights.sum()) for one in policy.asked[:3]] == [0] * 3  # a rehearsal changes nothing
    assert [float((one.prefix.weights == 1).sum()) for one in policy.asked[3:]] == [1 + 4] * len(policy.asked[3:])


@pytest.mark.parametrize(("delay", "frozen"), [(0, 4), (6, 6)])
def test_the_first_join_expects_what_a_joined_plan_takes_and_no_less_than_was_given(delay: int, frozen: int):
    """A plain plan takes 1 period, one with a prefix 4: the start is timed with a prefix too."""
    policy, clock = Scripted(n_action_steps=8), StrictClock()
    worker = VirtualWorker(clock, lambda: (0.5 if policy.asked[-1].prefix is None else 3.5) * PERIOD)
    loop, metronome = Runner(policy, HZ, RealTime(), delay=delay).start(worker), Metronome(clock, PERIOD)
    for _ in range(60):
        metronome.wait()
        loop.step(clock.now(), np.array([clock.now(), loop.counts.consumed]))
    joined = [one.prefix.weights for one in policy.asked if one.prefix is not None and one.prefix.weights.any()]
    assert set(loop.counts.delays) == {4} and len(joined) >= 4
    assert [int((weights == 1).sum()) - 1 for weights in joined] == [frozen] * len(joined)


def test_a_policy_that_learnt_to_continue_chunks_is_told_of_no_longer_delays_than_it_learnt():
    policy, strategy = Scripted(n_action_steps=8), RealTime(Trained, hard)
    with pytest.raises(ControlError, match="trained to continue chunks for delays up to 0"):
        Runner(policy, HZ, strategy)
    policy.max_delay = 2
    with pytest.raises(ControlError, match="up to 2 and the delay is 3"):
        Runner(policy, HZ, strategy, delay=3)
    played = play(Runner(policy, HZ, strategy, delay=2, warm_up=0), 60, [5])
    frozen = [int((one.prefix.weights == 1).sum()) - 1 for one in policy.asked[1:]]
    assert frozen == [2] * len(frozen) and set(played.report.counts.delays) == {5}


def test_the_prefix_is_the_rest_of_the_former_chunk_without_padding():
    policy = Scripted(n_action_steps=8)
    play(Runner(policy, HZ, RealTime(), delay=2, warm_up=0), 40, [2])
    asked = policy.asked[1]
    weights = asked.prefix.weights[0]
    # Asked for at action 8, elements are the actions 7, 8, 9, ...; the former chunk ends with action 14.
    assert asked.prefix.chunk[0, :, 1].tolist() == [7, 8, 9, 10, 11, 12, 13, 14, 14, 14, 14, 14, 14, 14, 14, 14]
    assert (weights > 0).tolist() == [True] * 8 + [False] * 8
    assert (weights == 1).tolist() == [True] * 3 + [False] * 13


def test_a_late_observation_plans_for_the_action_of_its_own_moment():
    """Made 3 periods before it is read, when 3 actions less had been consumed."""
    past: list = []

    def observe(beat: int, now: float, loop) -> Stamped | None:
        past.append(Stamped(np.array([now, loop.counts.consumed]), now))
        return past[beat - 3] if beat >= 3 else None

    played = play(Runner(Scripted(), HZ, Switch(), warm_up=0), 40, [0], observe=observe)
    assert [n for n in numbers(played) if n is not None] == list(range(37))
    assert set(played.report.counts.delays) == {3}


def test_an_older_observation_than_one_seen_is_counted_and_not_used():
    def observe(beat: int, now: float, loop) -> Stamped:
        return Stamped(np.array([now, loop.counts.consumed]), now if beat % 2 == 0 else now - 1.5 * PERIOD)

    played = play(Runner(Scripted(), HZ, warm_up=0), 20, [0], observe=observe)
    assert played.report.counts.late == 10
    assert all(action is not None for action in played.written)


# --- refused at the door ---


def test_a_history_chunk_and_delay_beyond_the_horizon_are_refused_with_the_sum():
    Runner(Scripted(16, 2, 8), HZ, delay=7)
    with pytest.raises(ControlError, match=r"2 - 1 \+ n_action_steps 8 \+ delay 8 = 17 exceeds horizon 16"):
        Runner(Scripted(16, 2, 8), HZ, delay=8)


@pytest.mark.parametrize("wrong", [{"rate_hz": 0}, {"rate_hz": float("nan")}, {"delay": -1}, {"warm_up": -1}])
def test_impossible_numbers_are_refused(wrong: dict):
    with pytest.raises(ControlError, match="give a rate above 0"):
        Runner(**{"policy": Scripted(), "rate_hz": HZ, **wrong})


def test_a_rate_that_is_not_the_datas_is_refused_with_both():
    policy = Scripted()
    policy.spec = replace(policy.spec, control_period=0.1)
    Runner(policy, 10.0)
    with pytest.raises(ControlError, match=r"rate_hz is 50 and .* 0.1 s apart \(10 Hz\)"):
        Runner(policy, 50.0)


def test_limits_on_movement_without_a_start_are_refused_and_so_is_a_start_outside_them():
    runner = Runner(Scripted(), HZ, safety=Safety(Limits(low=0, high=1, velocity=1)))
    with pytest.raises(ControlError, match="need to know where the robot is"):
        runner.start(VirtualWorker(VirtualClock(), float))
    with pytest.raises(ControlError, match="outside the limits"):
        runner.start(VirtualWorker(VirtualClock(), float), np.array([0.5, 2]))
    with pytest.raises(ControlError, match="give the 2 numbers"):
        runner.start(VirtualWorker(VirtualClock(), float), np.array([0.5, np.nan]))
    for rest, match in ((np.zeros(3), "safety.rest is .* give the 2 numbers"), (np.ones(2) * 9, "rest is .* outside")):
        resting = Runner(Scripted(), HZ, safety=Safety(Limits(high=1), rest=rest))
        with pytest.raises(ControlError, match=match):
            resting.start(VirtualWorker(VirtualClock(), float), np.zeros(2))


# --- what happens when something is late, wrong or broken ---


def test_a_stalled_policy_is_followed_to_the_end_of_its_chunk_then_rests_then_stops():
    """To 2, Ta 8, Tp 16: 8 actions in budget, 7 more that the chunk knows, then rest; 20 periods in all."""
    runner = Runner(Scripted(), HZ, Switch(), Safety(stop_after=20, max_age=10), warm_up=0)
    played = play(runner, 100, [0, float("inf")])
    assert numbers(played) == [*range(15), *[14] * 15]
    assert (played.report.ok, played.report.counts.over_budget) == (False, 21)
    assert played.report.reason == "no chunk came in time for 20 periods in a row"


def test_who_does_not_want_the_rest_of_a_late_chunk_rests_at_once():
    runner = Runner(Scripted(), HZ, Switch(), Safety(stop_after=None, finish=False), warm_up=0)
    played = play(runner, 60, [0, float("inf")])
    assert numbers(played) == [*range(8), *[7] * 52]
    assert not played.loop.ended


def test_no_action_is_older_than_allowed():
    """Of a stalled policy's chunk, 6 periods after its observation nothing is left to execute."""
    runner = Runner(Scripted(), HZ, Switch(), Safety(max_age=5.5 * PERIOD), warm_up=0)
    played = play(runner, 40, [0, float("inf")])
    assert numbers(played)[:10] == [0, 1, 2, 3, 4, 5, 5, 5, 5, 5]


def test_plans_that_are_always_too_old_end_the_run_with_a_sentence_that_says_so():
    runner = Runner(Scripted(), HZ, safety=Safety(max_age=5 * PERIOD, start_within=1.0), warm_up=0)
    played = play(runner, 100, [10])
    assert played.report.reason == "there was no first chunk within 1 s; 5 came when they were over 0.1 s old"
    assert set(played.written) == {None}


def test_a_policy_that_raises_ends_at_rest_with_its_error():
    policy = Saying(iter([[0.5, 0.5], RuntimeError("CUDA error")]))
    played = play(Runner(policy, HZ, warm_up=0), 40, [0])
    assert played.loop.ended and isinstance(played.report.error, RuntimeError)
    assert played.report.reason == "the policy failed: RuntimeError: CUDA error"
    assert [action.tolist() for action in played.written] == [[0.5, 0.5]] * 9


def test_a_chunk_of_another_shape_ends_the_run_with_a_sentence_before_the_arm_moves():
    policy = Scripted()
    policy.plan = lambda history, noise, prefix=None: torch.zeros(1, 16, 3)
    played = play(Runner(policy, HZ), 20, [0])
    assert played.loop.ended and set(played.written) == {None}
    assert played.report.reason == "the policy planned a chunk of shape (16, 3); wanted (16, 2)"


def test_a_chunk_that_is_not_finite_is_never_executed_and_the_next_one_is_asked_for_at_once():
    policy = Saying(iter([[0.5, 0.5], [float("nan"), 0], [float("inf"), 0], *[[0.25, 0.25]] * 50]))
    played = play(Runner(policy, HZ, warm_up=0), 30, [0])
    assert played.report.counts.bad_chunks == 2
    assert all(np.isfinite(action).all() for action in played.written)
    assert [action[0] for action in played.written] == [0.5] * 10 + [0.25] * 20


def test_observations_that_are_not_finite_are_counted_and_not_planned_from():
    def observe(beat: int, now: float, loop) -> np.ndarray:
        return np.array([np.nan if beat % 3 else now, loop.counts.consumed])

    policy = Scripted(n_action_steps=4)
    played = play(Runner(policy, HZ, warm_up=0), 30, [0], observe=observe)
    assert played.report.counts.bad == 20
    assert all(one.history.isfinite().all() for one in policy.asked)


@pytest.mark.parametrize("more", [np.array([np.nan]), "a note", None])
def test_what_the_policy_does_not_use_of_an_observation_does_not_matter(more):
    def observe(beat: int, now: float, loop) -> dict:
        return {"obs": np.array([now, loop.counts.consumed]), "more": more}

    played = play(Runner(Scripted(), HZ, warm_up=0), 20, [0], observe=observe)
    assert numbers(played) == list(range(20)) and played.report.counts.bad == 0


def test_an_observation_outside_the_range_of_training_is_counted_by_name_with_how_far():
    def observe(beat: int, now: float, loop) -> np.ndarray:
        return np.array([1.5 if beat in (3, 4) else 0.5, 0.5])

    played = play(Runner(Scripted(high=1.0), HZ, warm_up=0), 20, [0], observe=observe)
    assert played.report.counts.outside == {"obs": 2}
    assert "2 x 'obs', by 50% of its range" in str(played.report)


@pytest.mark.parametrize("wrong", [np.zeros(3), {"position": np.zeros(2)}, "left"])
def test_an_observation_that_is_not_the_policys_ends_the_run_with_a_sentence(wrong):
    runner = Runner(Scripted(), HZ, warm_up=0)
    played = play(runner, 20, [0], observe=lambda beat, now, loop: wrong if beat > 4 else np.zeros(2))
    assert played.loop.ended and "the observation is not the policy's" in played.report.reason


def test_a_robot_of_velocities_rests_at_zero_and_comes_to_zero_at_the_end_within_its_limits():
    policy = Saying(iter([[1.0, -1.0], RuntimeError("lost")]))
    safety = Safety(Limits(velocity=5.0), rest=np.zeros(2))
    written = np.array(play(Runner(policy, HZ, safety=safety, warm_up=0), 60, [2, 2]).written)
    assert written[:2].tolist() == [[0, 0], [0, 0]]
    assert written[9].tolist() == pytest.approx([0.8, -0.8])
    assert written[-1].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert np.abs(np.diff(written, axis=0)).max() <= 5.0 * PERIOD + 1e-9


# --- run: exceptions, interruptions, the watchdog ---


def run(runner: Runner, read=None, write=None, **options):
    clock = VirtualClock()
    written: list = []
    read = read or (lambda: np.zeros(2))
    worker = VirtualWorker(clock, lambda: 1.5 * PERIOD)
    report = runner.run(read, write or written.append, clock=clock, worker=worker, **options)
    return report, written


def test_a_run_ends_after_its_seconds_at_rest():
    report, written = run(Runner(Scripted(), HZ), seconds=1.0)
    assert report.ok and report.reason == "its time is over"
    assert 40 <= len(written) <= 51 and report.missed == 0


def raising(error: BaseException, after: int):
    calls = iter(range(1000))

    def call(*_: object) -> np.ndarray:
        if next(calls) >= after:
            raise error
        return np.zeros(2)

    return call


@pytest.mark.parametrize("error", [OSError("cable"), KeyboardInterrupt()])
def test_a_read_that_raises_ends_at_rest_and_so_does_ctrl_c(error: BaseException):
    safety = Safety(Limits(velocity=1.0, acceleration=5.0))
    report, written = run(Runner(Scripted(), HZ, safety=safety), read=raising(error, 30), start=np.zeros(2))
    assert report.reason == ("read failed: OSError: cable" if isinstance(error, OSError) else "interrupted")
    assert report.ok == isinstance(error, KeyboardInterrupt)
    assert (written[-1] == written[-2]).all()  # at rest


def test_a_write_that_raises_calls_the_emergency_stop_and_is_not_called_again():
    stopped: list = []
    report, _ = run(Runner(Scripted(), HZ), write=raising(OSError("bus"), 5), stop=lambda: stopped.append(1))
    assert report.reason == "write failed: OSError: bus"
    assert stopped == [1] and report.counts.written == 6


def test_what_fails_while_the_arm_comes_to_rest_is_told_and_calls_the_emergency_stop():
    """An arm on its way whose time is over after 6 actions: its bus fails at the eighth, before it stands."""
    stopped: list = []
    policy = Scripted()
    policy.plan = lambda history, noise, prefix=None: torch.linspace(0, 0.27, 16)[None, :, None].expand(1, 16, 2)
    runner = Runner(policy, HZ, safety=Safety(Limits(velocity=1.0, acceleration=5.0)), warm_up=0)
    bus = raising(OSError("bus"), 8)
    report, _ = run(runner, write=bus, start=np.zeros(2), seconds=0.15, stop=lambda: stopped.append(1))
    assert (report.counts.consumed, report.counts.written) == (6, 9) and not report.ok
    assert report.reason == "write failed: OSError: bus" and isinstance(report.error, OSError) and stopped == [1]


def test_an_arm_that_does_not_come_to_rest_in_time_is_stopped_and_the_run_has_failed():
    """From 1 to rest at 0 with 0.1 a second takes 10 s."""
    stopped: list = []
    safety = Safety(Limits(velocity=0.1), rest=np.zeros(2), settle_within=1.5)
    policy = Saying(iter([[1.0, 1.0]] * 100))
    report, written = run(
        Runner(policy, HZ, safety=safety), start=np.ones(2), seconds=0.5, stop=lambda: stopped.append(1)
    )
    assert not report.ok and report.reason == "its time is over; not at rest 1.5 s later"
    assert stopped == [1] and 0.8 < written[-1][0] < 0.9


def test_a_long_stop_has_the_time_that_it_takes():
    """From 0.3 a second with 0.05 a second squared it takes 6 s, though 2 are given."""
    policy = Scripted()
    policy.plan = lambda history, noise, prefix=None: (
        history["obs"][:, -1:, :1] * 0.3 + 0.006 * torch.arange(-1.0, 15.0).reshape(1, 16, 1).expand(1, 16, 2)
    )
    clock, stopped, written = VirtualClock(), [], []
    runner = Runner(policy, HZ, safety=Safety(Limits(velocity=0.3, acceleration=0.05)), warm_up=0)
    report = runner.run(
        lambda: np.full(2, clock.now()), written.append, np.zeros(2), 10.0, lambda: stopped.append(1), clock,
        VirtualWorker(clock, lambda: 0.0),
    )  # fmt: skip
    assert report.ok and not stopped and (written[-1] == written[-2]).all()
    assert np.diff(written[:500], axis=0).max() * HZ > 0.2


def test_a_loop_that_fails_itself_calls_the_emergency_stop_and_closes_its_worker():
    @dataclass(frozen=True)
    class Broken(Switch):
        def action(self, chunks, number):
            raise ValueError("broken")

    stopped, closed = [], []
    clock = VirtualClock()
    worker = VirtualWorker(clock, float)
    worker.close = lambda: closed.append(1)
    said = (lambda: np.zeros(2), lambda action: None, np.zeros(2), 1.0, lambda: stopped.append(1), clock, worker)
    report = Runner(Scripted(), HZ, Broken()).run(*said)
    assert not report.ok and report.reason == "the loop failed: ValueError: broken"
    assert (stopped, closed) == ([1], [1])
    with pytest.raises(ControlError, match=r"safety.rest"):
        Runner(Scripted(), HZ, safety=Safety(rest=np.zeros(3))).run(*said)
    assert closed == [1, 1]


def test_a_read_that_hangs_is_noticed_by_the_watchdog_which_calls_the_emergency_stop():
    released, stopped = threading.Event(), threading.Event()

    def read() -> np.ndarray:
        released.wait(10)
        return np.zeros(2)

    def stop() -> None:
        stopped.set()
        released.set()

    written: list = []
    report = Runner(Scripted(), HZ).run(read, written.append, stop=stop, seconds=30)
    assert stopped.is_set() and not report.ok
    assert report.reason == "read or write hung for 0.5 s"
    assert written == []


# --- 10,000 random schedules ---

LIMITS = [
    Limits(),
    Limits(low=-0.5, high=3.0),
    Limits(velocity=2.0),
    Limits(low=np.array([-1.0, -0.2]), high=1.5, velocity=np.array([1.0, 4.0])),
    Limits(velocity=1.0, acceleration=20.0),
    Limits(low=-0.3, high=0.3, velocity=1.0, acceleration=10.0, jerk=500.0),
]


def inside(limits: Limits, start: np.ndarray, written: np.ndarray) -> bool:
    """Whether positions and their differences keep the limits, from rest at `start` on."""
    value = np.concatenate([np.tile(start, (3, 1)), written])
    slack = 1e-7 * (1 + np.abs(value).max())
    low, high = (-np.inf if limits.low is None else limits.low), (np.inf if limits.high is None else limits.high)
    ok = ((value >= low - slack) & (value <= high + slack)).all()
    for order, bound in enumerate((limits.velocity, limits.acceleration, limits.jerk), start=1):
        value = np.diff(value, axis=0)
        ok &= bound is None or (np.abs(value) <= np.asarray(bound) * PERIOD**order + slack).all()
    return bool(ok)


class Schedule:
    """One random course of events."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = np.random.default_rng(seed)
        n_obs_steps, horizon = int(rng.integers(1, 4)), int(rng.integers(6, 17))
        n_action_steps = int(rng.integers(1, horizon - n_obs_steps + 1))
        self.limits = LIMITS[rng.choice(len(LIMITS), p=[0.3, 0.15, 0.25, 0.15, 0.08, 0.07])]
        self.policy = Scripted(horizon, n_obs_steps, n_action_steps)
        self.max_age = float(rng.uniform(1, 30)) * PERIOD
        stop_after = None if rng.random() < 0.2 else int(rng.integers(1, 30))
        rest = np.zeros(2) if rng.random() < 0.2 else None
        safety = Safety(self.limits, rest, rng.random() < 0.5, stop_after, self.max_age, start_within=0.4)
        delay = int(rng.integers(0, horizon - n_obs_steps + 2 - n_action_steps))
        strategy = list(STRATEGIES.values())[rng.integers(len(STRATEGIES))]
        self.runner = Runner(self.policy, HZ, strategy, safety, delay, int(rng.integers(0, 3)))
        self.start = np.zeros(2)
        self.slow, self.stall, self.drop, self.lag, self.odd, self.stutter = rng.random(6) * [12, 0.1, 0.5, 6, 0.1, 0.3]
        self.events = rng.random((40, 4))
        self.clock = StrictClock()

    def duration(self) -> float:
        if self.rng.random() < self.stall:
            return float("inf")
        return self.rng.random() * self.slow * PERIOD

    def plan_badly(self, history, noise, prefix=None) -> torch.Tensor:
        chunk = Scripted.plan(self.policy, history, noise, prefix)
        luck = self.rng.random()
        if luck < self.odd / 5:
            raise RuntimeError("crashed")
        return chunk * float("nan") if luck < self.odd else chunk

    def observe(self, event: np.ndarray, past: list, loop):
        now = self.clock.now()
        past.append(Stamped(np.array([now, loop.counts.consumed]), now))
        if event[0] < self.drop:
            return None
        if event[1] < self.odd:
            return np.array([np.nan, 0.0])
        return past[-1] if event[1] > 0.5 else past[max(0, len(past) - 1 - int(event[2] * self.lag))]

    def stumble(self, event: np.ndarray) -> None:
        """The clock jumps ahead by up to 6 periods, or back."""
        if event[3] < self.stutter:
            self.clock.time += (event[2] * 7 - 1) * PERIOD


def check(seed: int) -> None:
    """One schedule: every action finite, inside the limits, of its own number, never older than allowed."""
    schedule = Schedule(seed)
    schedule.policy.plan = schedule.plan_badly
    loop = schedule.runner.start(VirtualWorker(schedule.clock, schedule.duration), schedule.start)
    metronome, past, written, moments, targets = Metronome(schedule.clock, PERIOD), [], [], [], []
    apply = loop._limiter.apply
    loop._limiter.apply = lambda target: targets.append(target) or apply(target)  # what is asked of the limits
    for event in schedule.events:
        schedule.stumble(event)
        metronome.wait()
        before, asked = loop.counts.consumed, len(schedule.policy.asked)
        action = loop.step(schedule.clock.now(), schedule.observe(event, past, loop))
        assert len(schedule.policy.asked) <= asked + 1
        if action is not None:
            written.append(action)
            moments.append(loop.now)
        if loop.counts.consumed > before:
            assert targets[-1][1] == pytest.approx(before, abs=1e-3), seed
            assert loop.now - targets[-1][0] <= schedule.max_age + 1e-6, seed
            assert schedule.limits is not LIMITS[0] or np.array_equal(action, targets[-1]), seed
        if loop.ended:
            break
    assert len(written) == loop.counts.written
    assert loop.ended or not loop.ending or len(written) <= 40
    if written:
        assert np.isfinite(written).all(), seed
        assert inside(schedule.limits, schedule.start, np.array(written)), seed
        assert (np.diff(moments) >= 0).all(), seed


@pytest.mark.parametrize("part", range(10))
def test_10000_random_schedules_write_only_what_is_finite_legal_of_its_own_number_and_young(part: int):
    """Random delays, stalls and crashes, dropped, late and broken observations, a clock that jumps ahead and back."""
    for seed in range(1000 * part, 1000 * (part + 1)):
        check(seed)


# --- the real clock ---


def test_at_50_hz_on_the_real_clock_a_policy_of_100_ms_never_makes_the_loop_wait():
    """One second. Nine in ten beats are within 5 ms even on a busy machine; chunks come after about 5 actions."""

    class Slow(Scripted):
        def plan(self, history, noise, prefix=None):
            time.sleep(0.1)
            return super().plan(history, noise, prefix)

    moments: list[float] = []
    runner = Runner(Slow(), HZ, RealTime(), warm_up=1)
    report = runner.run(
        lambda: np.zeros(2), lambda action: moments.append(time.monotonic()), start=np.zeros(2), seconds=1.0
    )
    assert report.ok, str(report)
    assert len(moments) + report.missed == pytest.approx(51, abs=2)
    assert (np.diff(moments) > 0).all()
    assert np.quantile(report.lateness, 0.9) < 5e-3
    assert 3 <= np.median(report.counts.delays) <= 8
    assert report.counts.consumed > 25 and report.counts.over_budget <= report.missed + 2


def test_a_job_that_never_ends_keeps_neither_the_worker_nor_the_loop():
    worker, release = ThreadWorker(patience=0.05), threading.Event()
    worker.submit(release.wait)
    began = time.monotonic()
    assert worker.poll() is None
    worker.close()
    assert time.monotonic() - began < 1.0
    release.set()


def test_the_noise_of_a_run_is_that_of_its_seed_and_plan():
    policy = Scripted(n_action_steps=4)
    play(Runner(policy, HZ, warm_up=0, seed=3), 12, [0])
    for plan, asked in enumerate(policy.asked):
        wanted = np.random.default_rng([3, 0, plan]).standard_normal((1, 1, 16, 2), dtype=np.float32)
        np.testing.assert_array_equal(asked.noise.numpy(), wanted)


def test_periods_that_a_slow_write_skips_are_counted_each_and_the_grid_stays():
    """The write of beat 4 takes 3.2 periods: beats 5 and 6 are skipped, 7 comes 0.2 late, 8 is where it always was."""
    clock, moments = VirtualClock(100.0), []

    def write(action):
        moments.append(clock.now())
        clock.time += 3.2 * PERIOD if len(moments) == 5 else 0.1 * PERIOD

    runner = Runner(Scripted(), HZ, warm_up=0)
    report = runner.run(
        lambda: np.zeros(2), write, seconds=20.5 * PERIOD, clock=clock, worker=VirtualWorker(clock, float)
    )
    beats = (np.array(moments) - 100.0) / PERIOD
    np.testing.assert_allclose(beats[:8], [0, 1, 2, 3, 4, 7.2, 8, 9], atol=1e-6)
    assert report.ok and report.missed == 2
    assert report.lateness.max() == pytest.approx(0.2 * PERIOD, rel=1e-3)
    assert len(report.lateness) == len(moments)


@pytest.mark.parametrize(("rate", "fits"), [(10.05, True), (9.95, True), (10.5, False), (9.5, False)])
def test_a_rate_within_1_percent_of_the_datas_is_taken_and_5_percent_on_either_side_refused(rate, fits):
    policy = Scripted()
    policy.spec = replace(policy.spec, control_period=0.1)
    with nullcontext() if fits else pytest.raises(ControlError, match="run it at that rate"):
        Runner(policy, rate)


def test_after_the_watchdog_has_barked_nothing_more_is_written():
    released, written, calls = threading.Event(), [], iter(range(10**6))

    def read():
        if next(calls) == 10:
            released.wait(5)
        return np.zeros(2)

    before = []

    def stop():
        before.append(len(written))
        released.set()

    report = Runner(Scripted(), HZ, safety=Safety(Limits(velocity=1.0, acceleration=5.0)), warm_up=0).run(
        read, written.append, start=np.ones(2), stop=stop, seconds=30
    )
    assert not report.ok and len(before) == 1 and 0 < before[0] == len(written)


def test_a_clock_that_is_set_back_by_an_hour_costs_no_more_than_a_period():
    clock = VirtualClock(3600.0)
    metronome = Metronome(clock, PERIOD)
    metronome.wait()
    clock.time = 0.0
    for beat in range(1, 4):
        metronome.wait()
        assert clock.now() == pytest.approx(beat * PERIOD)
    assert metronome.missed == 0


def test_lateness_is_how_long_after_its_deadline_a_beat_came():
    class Oversleeping(VirtualClock):
        def sleep_until(self, moment):
            super().sleep_until(moment + 0.001)

    metronome = Metronome(Oversleeping(), PERIOD)
    for _ in range(5):
        metronome.wait()
    np.testing.assert_allclose(metronome.lateness, [0.001] * 5, rtol=1e-4)


def test_periods_without_a_chunk_end_a_run_only_if_they_are_in_a_row():
    """Of every 7 periods 3 are late: never 4 in a row."""
    runner = Runner(Scripted(n_action_steps=4), HZ, safety=Safety(stop_after=4), warm_up=0)
    played = play(runner, 100, [3])
    assert not played.loop.ending and played.report.counts.over_budget > 30


def test_a_stamp_from_the_future_counts_as_now_and_blinds_nobody():
    def observe(beat, now, loop):
        return Stamped(np.array([now, loop.counts.consumed]), now + 1000 * (beat == 3))

    played = play(Runner(Scripted(n_action_steps=4), HZ, Switch(), warm_up=0), 40, [0], observe=observe)
    assert numbers(played) == list(range(40)) and played.report.counts.late == 0


def test_the_same_observation_again_is_none_and_nothing_is_planned_from_it():
    """From beat 6 on the camera hangs at the frame of beat 5."""

    def observe(beat, now, loop):
        if beat <= 5:
            observe.last = Stamped(np.array([now, loop.counts.consumed]), now)
        return observe.last

    policy = Scripted(n_action_steps=4)
    played = play(Runner(policy, HZ, Switch(), Safety(stop_after=None), warm_up=0), 14, [0], observe=observe)
    assert (len(policy.asked), played.report.counts.late) == (2, 8)


def test_a_period_without_an_observation_repeats_the_last_and_plans_nothing():
    """Actions 8 and on are due at beat 8; beats 7 to 9 see nothing, so the plan is made at beat 10 from 6, 6 and 10."""
    policy = Scripted(n_obs_steps=3)

    def observe(beat, now, loop):
        return None if 7 <= beat <= 9 else np.array([beat, loop.counts.consumed])

    played = play(Runner(policy, HZ, Switch(), warm_up=0), 12, [0], observe=observe)
    assert [one.history[0, :, 0].tolist() for one in policy.asked] == [[0, 0, 0], [6, 6, 10]]
    assert played.report.counts.dropped == 3


def test_what_a_plan_is_expected_to_take_leaves_one_action_of_the_chunk():
    """H = 15: plans of 30 periods are expected to take 14 actions."""
    played = play(Runner(Scripted(), HZ, RealTime(), Safety(stop_after=None), warm_up=1), 120, [30])
    assert played.loop.delay == 14


def test_every_plan_has_an_observation_of_its_own_be_it_thrown_away_or_not():
    """One comes every fifth beat; plans take one, and the first two are for warming up."""
    policy = Scripted()

    def observe(beat, now, loop):
        return None if beat % 5 else np.array([beat, 0.0])

    play(Runner(policy, HZ, warm_up=2), 12, [1], observe=observe)
    assert [float(one.history[0, -1, 0]) for one in policy.asked] == [0, 5, 10]


def test_several_observations_at_once_end_the_run_in_one_sentence():
    """A stack of the last two frames would otherwise have been planned from by its older one."""
    played = play(Runner(Scripted(), HZ, warm_up=0), 20, [0], observe=lambda beat, now, loop: np.zeros((2, 2)))
    assert played.loop.ending and "it has 2 rows; give the newest alone" in played.report.reason
