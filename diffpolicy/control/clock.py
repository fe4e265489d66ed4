"""Time for a control loop: clocks, the beat of the loop, and where plans are made beside it.

    deadline   |    |    |    |    |    |         one beat a period, on a grid that does not drift
    beat       |    |    |          |  |          late by over half a period: that beat is skipped, never made up

The real and the virtual way differ in two small objects only: a `Clock`, and a `Worker` that runs one job at a time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, Protocol

import numpy as np

from diffpolicy.control.threads import release_helpers

RING = 1 << 16


class Clock(Protocol):
    """Seconds from any origin."""

    def now(self) -> float:
        """Return the time."""
        ...

    def sleep_until(self, moment: float) -> None:
        """Return at `moment`, at once if it has passed."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Return the time."""
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        """Sleep."""
        time.sleep(max(0.0, moment - time.monotonic()))


class VirtualClock:
    """A clock that goes where it is told; sleeping takes no time."""

    def __init__(self, start: float = 0.0) -> None:
        self.time = start

    def now(self) -> float:
        """Return the time."""
        return self.time

    def sleep_until(self, moment: float) -> None:
        """Go there."""
        self.time = max(self.time, moment)


class Metronome:
    """The beat of a loop: `wait` returns once a period, and never asks to sleep longer than one.

    `missed` counts beats skipped, `lateness` holds how late the last ones came, in seconds, in memory of fixed size.
    """

    def __init__(self, clock: Clock, period: float) -> None:
        self.clock = clock
        self.period = period
        self.deadline = clock.now()
        self.missed = 0
        self.beats = 0
        self._ring = np.zeros(RING, dtype=np.float32)

    def wait(self) -> None:
        """Sleep until the next beat."""
        now = self.clock.now()
        late = now - self.deadline
        if late > self.period / 2:
            skipped = ceil(late / self.period - 0.5)
            self.missed += skipped
            self.deadline += skipped * self.period
        self.deadline = min(self.deadline, now + self.period)  # a clock that was set back does not stop the arm
        self.clock.sleep_until(self.deadline)
        self._ring[self.beats % RING] = max(0.0, self.clock.now() - self.deadline)
        self.beats += 1
        self.deadline += self.period

    @property
    def lateness(self) -> np.ndarray:
        """Seconds by which each of the last beats came late."""
        return self._ring[: min(self.beats, RING)]


@dataclass(frozen=True)
class Outcome:
    """What a job came to: its value or its error."""

    value: Any = None
    error: BaseException | None = None


def outcome_of(job: Callable[[], Any]) -> Outcome:
    """Run a job; an error is an outcome."""
    try:
        return Outcome(job())
    except Exception as error:
        return Outcome(error=error)


class Worker(Protocol):
    """Runs one job at a time beside the loop."""

    def submit(self, job: Callable[[], Any]) -> None:
        """Begin a job; never waits."""
        ...

    def poll(self) -> Outcome | None:
        """Return the outcome of a job that has ended since the last call; never waits."""
        ...

    def close(self) -> None:
        """Take no more jobs; called when the robot is at rest, so it may wait a little for the last one."""
        ...


class ThreadWorker:
    """One daemon thread: a job that never ends keeps the loop never, the process for `patience` seconds."""

    def __init__(self, patience: float = 5.0) -> None:
        self.patience = patience
        self._jobs: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        release_helpers()
        self._thread = Thread(target=self._work, daemon=True, name="diffpolicy-plan")
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._outcomes.put(outcome_of(job))

    def submit(self, job: Callable[[], Any]) -> None:
        """Queue a job."""
        self._jobs.put(job)

    def poll(self) -> Outcome | None:
        """Return the next outcome, if there is one."""
        try:
            return self._outcomes.get_nowait()
        except Empty:
            return None

    def close(self) -> None:
        """End the thread after its job: a process that exits inside torch's code would abort."""
        self._jobs.put(None)
        self._thread.join(self.patience)


class VirtualWorker:
    """Jobs that take as long as `duration()` says, in seconds of a virtual clock; infinite never ends."""

    def __init__(self, clock: Clock, duration: Callable[[], float]) -> None:
        self.clock = clock
        self.duration = duration
        self._ends = float("inf")
        self._outcome = Outcome()

    def submit(self, job: Callable[[], Any]) -> None:
        """Run the job now and keep its outcome until its time."""
        self._outcome = outcome_of(job)
        self._ends = self.clock.now() + self.duration()

    def poll(self) -> Outcome | None:
        """Return the outcome once its time has come."""
        if self.clock.now() < self._ends:
            return None
        self._ends = float("inf")
        return self._outcome

    def close(self) -> None:
        """Forget the job."""
        self._ends = float("inf")


class Watchdog:
    """Calls `bark` once, from its own thread, if `beat` was not called for `patience` seconds; use it in a `with`."""

    def __init__(self, patience: float, bark: Callable[[], None]) -> None:
        self.patience = patience
        self.bark = bark
        self._last = time.monotonic()
        self._end = Event()
        self._thread = Thread(target=self._watch, daemon=True, name="diffpolicy-watchdog")

    def beat(self) -> None:
        """Say that the loop is alive."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(self.patience / 4):
            if time.monotonic() - self._last > self.patience:
                self.bark()
                return

    def __enter__(self) -> "Watchdog":
        """Begin to watch."""
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._end.set()
