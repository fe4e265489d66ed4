r"""Batches of plans: those who wait while a plan is made are planned together in the next.

    client 1   ask ------------------- chunk
    client 2      ask ------------------------------ chunk        one thread plans, so nothing waits for a timer:
    client 3       ask ----------------------------- chunk        alone a client's plan starts at once
    thread     [ plan of 1           ][ plan of 2, 3 ]

A row's result does not depend on whom it is planned with, up to the rounding of other batch sizes (1e-5 of an action).
"""

import asyncio
import time
from collections import deque
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from diffpolicy.control.threads import release_helpers
from diffpolicy.diffusion.prefix import Prefix
from diffpolicy.errors import ControlError, first_line
from diffpolicy.policy import Policy

RECENT = 4096


@dataclass(frozen=True)
class Wish:
    """Arguments of a plan of n rows: `history {name: (n, To, ...)}`, `noise (draws, n, Tp, Da)`, `prefix` or None."""

    history: Mapping[str, np.ndarray]
    noise: np.ndarray
    prefix: Prefix | None = None

    @property
    def rows(self) -> int:
        """`n`."""
        return self.noise.shape[1]

    @property
    def kind(self) -> Hashable:
        """What wishes of one batch have in common."""
        if self.prefix is None:
            return len(self.noise)
        guide = self.prefix.guide
        named = (guide.func, tuple(sorted(guide.keywords.items(), key=str))) if isinstance(guide, partial) else guide
        return len(self.noise), named, self.prefix.repeats


@dataclass
class Figures:
    """How long plans took and how many rows they had, of the last ones."""

    plans: int = 0
    plan_ms: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    batch: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))

    def count(self, seconds: float, rows: int) -> None:
        """Count a plan."""
        self.plans += 1
        self.plan_ms.append(1e3 * seconds)
        self.batch.append(rows)


class Batcher:
    """Plans for many, one batch at a time, in a thread of its own; use it in an event loop, with `run` as a task.

    Args:
        policy: with a compiled plan or without.
        max_rows: of one batch; a wish has at most as many.
    """

    def __init__(self, policy: Policy, max_rows: int = 64) -> None:
        self.policy, self.max_rows = policy, max_rows
        self.figures = Figures()
        self._waiting: deque[tuple[Wish, asyncio.Future[np.ndarray]]] = deque()
        self._asked = asyncio.Event()
        release_helpers()
        self._thread = ThreadPoolExecutor(1, "diffpolicy-plan")

    async def plan(self, wish: Wish) -> np.ndarray:
        """Return chunks `(n, Tp, Da)`.

        Raises:
            ControlError: if the policy failed, or planned what is not finite.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((wish, future))
        self._asked.set()
        return await future

    async def run(self) -> None:
        """Plan until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._asked.wait()
            batch = self._next()
            if not batch:
                self._asked.clear()
                continue
            begin = time.perf_counter()
            chunks = await loop.run_in_executor(self._thread, self._planned, [wish for wish, _ in batch])
            self.figures.count(time.perf_counter() - begin, sum(wish.rows for wish, _ in batch))
            for (_, future), chunk in zip(batch, chunks, strict=True):
                _settle(future, chunk)

    def close(self) -> None:
        """Wait for the plan being made: a process that exits inside torch's code would abort."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _next(self) -> list[tuple[Wish, "asyncio.Future[np.ndarray]"]]:
        """Take the one who waits longest, and those of its kind that fit into a batch with it."""
        batch, rest, rows = [], deque(), 0
        for wish, future in self._waiting:
            if future.cancelled():
                continue
            if not batch or (wish.kind == batch[0][0].kind and rows + wish.rows <= self.max_rows):
                batch.append((wish, future))
                rows += wish.rows
            else:
                rest.append((wish, future))
        self._waiting = rest
        return batch

    def _planned(self, wishes: list[Wish]) -> list[np.ndarray | ControlError]:
        """Plan one batch; if that fails, each alone: nobody fails because of another."""
        try:
            return [*self._together(wishes)]
        except Exception as error:
            if len(wishes) > 1:
                return [self._planned([wish])[0] for wish in wishes]
            return [ControlError(f"the policy failed: {type(error).__name__}: {first_line(error)}")]

    def _together(self, wishes: list[Wish]) -> list[np.ndarray]:
        """Plan one batch: one transfer to the device, one back."""
        device = self.policy.device
        names, rows = wishes[0].history, np.cumsum([wish.rows for wish in wishes])[:-1]
        history = {n: torch.from_numpy(np.concatenate([w.history[n] for w in wishes])).to(device) for n in names}
        noise = torch.from_numpy(np.concatenate([wish.noise for wish in wishes], axis=1)).to(device)
        chunk = self.policy.plan(history, noise, _one([w.prefix for w in wishes if w.prefix is not None], device))
        return np.split(chunk.float().cpu().numpy(), rows)


def _one(prefixes: list[Prefix], device: torch.device) -> Prefix | None:
    if not prefixes:
        return None
    chunk, weights = (torch.cat([getattr(p, key) for p in prefixes]).to(device) for key in ("chunk", "weights"))
    return replace(prefixes[0], chunk=chunk, weights=weights)


def _settle(future: "asyncio.Future[np.ndarray]", chunk: np.ndarray | ControlError) -> None:
    if future.done():  # its client has gone
        return
    if isinstance(chunk, ControlError):
        future.set_exception(chunk)
    elif not np.isfinite(chunk).all():
        future.set_exception(ControlError("the policy planned a number that is not finite; do not execute it"))
    else:
        future.set_result(chunk)
