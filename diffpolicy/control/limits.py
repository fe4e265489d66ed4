r"""Limits on what is written to a robot: position, velocity, acceleration and jerk, all of them kept at every step.

Clipping one after the other cannot keep all four: an arm at full speed one step before its end stop has no legal action
left. So with every action goes a way to come to rest inside the limits, the *stop*, a sequence of positions:

    before   p p p | s1 s2 s3 ... s s        the stop kept from the step before, legal by construction
    asked    p p p | x  c1 c2 ... c c        an action, then a stop from there
    written  p p p | s + l (c - s)           with the largest l in [0, 1] that is legal

Positions, velocities, accelerations and jerks are linear in the sequence, so a mixture of a legal sequence and another
is legal up to one number `l` a dimension, found by one division; what is left of it is the stop of the next step. The
stop after an action is that of least jerk (least acceleration, where jerk is free) over n steps; several n are tried.

An action from which a stop is legal is written as it is. Otherwise the arm heads for where the target would come to
rest if it stopped too: that catches up with a moving target, and overshoots a resting one by less than 5 % of the way.

The longest stop takes `1.5 v / a` seconds, with a limit on jerk `max(2.25 v / a, 2 a / j + sqrt((a / j)^2 + 6 v / j))`.
Limits that need more than 512 periods are refused. Without a limit on velocity it has 48 of them, and the arm goes no
faster than it can stop in those. `apply` takes 0.2 ms for 7 dimensions and 48 periods, about 1 ms for 256 and more:
half a period at 500 Hz.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import chain

import numpy as np

from diffpolicy.errors import ControlError

Bound = np.ndarray | float | None
LONGEST = 512  # steps of a stop
UNBOUNDED = 48  # where velocity has no limit
TINY = 1e-300
SLACK = 1e-9  # rounding of a comparison, as a share of the limit


@dataclass(frozen=True)
class Limits:
    """Limits of each action dimension, in the action's units and seconds; None for none.

    Args:
        low: smallest action, number or `(Da,)`.
        high: largest action.
        velocity: largest change of the action per second.
        acceleration: largest change of that per second.
        jerk: largest change of that per second.

    Raises:
        ControlError: if a bound is not a number or not positive, or `low` is above `high`.
    """

    low: Bound = None
    high: Bound = None
    velocity: Bound = None
    acceleration: Bound = None
    jerk: Bound = None

    def __post_init__(self) -> None:
        for name in ("velocity", "acceleration", "jerk"):
            bound = getattr(self, name)
            if bound is not None and not np.all(np.asarray(bound) > 0):
                raise ControlError(f"the limit on {name} is {bound}; give numbers above 0, or None for no limit")
        low, high = _filled(self.low, -np.inf), _filled(self.high, np.inf)
        if not np.all(low <= high):
            raise ControlError(f"the limits have low {self.low} and high {self.high}; low must not be above high")

    @property
    def moving(self) -> bool:
        """Whether a limit needs to know what was written before."""
        return any(bound is not None for bound in (self.velocity, self.acceleration, self.jerk))


def _filled(bound: Bound, missing: float) -> np.ndarray:
    return np.asarray(missing if bound is None else bound, dtype=np.float64)


class Limiter:
    """Keeps one robot's actions inside its limits; `clipped` counts what was asked beyond each, `any` what was changed.

    Args:
        limits: of the robot.
        dim: `Da`.
        period: seconds between actions.
        start: the action that means "stay where you are now", `(Da,)`; None only without limits on movement.

    Raises:
        ControlError: if `start` is missing, has another shape, or lies outside the limits, or a stop from full speed
            takes more than 512 periods.
    """

    def __init__(self, limits: Limits, dim: int, period: float, start: np.ndarray | None) -> None:
        self.clipped: Counter[str] = Counter()
        steps = period ** np.arange(1, 4)
        moves = [_filled(bound, np.inf) for bound in (limits.velocity, limits.acceleration, limits.jerk)]
        high = [_filled(limits.high, np.inf), *(bound * step for bound, step in zip(moves, steps, strict=True))]
        low = [_filled(limits.low, -np.inf), *(-bound for bound in high[1:])]
        self._low, self._high = (np.stack([np.broadcast_to(b, (dim,)) for b in side]) for side in (low, high))
        self._stops = bool(np.isfinite(self._high[2:]).any())  # velocity alone can end at once
        self._past: np.ndarray | None = None
        self._targets = np.zeros((0, dim))
        if self._stops:
            self._prepare(_lengths(self._high), bool(np.isfinite(self._high[3]).any()))
        if start is not None:
            self._begin(self.check(start, "start"))
        elif limits.moving:
            raise ControlError(
                "limits on velocity, acceleration or jerk need to know where the robot is: give run(start=...) the "
                "action that means 'stay'"
            )

    def _prepare(self, lengths: list[int], least_jerk: bool) -> None:
        """Matrices from (the last three positions, the action asked) to sequences and their derivatives."""
        size = lengths[-1] + 3
        sequences = np.stack([_sequence(n, size, least_jerk) for n in lengths])
        past = np.broadcast_to(np.eye(3, 4), (len(lengths), 3, 4))
        self._sequences = np.tile(sequences, (2, 1, 1))  # once from the target, once heading for where it would rest
        self._asked_rows = np.tile(_derivatives(np.concatenate([past, sequences], axis=1)), (2, 1, 1))
        self._rest = sequences[:, -1]
        self._low_rows, self._high_rows = (side.repeat(size, axis=0) for side in (self._low, self._high))

    def check(self, action: np.ndarray, name: str) -> np.ndarray:
        """Return an action in float64, refused by its name if it is none or outside the limits on position."""
        action, (dim,) = np.array(action, dtype=np.float64), self._low[0].shape
        if action.shape != (dim,) or not np.isfinite(action).all():
            raise ControlError(f"{name} is {action}; give the {dim} numbers of an action")
        if (action < self._low[0]).any() or (action > self._high[0]).any():
            raise ControlError(
                f"{name} is {action}, outside the limits {self._low[0]} to {self._high[0]}; move it inside"
            )
        return action

    def _begin(self, start: np.ndarray) -> None:
        self._past = np.tile(start, (3, 1))
        if self._stops:
            self._stop = np.tile(start, (self._sequences.shape[1], 1))

    @property
    def last(self) -> np.ndarray | None:
        """The action written last, or the start; None before."""
        return None if self._past is None else self._past[2]

    @property
    def stop_steps(self) -> int:
        """Steps after which `brake` has brought the robot to rest, whatever it was doing."""
        return self._sequences.shape[1] if self._stops else 1

    @property
    def at_rest(self) -> bool:
        """Whether the last action can be repeated for ever."""
        if not self._stops or self._past is None:
            return True
        return bool(np.abs(np.concatenate([self._past, self._stop]) - self._stop[-1]).max() <= SLACK)

    def apply(self, target: np.ndarray) -> np.ndarray:
        """Return the nearest legal action in the direction of `target` `(Da,)`; one that is not finite means brake."""
        if not np.isfinite(target).all():
            self.clipped["not finite"] += 1
            return self.brake()
        action = self._towards(target) if self._stops else self._clip(target)
        self._count(target, action)
        return self._write(action)

    def _clip(self, target: np.ndarray) -> np.ndarray:
        low, high = self._low[0], self._high[0]
        if self._past is not None:
            low, high = np.maximum(low, self._past[2] + self._low[1]), np.minimum(high, self._past[2] + self._high[1])
        return np.minimum(np.maximum(target, low), high)

    def brake(self) -> np.ndarray:
        """Return the next action of the stop."""
        assert self._past is not None, "nothing was written yet"
        if not self._stops:
            return self._write(self._past[2].copy())
        action, self._targets = self._stop[0].copy(), self._targets[:0]
        self._follow(self._stop)
        return self._write(action)

    def _towards(self, target: np.ndarray) -> np.ndarray:
        """Mix the stop with that after the target if it is legal, else with one that ends where the target's would."""
        assert self._past is not None
        n, dims = len(self._rest), np.arange(len(target))
        known = np.empty((2 * n, 4, len(target)))
        known[:, :3], known[:n, 3], known[n:, 3] = self._past, target, self._heading(target)
        safe = _derivatives(np.concatenate([self._past, self._stop]))
        change = self._asked_rows @ known - safe
        room = np.where(change > 0, self._high_rows, self._low_rows) - safe
        share = np.divide(room, change, out=np.ones_like(change), where=np.abs(change) > TINY).min(1).clip(0.0, 1.0)
        progress = share * np.abs(known[:, 3] - self._stop[0])
        progress[:n] = np.where(share[:n] >= 1.0, np.inf, -1.0)  # legal as it is
        best = progress.argmax(0)
        asked = np.einsum("dlk,kd->ld", self._sequences[best], known[best, :, dims].T)
        stop = self._stop + share[best, dims] * (asked - self._stop)
        if (legal := best < n).any():
            stop[0, legal] = target[legal]  # to the bit
        self._follow(stop)
        return stop[0]

    def _heading(self, target: np.ndarray) -> np.ndarray:
        """Actions, one for each length of stop, from which a stop ends where the target's would, `(n, Da)`."""
        assert self._past is not None
        self._targets = np.concatenate([self._targets[-3:], target[None]])
        steps = self._targets[1:] - self._targets[:-1]
        speed = np.median(steps, axis=0) if len(steps) == 3 else np.zeros_like(target)  # one jump is not a speed
        moving = np.stack([target - 3 * speed, target - 2 * speed, target - speed, target])
        return (self._rest @ moving - self._rest[:, :3] @ self._past) / self._rest[:, 3:]

    def _follow(self, stop: np.ndarray) -> None:
        self._stop = np.concatenate([stop[1:], stop[-1:]])

    def _count(self, target: np.ndarray, action: np.ndarray) -> None:
        if not (np.abs(action - target) > SLACK * (1 + np.abs(target))).any():
            return
        self.clipped["any"] += 1
        value, before = target, self._past
        for order, name in enumerate(("position", "velocity", "acceleration", "jerk")):
            slack = SLACK * (1 + np.abs(self._high[order]))
            self.clipped[name] += int(((value > self._high[order] + slack) | (value < self._low[order] - slack)).any())
            if before is None or order == 3:
                return
            value, before = value - before[-1], before[1:] - before[:-1]

    def _write(self, action: np.ndarray) -> np.ndarray:
        self._past = np.tile(action, (3, 1)) if self._past is None else np.concatenate([self._past[1:], action[None]])
        return action


