r"""Runner: a policy at a fixed rate, on a robot or on a virtual clock; inference runs beside the loop.

    beat    read -> history -> [ask for a chunk] -> [take the chunk that is ready] -> action -> limits -> write
                                     |                        ^
                                     +----- worker: plan -----+        d actions were consumed meanwhile

    policy = Policy.load("runs/arm")
    runner = Runner(policy, rate_hz=50, strategy=RealTime(), safety=Safety(Limits(velocity=1.0)))
    report = runner.run(read, write, start=joint_positions())

What cannot happen: an action that is not finite, outside the limits, or from an observation older than allowed; a wait
longer than a period inside the loop; a loop that goes on after the policy or `read` failed. It then comes to rest.
Where it cannot (`write` fails or hangs, the loop itself fails, it still moves when it should not) `stop` is called and
the report is not `ok`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from diffpolicy.control.clock import Clock, Metronome, ThreadWorker, WallClock, Watchdog, Worker
from diffpolicy.control.loop import Loop, Safety, Stamped
from diffpolicy.control.report import Report
from diffpolicy.control.strategies import Planner, Strategy, Synchronous, check_delay
from diffpolicy.errors import ControlError
from diffpolicy.observations import Obs


@dataclass(frozen=True)
class Runner:
    """A policy, how it is run, and how it is kept safe; a value, so one runner can drive many robots.

    Args:
        policy: a `Policy`, or anything with its `spec`, `normalizer`, `device`, `draws` and `plan`.
        rate_hz: actions a second.
        strategy: how chunks are joined.
        safety: limits, and what happens when something is late or fails.
        delay: actions that planning is expected to take, counted as the first of 10 measured ones: what is expected
            later is the largest of the last 10.
        warm_up: plans made and thrown away while the robot still rests: the first ones compile and load. The one after
            them is measured; 0 for none, and nothing is measured before the robot moves.
        seed: of the noise.

    Raises:
        ControlError: if a number is impossible, the rate is not the data's, `n_obs_steps - 1 + n_action_steps + delay`
            exceeds the horizon, or the policy was not trained for what the strategy asks of it.
    """

    policy: Planner
    rate_hz: float
    strategy: Strategy = field(default_factory=Synchronous)
    safety: Safety = field(default_factory=Safety)
    delay: int = 0
    warm_up: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        spec = self.policy.spec
        if not (np.isfinite(self.rate_hz) and self.rate_hz > 0) or self.delay < 0 or self.warm_up < 0:
            raise ControlError(
                f"got rate_hz {self.rate_hz}, delay {self.delay} and warm_up {self.warm_up}; give a rate above 0 and "
                "whole numbers of at least 0"
            )
        check_delay(self.policy, self.strategy, self.delay)
        trained = spec.control_period
        if trained is not None and abs(trained * self.rate_hz - 1) > 0.01:
            raise ControlError(
                f"rate_hz is {self.rate_hz:g} and the policy was trained on actions {trained:g} s apart "
                f"({1 / trained:g} Hz); run it at that rate"
            )

    @property
    def period(self) -> float:
        """Seconds between actions."""
        return 1 / self.rate_hz

    def start(self, worker: Worker, start: np.ndarray | None = None, now: float = 0.0) -> Loop:
        """Return a loop to step by hand; arguments as in `run`."""
        return Loop(self, worker, start, now)

    def run(
        self,
        read: Callable[[], Obs | Stamped | None],
        write: Callable[[np.ndarray], object],
        start: np.ndarray | None = None,
        seconds: float | None = None,
        stop: Callable[[], object] | None = None,
        clock: Clock | None = None,
        worker: Worker | None = None,
    ) -> Report:
        """Drive a robot until `seconds` have passed, Ctrl-C, or a failure; then it is at rest, or the report not `ok`.

        Args:
            read: returns the newest observation, None if there is no new one; called once a period.
            write: takes an action `(Da,)`, physical units; called at most once a period.
            start: the action that means "stay where you are now"; needed with limits on movement.
            seconds: how long to run.
            stop: emergency stop, called if the robot cannot be brought to rest by `write`; from another thread if
                `read` or `write` hang.
            clock: the wall clock if None.
            worker: where plans are made, a thread if None.

        Raises:
            ControlError: if `start` is missing, or it or `safety.rest` is outside the limits.
        """
        clock, worker = clock or WallClock(), worker or ThreadWorker()
        try:
            loop, metronome = self.start(worker, start, clock.now()), Metronome(clock, self.period)
            end = float("inf") if seconds is None else clock.now() + seconds
            _play(loop, metronome, end, read, write, stop or (lambda: None))
        finally:
            worker.close()
        return replace(loop.report, missed=metronome.missed, lateness=metronome.lateness)


def _play(
    loop: Loop,
    metronome: Metronome,
    end: float,
    read: Callable[[], Obs | Stamped | None],
    write: Callable[[np.ndarray], object],
    stop: Callable[[], object],
) -> None:
    """Beat until the loop has ended, which is told to at the moment `end`."""
    patience = max(0.5, 10 * metronome.period)

    def bark() -> None:
        loop.fail(f"read or write hung for {patience:g} s", ended=True)
        stop()

    with Watchdog(patience, bark) as watchdog:
        while not loop.ended:
            try:
                metronome.wait()
                watchdog.beat()
                if metronome.clock.now() >= end:
                    loop.finish("its time is over")
                _beat(loop, metronome.clock, read, write, stop)
            except KeyboardInterrupt:
                loop.finish("interrupted")


def _beat(
    loop: Loop,
    clock: Clock,
    read: Callable[[], Obs | Stamped | None],
    write: Callable[[np.ndarray], object],
    stop: Callable[[], object],
) -> None:
    """One period; whatever fails, the loop knows it."""
    obs = None
    if not loop.ending:
        try:
            obs = read()
        except Exception as error:
            loop.fail("read failed", error)
    try:
        action = loop.step(clock.now(), obs)
    except Exception as error:
        loop.fail("the loop failed", error, ended=True)
        stop()
        return
    if loop.unsettled:
        stop()
    if action is None:
        return
    try:
        write(action)
    except Exception as error:
        loop.fail("write failed", error, ended=True)
        stop()
