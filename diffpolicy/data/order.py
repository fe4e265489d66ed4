"""The order of the data: which windows make batch `step`, a function of (seed, step) only, so that a run can resume."""

import torch

from diffpolicy.data.windows import Windows


class Order:
    """Every window once an epoch, in a fresh permutation of each."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.epoch, self.permutation = -1, torch.empty(0, dtype=torch.long)

    def __call__(self, step: int) -> torch.Tensor:
        """Indices `(batch_size,)` of one step; a batch may straddle two epochs."""
        first = step * self.batch_size
        parts, taken = [], 0
        while taken < self.batch_size:
            epoch, offset = divmod(first + taken, self.n)
            part = self._shuffled(epoch)[offset : offset + self.batch_size - taken]
            parts.append(part)
            taken += len(part)
        return torch.cat(parts)

    def _shuffled(self, epoch: int) -> torch.Tensor:
        if epoch != self.epoch:
            # The CPU generator reads 32 bits of its seed, so the two are mixed within them.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
            self.epoch, self.permutation = epoch, torch.randperm(self.n, generator=generator)
        return self.permutation


class WeightedOrder:
    """Windows drawn by the weights of their episodes, with repetition."""

    def __init__(self, windows: Windows, batch_size: int, seed: int) -> None:
        assert windows.weight is not None
        self.first, self.count, self.weight = windows.first.cpu(), windows.count.cpu(), windows.weight.cpu().double()
        self.upto, self.batch_size, self.seed = (self.weight * self.count).cumsum(0), batch_size, seed

    def __call__(self, step: int) -> torch.Tensor:
        """Indices `(batch_size,)` of one step."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**32)
        u = torch.rand(self.batch_size, generator=generator, dtype=torch.float64) * self.upto[-1]
        episode = torch.searchsorted(self.upto, u, right=True).clamp(max=len(self.upto) - 1)
        within = (u - self.upto[episode]) / self.weight[episode] + self.count[episode]
        return self.first[episode] + within.long().clamp(min=0).minimum(self.count[episode] - 1)