def _lengths(high: np.ndarray) -> list[int]:
    """Steps of the stops to try: the longest brakes from full speed; its half, its quarter, of a long one its eighth.

    From speed v and acceleration a that of least jerk over T brakes by at most `a / 3 + 1.5 v / T` and begins with the
    jerk `4 a / T + 6 v / T^2`; it comes from a state that would reach full speed, so v + a^2 / 2j is at most that.
    """
    velocity, acceleration, jerk = (bound.astype(np.float64) for bound in high[1:])
    if not np.isfinite([acceleration, jerk]).any():
        return [0]
    with np.errstate(invalid="ignore"):
        acceleration = np.minimum(acceleration, np.sqrt(2 * jerk * velocity))  # more would lead beyond full speed
        needed = np.where(np.isfinite(jerk).any(), 2.25, 1.5) * velocity / acceleration
        needed = np.maximum(needed, 2 * acceleration / jerk + np.sqrt((acceleration / jerk) ** 2 + 6 * velocity / jerk))
        needed = np.where(np.isfinite(velocity), np.nan_to_num(needed, nan=0), UNBOUNDED)
    longest = max(4, int(np.ceil(needed.max())))
    if longest > LONGEST:
        raise ControlError(
            f"a stop within the limits takes {longest} periods from full speed and at most {LONGEST} are planned; "
            "lower the limit on velocity, raise those on acceleration and jerk, or run at a lower rate"
        )
    parts = (1, 2, 4, 8) if longest > UNBOUNDED else (1, 2, 4)
    return sorted({max(1, longest // part) for part in parts})


def _derivatives(positions: np.ndarray) -> np.ndarray:
    """Of three past positions and those after them, `(..., 3 + n, k)`, the latter and what was done, `(..., 4 n, k)`.

    Positions, then their first, second and third differences, none divided by the period.
    """
    rows = []
    for order in range(4):
        rows.append(positions[..., 3 - order :, :])
        positions = np.diff(positions, axis=-2)
    return np.concatenate(rows, axis=-2)


def _sequence(n: int, size: int, least_jerk: bool) -> np.ndarray:
    """Matrix `(size, 4)` from (three past positions, the next one) to it, a stop over `n` steps, and rest."""
    velocity, acceleration = np.array([0.0, 0, -1, 1]), np.array([0.0, 1, -2, 1])
    changes = _least_jerk(n, velocity, acceleration) if least_jerk and n else [-velocity / max(n, 1)] * n
    position, rows = np.array([0.0, 0, 0, 1]), []
    for change in chain(changes, np.zeros((size - n - 1, 4))):
        rows.append(position)
        velocity = velocity + change if n else np.zeros(4)
        position = position + velocity
    return np.stack([*rows, position])


def _least_jerk(n: int, velocity: np.ndarray, acceleration: np.ndarray) -> np.ndarray:
    """Accelerations of n steps that end a velocity, with the least sum of squared jerks; linear in both, `(n, 4)`.

    Jerk is `B a - a_0 e_1` with `B` the differences of (a_1 ... a_n, 0); minimise under `sum a = -v` (Lagrange).
    """
    difference = np.eye(n + 1, n) - np.eye(n + 1, n, -1)
    system = np.block([[difference.T @ difference, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    right = np.zeros((n + 1, 4))
    right[0] = acceleration
    right[n] = -velocity
    return np.linalg.solve(system, right)[:n]
