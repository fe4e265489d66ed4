"""Windows: training batches by index arithmetic, a whole batch at once, on the CPU or resident on the GPU.

For a step of an episode of L steps, with To = 2, Tp = 6, at step 0 and at step L-2:

    obs       o0 o0                      o(L-3) o(L-2)             edges repeat
    action    a0 a0 a1 a2 a3 a4          a(L-3) a(L-2) a(L-1) a(L-1) a(L-1) a(L-1)
    valid      0  1  1  1  1  1             1      1      1      0      0      0
    index To-1 of the chunk is the action of the step itself; no window ever crosses an episode

and for critics, over `n` executed steps: `reward = sum_j gamma^j r(step+j)`, `next_obs` the history ending `n` steps
later, `discount = gamma^n`, or 0 where the task truly ended. Where the recording ends first, `n` shrinks to it. An
`info` array called `mask` is False at steps after which no value follows although the recording goes on (a goal
reached on the way, as OGBench and robomimic have it): a return ends there as at a true end.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.spec import Spec

Obs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """B windows: `obs {name: (B, To, ...)}`, `action (B, Tp, Da)`, `valid (B, Tp)`, and the return: `(B,)` each.

    `reward` sums over `steps` steps, `next_obs` and `discount` are what follows them.
    """

    obs: Obs
    action: torch.Tensor
    valid: torch.Tensor
    reward: torch.Tensor
    next_obs: Obs
    discount: torch.Tensor
    steps: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; nothing waits for its way from the host to a GPU."""
        if self.action.device == device:
            return self

        def moved(array: torch.Tensor) -> torch.Tensor:
            if array.device.type == "cpu" and device.type == "cuda":
                return array.pin_memory().to(device, non_blocking=True)
            return array.to(device)

        return Batch(
            obs={name: moved(array) for name, array in self.obs.items()},
            action=moved(self.action),
            valid=moved(self.valid),
            reward=moved(self.reward),
            next_obs={name: moved(array) for name, array in self.next_obs.items()},
            discount=moved(self.discount),
            steps=moved(self.steps),
        )


def _tensor(array: np.ndarray, device: str | torch.device) -> torch.Tensor:
    # Shares memory on the CPU, so a memory-mapped store (opened copy-on-write) stays on disk.
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def _single(rows: torch.Tensor) -> torch.Tensor:
    # Cast here and not when the arrays are taken in: a memory-mapped store must not be copied.
    return rows.float() if rows.dtype == torch.float64 else rows


def _steps_to_masked(mask: np.ndarray | None, n_step: int, device: str | torch.device) -> torch.Tensor | None:
    """Steps from each row to the first masked one, that one included, `(N,)`; more than `n_step` where none is near."""
    if mask is None:
        return None
    rows = np.arange(len(mask))
    masked = np.where(np.asarray(mask, dtype=bool), len(mask) + n_step, rows)
    return torch.from_numpy(np.minimum.accumulate(masked[::-1])[::-1] + 1 - rows).to(device)


class Windows:
    """Every step of every episode as a window.

    Args:
        episodes: the data, in physical units or encoded.
        spec: horizons.
        gamma: discount a step.
        device: where the arrays live; `gather` answers there.
        require_next: leave out windows whose next observation was never recorded (for bootstrapping).
        only: numbers of the episodes to take windows from, all if None.
        n_step: steps of the return, `n_action_steps` if None.

    `weight (K,)` of the K episodes that have windows is how likely training takes one of each, None for all alike.
    """

    def __init__(
        self,
        episodes: Episodes,
        spec: Spec,
        gamma: float = 0.99,
        device: str | torch.device = "cpu",
        require_next: bool = False,
        only: np.ndarray | None = None,
        n_step: int | None = None,
    ) -> None:
        self.spec = spec
        self.n_step = spec.n_action_steps if n_step is None else n_step
        self.obs: Mapping[str, torch.Tensor] = {name: _tensor(array, device) for name, array in episodes.obs.items()}
        self.action = _tensor(episodes.action, device)
        self.reward = _tensor(episodes.reward, device)
        self.length = torch.from_numpy(np.asarray(episodes.length, dtype=np.int64)).to(device)
        self.start = torch.from_numpy(np.asarray(episodes.start)).to(device)
        self.terminated = torch.from_numpy(np.asarray(episodes.terminated, dtype=bool)).to(device)
        has_final = torch.from_numpy(np.asarray(episodes.has_final, dtype=bool)).to(device)
        # An episode whose last observation is unknown bootstraps only up to the one before.
        self.horizon_end = torch.where(has_final | self.terminated, self.length, self.length - 1)
        self.powers = gamma ** torch.arange(self.n_step + 1, device=device, dtype=torch.float32)
        self.stop = _steps_to_masked(episodes.info.get("mask"), self.n_step, device)
        count = self.horizon_end if require_next else self.length
        if only is not None:
            count = count * torch.zeros_like(count).index_fill_(0, torch.as_tensor(only, device=count.device), 1)
        # Windows are numbered through the episodes that have any: what is kept grows with them, not with the steps.
        self.episode = count.nonzero().squeeze(-1)
        self.count = count[self.episode]
        self.first = self.count.cumsum(0) - self.count
        self.weight = None if episodes.weight is None else torch.tensor(episodes.weight, device=device)[self.episode]

    def __len__(self) -> int:
        """Return the number of windows."""
        return int(self.count.sum())

    @property
    def rows(self) -> torch.Tensor:
        """Number of the step of each window among all steps of the episodes, `(len(self),)`."""
        first = (self.start[self.episode] - self.first).repeat_interleave(self.count)
        return torch.arange(len(self), device=first.device) + first

    def gather(self, index: torch.Tensor) -> Batch:
        """Return the windows of `index` `(B,)`, whole numbers below `len(self)`."""
        index = index.to(self.action.device, non_blocking=True)
        which = torch.searchsorted(self.first, index, right=True) - 1
        episode, step = self.episode[which], index - self.first[which]
        row, length = self.start[episode] + step, self.length[episode]
        first_obs, first_action = self.start[episode] + episode, self.start[episode]

        n = (self.horizon_end[episode] - step).clamp(0, self.n_step)
        if self.stop is not None:
            n = torch.minimum(n, self.stop[row])
        ahead = torch.arange(self.n_step, device=row.device)
        rewards = _single(self.reward[(row[:, None] + ahead).clamp(max=len(self.reward) - 1)])
        inside = ahead < n[:, None]
        ended = self.terminated[episode] & (step + n == length)
        if self.stop is not None:
            ended |= self.stop[row] <= n
        chunk = step[:, None] + torch.arange(self.spec.horizon, device=row.device) - (self.spec.n_obs_steps - 1)
        return Batch(
            obs=self._history(first_obs, step),
            action=_single(self.action[first_action[:, None] + torch.minimum(chunk.clamp(min=0), length[:, None] - 1)]),
            valid=(chunk >= 0) & (chunk < length[:, None]),
            reward=(rewards * self.powers[:-1] * inside).sum(-1),
            next_obs=self._history(first_obs, step + n),
            discount=self.powers[n] * ~ended,
            steps=n,
        )

    def _history(self, first: torch.Tensor, step: torch.Tensor) -> Obs:
        back = torch.arange(1 - self.spec.n_obs_steps, 1, device=step.device)
        rows = first[:, None] + (step[:, None] + back).clamp(min=0)
        return {name: _single(array[rows]) for name, array in self.obs.items()}
