r"""Choosing among samples: of N chunks for one condition, the one that a score likes best.

    i* = argmax_i score(cond, x_i)                         temperature 0
    i* ~ softmax_i(score(cond, x_i) / temperature)         by the inverse of its cumulative sum

Nothing is random here: the N samples, and the number that picks one of them, come from the noise that is passed in.
"""

from collections.abc import Callable

import torch
from torch import nn

from diffpolicy.diffusion.sampler import Sample, Sampler

Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class BestOf(nn.Module):
    """The planner that samples N chunks and keeps one: `(cond, noise) -> chunk` in the unit box.

    Args:
        planner: makes the samples.
        score: `(cond (M, C), chunk (M, Tp, Da)) -> (M,)`, the higher the better.
        n: samples a condition, at least 1.
        temperature: of the softmax, in the score's units; 0 takes the best.
    """

    def __init__(self, planner: Sample, score: Score, n: int, temperature: float = 0.0) -> None:
        super().__init__()
        self.planner = planner
        self.score = score
        self.n = n
        self.temperature = temperature

    @property
    def draws(self) -> int:
        """Noise tensors of one plan: those of N samplings and, with a temperature, one whose first number picks."""
        return self.n * self.planner.draws + (self.temperature > 0)

    @property
    def evaluations(self) -> int:
        """Network evaluations, each of N rows a condition."""
        return self.planner.evaluations

    @property
    def sampler(self) -> Sampler:
        """The rule of one leg."""
        return self.planner.sampler

    @property
    def steps(self) -> int:
        """Number of legs."""
        return self.planner.steps

    def forward(self, cond: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Choose chunks `(B, Tp, Da)` for `cond (B, C)`; noise `(draws, B, Tp, Da)`."""
        chunks, scores = self.candidates(cond, noise)
        chosen = scores.argmax(0) if self.temperature == 0 else self._drawn(scores, noise[self.draws - 1])
        return chunks[chosen, torch.arange(len(cond), device=chosen.device)]

    def candidates(self, cond: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all N samples `(N, B, Tp, Da)` and their scores `(N, B)`."""
        n, batch, each = self.n, len(cond), self.planner.draws
        own = noise[: n * each].unflatten(0, (n, each)).transpose(0, 1).flatten(1, 2)
        repeated = cond.repeat(n, 1)
        chunks = self.planner(repeated, own)
        return chunks.unflatten(0, (n, batch)), self.score(repeated, chunks).unflatten(0, (n, batch))

    def _drawn(self, scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        uniform = torch.special.ndtr(noise.flatten(1)[:, 0])
        below = (scores / self.temperature).softmax(0).cumsum(0) < uniform
        return below.sum(0).clamp(max=self.n - 1)
