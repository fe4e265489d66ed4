"""Checks of what follows what: copies of episodes, sensors that froze, clocks that jump, odd lengths, missing ends."""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.inspection.findings import Evidence, Finding, Severity, counted, listed, number, percent
from diffpolicy.inspection.ranges import SAMPLE_ROWS, blocks, evenly, is_image, readable

FROZEN_STEPS = 20
MOVES = 0.8
REPEATED = 0.2
CLOCKS = ("timestamp", "timestamps", "time")
GAP = 1.5
PERIOD_SLACK = 0.1
ODD_LENGTH = 3.0


def duplicates(e: Evidence) -> Iterator[Finding]:
    """Episodes whose observations and actions are, byte for byte, those of an earlier one; images are not compared."""
    first: dict[bytes, int] = {}
    copies = [(i, original) for i, key in enumerate(_hashes(e.episodes)) if (original := first.setdefault(key, i)) != i]
    if copies:
        shown = ", ".join(f"{i} is {original}" for i, original in copies[:4]) + (", ..." if len(copies) > 4 else "")
        yield Finding(
            Severity.SUSPECT,
            "episodes",
            f"exact copies of earlier ones: {len(copies)} of {len(e.episodes)} ({shown})",
            "Keep one of each: copies weigh more in training, and a copy in the validation part hides overfitting.",
        )


def _hashes(episodes: Episodes) -> Iterator[bytes]:
    arrays = [array for array in episodes.obs.values() if not is_image(array)]
    for i, (start, length) in enumerate(zip(episodes.start.tolist(), episodes.length.tolist(), strict=True)):
        digest = blake2b(episodes.action[start : start + length].tobytes(), digest_size=16)
        for array in arrays:
            digest.update(array[start + i : start + i + length + 1].tobytes())
        yield digest.digest()


def still(episodes: Episodes, array: np.ndarray) -> np.ndarray:
    """Whether each step left the array as it was, `(N,)`; a last observation that was never recorded does not count."""
    same = np.zeros(len(array), dtype=bool)
    last = array[:0]
    for row, raw in blocks(array):
        block = np.asarray(raw).reshape(len(raw), -1)
        joined = np.concatenate([last, block]) if row else block
        same[row + len(block) - len(joined) : row + len(block) - 1] = (joined[1:] == joined[:-1]).all(1)
        last = block[-1:]
    ends = episodes.start + episodes.length + np.arange(len(episodes))
    assert episodes.has_final is not None
    same[ends[~episodes.has_final] - 1] = False
    return np.delete(same, ends)


def longest_run(episodes: Episodes, same: np.ndarray) -> tuple[int, int]:
    """Return (steps, first step) of the longest stretch within one episode in which `same` holds."""
    borders = episodes.start[1:] + np.arange(len(episodes) - 1)  # of `apart`: a step more between two episodes
    apart = np.insert(same, episodes.start[1:], False)
    edges = np.flatnonzero(np.concatenate([[True], ~apart, [True]]))
    runs = np.diff(edges) - 1
    longest = int(np.argmax(runs))
    first = int(edges[longest])
    return int(runs[longest]), first - int(np.searchsorted(borders, first))


def frozen(e: Evidence) -> Iterator[Finding]:
    """A sensor that normally moves at each step and then stands still; or nothing observed changes in many steps."""
    everything = np.ones(e.episodes.steps, dtype=bool)
    for r, array in zip(e.obs, e.episodes.obs.values(), strict=True):
        if is_image(array):  # only sampled, so nobody knows whether everything stood still
            everything[:] = False
            continue
        same = still(e.episodes, array)
        everything &= same
        steps, first = longest_run(e.episodes, same)
        if same.mean() <= 1 - MOVES and steps >= FROZEN_STEPS:
            yield Finding(
                Severity.SUSPECT,
                r.name,
                f"changes in {percent(1 - same.mean())} of the steps, yet stands still for {steps} steps from "
                f"{e.place(e.action, first)}",
                "Look at that stretch: a sensor or a driver that hung looks like this. Cut or leave out the episode.",
            )
    if not all(r.constant.all() for r in e.obs) and everything.mean() >= REPEATED:
        yield Finding(
            Severity.SUSPECT,
            "observations",
            f"{percent(everything.mean())} of the steps change no observation at all",
            "Pauses of a human demonstrator teach the policy to stand still: cut them. If it is every second or third "
            "step, the observations come at a lower rate than the actions: record at one rate.",
        )


def clocks(e: Evidence) -> Iterator[Finding]:
    """Timestamps that run backwards, leave gaps, or contradict the control period."""
    for name, array in e.episodes.info.items():
        if name.lower() in CLOCKS and array.size == len(array):
            yield from _clock(e, f"info {readable(name)!r}", np.asarray(array).reshape(-1))


