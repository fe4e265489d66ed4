"""The best of N: which sample is kept, with which probability, and that nothing but the noise decides."""

import torch

from diffpolicy.diffusion.exact import gaussian
from diffpolicy.diffusion.sampler import Ddim, Sample
from diffpolicy.diffusion.schedule import Cosine
from diffpolicy.diffusion.selection import BestOf


def planner(eta: float = 0.0) -> Sample:
    return Sample(gaussian(Cosine(), torch.zeros(2, 1), 1.0), Ddim(eta), 4)


def first(cond: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    return chunk[:, 0, 0]


def random(draws: int, batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(draws, batch, 2, 1, generator=torch.Generator().manual_seed(seed))


def test_of_5_samples_it_keeps_the_one_that_scores_best_by_itself():
    for eta in (0.0, 1.0):
        one, best = planner(eta), BestOf(planner(eta), first, 5)
        assert best.draws == 5 * one.draws
        noise, cond = random(best.draws, 7), torch.zeros(7, 3)
        each = torch.stack([one(cond, part) for part in noise.split(one.draws)])
        chosen = each[:, :, 0, 0].argmax(0)
        assert len(set(chosen.tolist())) > 1
        assert (best(cond, noise) - each[chosen, torch.arange(7)]).abs().max() < 1e-6


def test_the_score_is_told_which_condition_a_sample_belongs_to():
    best = BestOf(planner(), lambda cond, chunk: cond[:, 0] * chunk[:, 0, 0], 4)
    noise = random(4, 2)
    chunks, _ = best.candidates(torch.zeros(2, 1), noise)
    x = best(torch.tensor([[1.0], [-1.0]]), noise)[:, 0, 0]
    assert torch.equal(x, torch.stack([chunks[:, 0, 0, 0].max(), chunks[:, 1, 0, 0].min()]))


def test_with_temperature_0_5_a_score_of_1_against_0_is_drawn_with_share_0_88():
    n = 40_000
    best = BestOf(planner(), lambda cond, chunk: (chunk[:, 0, 0] > 0).float(), 2, temperature=0.5)
    assert best.draws == 3
    noise = random(3, n)
    noise[0], noise[1] = noise[0].abs(), -noise[1].abs()
    share = (best(torch.zeros(n, 1), noise)[:, 0, 0] > 0).float().mean()
    expected = torch.tensor([1.0, 0.0]).div(0.5).softmax(0)[0]
    assert abs(share - expected) < 0.007  # four standard deviations


def test_as_the_temperature_falls_to_0_it_takes_the_best_and_as_it_rises_any():
    n = 4000
    noise, cond = random(4, n), torch.zeros(n, 1)
    greedy = BestOf(planner(), first, 3)(cond, noise)
    assert torch.equal(BestOf(planner(), first, 3, 1e-6)(cond, noise), greedy)
    any_of = BestOf(planner(), first, 3, 1e6)(cond, noise)
    assert abs((any_of == greedy).all(-1).all(-1).float().mean() - 1 / 3) < 0.03


def test_the_same_noise_gives_the_same_choice():
    best = BestOf(planner(1.0), first, 3, 1.0)
    noise, cond = random(best.draws, 5), torch.zeros(5, 1)
    assert torch.equal(best(cond, noise), best(cond, noise))
    assert not torch.equal(best(cond, noise), best(cond, random(best.draws, 5, seed=1)))
