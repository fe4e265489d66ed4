"""Limits: all of them kept at every step, whatever is asked for, and no more changed than has to be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpolicy.control.limits import Limiter, Limits
from diffpolicy.errors import ControlError

PERIOD = 0.02
FULL = Limits(low=-0.2, high=0.3, velocity=1.0, acceleration=5.0, jerk=50.0)
KINDS = {
    "position": Limits(low=-0.2, high=0.3),
    "velocity": Limits(velocity=1.0),
    "velocity_acceleration": Limits(velocity=1.0, acceleration=5.0),
    "acceleration": Limits(acceleration=5.0),
    "jerk": Limits(jerk=50.0),
    "position_jerk": Limits(low=-0.2, high=0.3, velocity=1.0, jerk=50.0),
    "all": FULL,
    "all_each_dimension": Limits(
        np.array([-1, -0.2]), np.array([0.1, 2.0]), np.array([1, 2.0]), 5.0, np.array([99, 9.0])
    ),
}
every_kind = pytest.mark.parametrize("limits", KINDS.values(), ids=KINDS.keys())


def worst(limits: Limits, start: np.ndarray, written: list[np.ndarray]) -> float:
    """Largest excess over any limit, as a share of it."""
    value = np.concatenate([np.tile(start, (3, 1)), np.array(written)])
    low, high = (-np.inf if limits.low is None else limits.low), (np.inf if limits.high is None else limits.high)
    excess = [(low - value).max(), (value - high).max()]
    for bound in (limits.velocity, limits.acceleration, limits.jerk):
        value = np.diff(value, axis=0) / PERIOD
        if bound is not None:
            excess.append((np.abs(value) / bound).max() - 1)
    return max(excess)


@every_kind
@pytest.mark.parametrize("seed", range(5))
def test_no_course_of_targets_leads_out_of_the_limits(limits: Limits, seed: int):
    """Steps, ramps, noise and jumps by thousands, with braking in between."""
    rng, start = np.random.default_rng(seed), np.zeros(2)
    limiter, written, target = Limiter(limits, 2, PERIOD, start), [], np.zeros(2)
    for step in range(400):
        if step % 20 == 0:
            target, speed = (
                rng.normal(size=2) * rng.choice([0.01, 0.3, 3000]),
                rng.normal(size=2) * rng.choice([0, 0.02]),
            )
        target = target + speed
        brake = step % 50 > 44
        written.append(
            limiter.brake() if brake else limiter.apply(target + rng.normal(size=2) * rng.choice([0, 0.001]))
        )
    assert worst(limits, start, written) < 1e-6
    assert np.isfinite(written).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_no_list_of_numbers_leads_out_of_all_four_limits(targets: list[float]):
    limiter, start = Limiter(FULL, 1, PERIOD, np.zeros(1)), np.zeros(1)
    written = [limiter.apply(np.array([target])) for target in targets]
    assert worst(FULL, start, written) < 1e-6


@every_kind
def test_from_any_moment_the_robot_comes_to_rest_inside_the_limits_in_the_steps_of_a_stop(limits: Limits):
    rng, start = np.random.default_rng(0), np.zeros(2)
    limiter, written = Limiter(limits, 2, PERIOD, start), []
    for _ in range(20):
        target = rng.normal(size=2)
        written += [limiter.apply(target) for _ in range(rng.integers(1, 30))]
        written += [limiter.brake() for _ in range(limiter.stop_steps)]
        assert limiter.at_rest
    assert worst(limits, start, written) < 1e-6


@every_kind
def test_what_is_legal_is_written_to_the_bit_and_nothing_is_counted(limits: Limits):
    """A slow sine, from rest on, smooth in its third derivative."""
    limiter = Limiter(limits, 2, PERIOD, np.zeros(2))
    time = PERIOD * np.arange(1, 200)[:, None]
    course = 0.01 * np.sin(time * np.array([1.0, 1.5])) * (1 - np.exp(-(time**4)))
    for target in course:
        assert np.array_equal(limiter.apply(target), target)
    assert not any(limiter.clipped.values())


def ramp(rate: float, limits: Limits, speed: float = 0.9) -> np.ndarray:
    """A course from rest to `speed` and on at it, smooth; at most 5/6 of the limits on acceleration and jerk."""
    jerk = np.inf if limits.jerk is None else limits.jerk
    rising = 1.2 * max(1.875 * speed / limits.acceleration, np.sqrt(5.78 * speed / jerk))
    share = np.minimum(np.arange(1, int(1.5 * rising * rate)) / (rising * rate), 1)
    return np.cumsum(speed / rate * share**3 * (10 - 15 * share + 6 * share**2))[:, None]


@pytest.mark.parametrize(
    ("rate", "limits"),
    [
        (50, Limits(velocity=1.0, acceleration=0.3)),
        (200, Limits(velocity=1.0, acceleration=5.0, jerk=50.0)),
        (500, Limits(velocity=1.0, acceleration=5.0)),
        (500, Limits(velocity=1.0, acceleration=5.0, jerk=50.0)),
    ],
)
def test_at_any_rate_a_legal_ramp_to_nine_tenths_of_full_speed_is_written_to_the_bit(rate: int, limits: Limits):
    limiter = Limiter(limits, 1, 1 / rate, np.zeros(1))
    for target in ramp(rate, limits):
        assert np.array_equal(limiter.apply(target), target)


def test_limits_that_need_too_long_a_stop_are_refused_with_its_length():
    """2 * 5 / 50 + sqrt((5 / 50)^2 + 6 / 50) s are 561 periods of 1 ms, 281 of 2 ms."""
    limits = Limits(velocity=1.0, acceleration=5.0, jerk=50.0)
    with pytest.raises(ControlError, match="takes 561 periods from full speed and at most 512 are planned; lower"):
        Limiter(limits, 1, 0.001, np.zeros(1))
    assert Limiter(limits, 1, 0.002, np.zeros(1)).stop_steps == 281 + 3


@every_kind
def test_a_step_is_reached_within_1_percent_without_overshooting_by_more_than_5_percent(limits: Limits):
    target = np.array([0.09, 0.25])
    limiter = Limiter(limits, 2, PERIOD, np.zeros(2))
    written = np.array([limiter.apply(target) for _ in range(150)])
    assert (written / target).max() < 1.05
    assert np.abs(written[-1] / target - 1).max() < 0.01


@every_kind
def test_a_moving_target_is_caught_up_with(limits: Limits):
    """It has a head start of 0.02 and moves at 0.03 a second: after 2 s the lag is below a twentieth of the way."""
    limiter = Limiter(limits, 2, PERIOD, np.zeros(2))
    targets = 0.02 + 0.03 * PERIOD * np.arange(100)
    written = [limiter.apply(np.array([target, -target])) for target in targets]
    assert np.abs(written[-1] - np.array([targets[-1], -targets[-1]])).max() < 0.05 * targets[-1]


def test_each_kind_of_limit_counts_what_was_asked_beyond_it():
    limiter = Limiter(Limits(high=1.0, velocity=10.0), 1, PERIOD, np.array([0.9]))
    limiter.apply(np.array([1.05]))  # beyond the position, within 0.2 a period
    limiter.apply(np.array([0.5]))  # within the position, too fast
    limiter.apply(np.array([9.0]))  # both
    assert limiter.clipped == {"any": 3, "position": 2, "velocity": 2, "acceleration": 0, "jerk": 0}


def test_a_target_that_is_not_finite_is_counted_and_means_brake():
    limiter = Limiter(FULL, 2, PERIOD, np.zeros(2))
    for _ in range(10):
        limiter.apply(np.array([0.2, -0.1]))
    written = [limiter.apply(np.array([0.1, bad])) for bad in [np.nan, np.inf, -np.inf] * 20]
    assert np.isfinite(written).all() and limiter.at_rest
    assert limiter.clipped["not finite"] == 60


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.array([1.0, 0.0])])
@pytest.mark.parametrize("name", ["velocity", "acceleration", "jerk"])
def test_a_limit_that_is_not_above_0_is_refused_by_name(name: str, bad):
    with pytest.raises(ControlError, match=f"the limit on {name} is"):
        Limits(**{name: bad})


def test_low_above_high_is_refused():
    with pytest.raises(ControlError, match="low must not be above high"):
        Limits(low=1.0, high=np.array([2.0, 0.5]))


FAST = Limits(velocity=1.0, acceleration=5.0, jerk=100.0)


def course(limiter, target, steps=12):
    return np.array([limiter.apply(target) for _ in range(steps)])


@pytest.mark.parametrize("jump", [0.001, 0.003, 0.1, 0.3])
def test_one_jump_of_the_target_is_not_a_speed(jump):
    """After resting targets, a jump is answered as a first target is."""
    fresh, rested = (Limiter(FAST, 1, 0.02, np.zeros(1)) for _ in range(2))
    course(rested, np.zeros(1), 5)
    np.testing.assert_allclose(course(rested, np.full(1, jump)), course(fresh, np.full(1, jump)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("jump", [-0.03, -0.01, 0.01])
def test_a_brake_forgets_how_fast_the_target_moved(jump):
    limiter = Limiter(FAST, 1, 0.02, np.zeros(1))
    for step in range(1, 30):
        limiter.apply(np.array([0.018 * step]))
    while not limiter.at_rest:
        limiter.brake()
    fresh, target = Limiter(FAST, 1, 0.02, limiter.last), limiter.last + jump
    np.testing.assert_allclose(course(limiter, target), course(fresh, target), rtol=0, atol=1e-7)