def _clock(e: Evidence, where: str, time: np.ndarray) -> Iterator[Finding]:
    period = _period(e, time)
    if period is None:
        return
    declared = e.episodes.meta.get("control_period")
    expected = float(declared) if isinstance(declared, (int, float)) and declared > 0 else period
    back, gaps, first_back, first_gap = 0, 0, None, None
    for row, step in _ticks(e.episodes, time):
        backwards, jumps = step <= 0, step > (GAP * expected or np.inf)
        if first_back is None and backwards.any():
            first_back = row + int(np.argmax(backwards))
        if first_gap is None and jumps.any():
            first_gap = row + int(np.argmax(jumps))
        back, gaps = back + int(backwards.sum()), gaps + int(jumps.sum())
    if first_back is not None:
        yield Finding(
            Severity.WRONG,
            where,
            f"does not advance in {counted(back, 'step')}, the first after {e.place(e.action, first_back)}",
            "Sort the rows by time and drop repeated ones: steps out of order teach actions for another moment.",
        )
    if period > 0 and abs(period - expected) > PERIOD_SLACK * expected:
        yield Finding(
            Severity.SUSPECT,
            where,
            f"advances by {number(period)} a step, the metadata say control_period {number(expected)}",
            "Correct the one that is wrong: the policy will act at the control period.",
        )
    elif first_gap is not None:
        yield Finding(
            Severity.SUSPECT,
            where,
            f"leaves {counted(gaps, 'gap')} of more than {GAP} periods of {number(expected)}, the first after "
            f"{e.place(e.action, first_gap)}",
            "Frames were lost: cut the episode there, or resample to one rate.",
        )


def _period(e: Evidence, time: np.ndarray) -> float | None:
    """Median step within the episodes, from an evenly spaced sample; None where every episode is one step."""
    inner = np.delete(np.arange(len(time) - 1), e.episodes.start[1:] - 1)
    picked = inner[evenly(len(inner), SAMPLE_ROWS)]
    steps = time[picked + 1].astype(np.float64) - time[picked]
    return max(float(np.median(steps)), 0.0) if len(steps) else None


def _ticks(episodes: Episodes, time: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, differences to the next row), one period where the next row is another episode's."""
    for row, block in blocks(time):
        following = np.append(np.asarray(block[1:], dtype=np.float64), time[min(row + len(block), len(time) - 1)])
        step = following - np.asarray(block, dtype=np.float64)
        ends = episodes.start + episodes.length - 1
        inside = ends[(ends >= row) & (ends < row + len(block))] - row
        step[inside] = np.nan  # compares false with everything
        yield row, step


def odd_lengths(e: Evidence) -> Iterator[Finding]:
    """Episodes of less than a third of what nine in ten have, or of more than three times it."""
    length = e.episodes.length
    low, high = np.percentile(length, [10, 90])
    for odd, border, word in (
        (np.flatnonzero(length < low / ODD_LENGTH), low, "short"),
        (np.flatnonzero(length > high * ODD_LENGTH), high, "long"),
    ):
        if len(odd):
            side = "at least" if word == "short" else "at most"
            yield Finding(
                Severity.NOTE if e.episodes.terminated[odd].all() else Severity.SUSPECT,
                "episodes",
                f"far too {word} for the rest: {len(odd)} of {len(length)}, of {_steps(length[odd])} steps where nine "
                f"in ten have {side} {int(border)} ({'episodes' if len(odd) > 1 else 'episode'} {listed(odd)})",
                "Look at them: episodes that failed or were cut early do not belong into imitation."
                if word == "short"
                else "Look at them: a recording that was not stopped, or several episodes without a border.",
            )


def _steps(length: np.ndarray) -> str:
    low, high = int(length.min()), int(length.max())
    return str(low) if low == high else f"{low} to {high}"


def rewards_and_ends(e: Evidence) -> Iterator[Finding]:
    """What value learning would need and the dataset does not have; all of it is fine for imitation."""
    episodes = e.episodes
    assert episodes.has_final is not None
    unfinished = not episodes.has_final.any()
    if not e.rewarded:
        more = [
            *(["no observation after a last action"] if unfinished else []),
            *(["no terminated episode"] if not episodes.terminated.any() else []),
        ]
        yield Finding(
            Severity.NOTE,
            "reward",
            "every reward is 0" + ("; there is also " + " and ".join(more) if more else ""),
            "Right for imitation. Reinforcement learning and filtering by return cannot work on this.",
        )
        return
    if unfinished:
        yield Finding(
            Severity.NOTE,
            "observations",
            "the one after the last action is not known in any episode",
            "Right for imitation. Value learning leaves out the last step of each episode: record next_observations.",
        )
    if not episodes.terminated.any():
        yield Finding(
            Severity.NOTE,
            "terminated",
            "no episode ever terminates, all are cut by time",
            "Right for a task without an end. If success or failure ends it, mark it: value learning would otherwise "
            "count on rewards after the end.",
        )


CHECKS = (duplicates, frozen, clocks, odd_lengths, rewards_and_ends)
