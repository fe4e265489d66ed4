r"""Denoisers made of denoisers: each takes one and is one, so they stack in any order.

A chunk of which something is known already, `Y` with weights `W` in [0, 1] (1 known, 0 free), as `D = E[x | x_t]`:

    Pinned         D + W (Y - D)                                        hard (W of 0 and 1) or soft inpainting
    RealTimeChunk  D + sigma min(beta, sigma / (alpha r^2)) J^T W (Y - D)        J = dD / dx_t,  r^2 ~ Var[x | x_t]

The second is `D + sigma^2 / alpha grad log N(Y; D, r^2 / W)`, Tweedie's formula for `x` given `x_t` and `Y`: through
the Jacobian what is known moves what is free. It stays the same if `x_t` is multiplied by any number, so Black et al.'s
rule for flows (`alpha = tau, sigma = 1 - tau`) is a rule for all schedules.

What is wanted of a chunk, said by a condition `y` or by a value `V` of noised chunks:

    ClassifierFree D(x_t) + w (D(x_t, y) - D(x_t))                      0 free, 1 conditional, above 1 more of it
    ValueGuided    D + w sigma^2 / alpha grad V(x_t, t)                 Tweedie's formula for p(x) e^(w V(x))
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffpolicy.diffusion.denoiser import Denoiser

Variance = Callable[[float, float], float]
Tell = Callable[[torch.Tensor], torch.Tensor]
Value = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Clipped(Denoiser):
    """Posterior mean clipped to the action box `[-limit, limit]` of the unit scale.

    The noise prediction divides by `alpha`, about 5e-4 at `t = 1`: unclipped, its first steps overshoot the data.
    """

    def __init__(self, denoiser: Denoiser, limit: float = 1.0) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.limit = limit

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """`clip(D, -limit, limit)`."""
        return self.denoiser(x_t, t, cond).clamp(-self.limit, self.limit)


class ClassifierFree(Denoiser):
    """Away from what the denoiser estimates unconditionally, towards what it estimates told `y` (Ho and Salimans 2022).

    Both in one evaluation of twice the rows; of weights 0 and 1 only the one that counts, so 1 is the conditional
    denoiser to the bit. Of two Gaussians of equal spread it is the exact denoiser of `N(m + w (m_y - m), s^2)`; of two
    around the same mean the probability flow samples the spread `s^(1-w) s_y^w`, not that of the product of powers.

    Args:
        denoiser: of chunks, conditional and not.
        tell: turns a condition `(B, C)` that says nothing of `y` into one that does.
        weight: `w`; 0 is unconditional.
    """

    def __init__(self, denoiser: Denoiser, tell: Tell, weight: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.tell = tell
        self.weight = weight

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """`D(x_t) + w (D(x_t, y) - D(x_t))`."""
        assert cond is not None
        if self.weight in (0.0, 1.0):
            return self.denoiser(x_t, t, self.tell(cond) if self.weight else cond)
        time = torch.cat([t, t]) if isinstance(t, torch.Tensor) else t
        free, told = self.denoiser(torch.cat([x_t, x_t]), time, torch.cat([cond, self.tell(cond)])).chunk(2)
        return torch.lerp(free, told, self.weight)


class ValueGuided(Denoiser):
    """Uphill on a value of noised chunks (Dhariwal and Nichol 2021; Janner et al. 2022).

    With `V(x_t, t) = E[J | x_t]`, what regression on returns J learns, and J linear in a Gaussian chunk, the samples
    are those of `p(x) e^(w J(x))`, exactly: `N(m, C)` becomes `N(m + w C grad J, C)`. Put it inside `Clipped`.

    Args:
        denoiser: of chunks.
        value: `(x_t (B, Tp, Da), t (B,), cond) -> (B,)`, differentiable in `x_t`.
        weight: `w`, in units of 1 / value; 0 is no guidance.
        until: time at and below which there is none: a value of almost clean chunks leads off the data (Janner et al.
            stop two or four of their 20 steps before the end).
    """

    def __init__(self, denoiser: Denoiser, value: Value, weight: float, until: float = 0.0) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.value = value
        self.weight = weight
        self.until = until

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """`D + w sigma^2 / alpha grad V`; `t` is a float, as in every sampler."""
        assert isinstance(t, float)
        x = self.denoiser(x_t, t, cond)
        if t < self.until + 1e-6 or self.weight == 0:  # 1 - 18 / 20 and 1 - 17 / 20 lie on two sides of 0.1 and 0.15
            return x
        alpha, sigma = self.schedule(t)
        return x + self.weight * sigma**2 / alpha * self.slope(x_t, t, cond)

    def slope(self, x_t: torch.Tensor, t: float, cond: torch.Tensor | None) -> torch.Tensor:
        """`grad V` with respect to `x_t`, a constant to whoever differentiates; works in `torch.inference_mode` too."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x_t.detach().clone().requires_grad_()
            value = self.value(leaf, leaf.new_full((len(leaf),), t), None if cond is None else cond.detach().clone())
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return slope


class Pinned(Denoiser):
    """Inpainting: the estimate is replaced by what is known, in full where the weight is 1, in part below.

    A chunk sampled to the end equals `chunk` to the bit where the weight is 1. With the samplers here this is the
    replacement method of Song et al. (2021, app. I.2): the known part of `x_t` is `alpha Y + sigma eps` at every `t`,
    with fresh noise at each step in theirs and in DDPM, with one `eps` throughout in DDIM. It is biased: what is free
    sees what is known through its noise, too late to follow it. On a Gaussian of 8 actions whose neighbours correlate
    by 0.9, with the first 3 pinned, the mean of the other 5 misses the true conditional mean by 0.54 of the way it
    should go (`cosine`, DDPM, 20 steps). Taking each step 2, 4, 16 and 64 times with noise put back between (`repeats`
    of `sample`; RePaint, Lugmayr et al. 2022) leaves 0.39, 0.24, 0.11 and 0.06, with half of the true variance at the
    end; `RealTimeChunk` leaves 0.27 in one pass (0.38 with DDIM).

    Args:
        denoiser: of free chunks.
        chunk: what is known, `(B, Tp, Da)`, finite everywhere; where the weight is 0 it does not matter.
        weights: `(Tp,)`, or anything that broadcasts to the chunk's shape, in [0, 1].
    """

    def __init__(self, denoiser: Denoiser, chunk: torch.Tensor, weights: torch.Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.chunk = chunk
        self.weights = per_action(weights, chunk)

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """`D + W (Y - D)`."""
        return torch.lerp(self.denoiser(x_t, t, cond), self.chunk, self.weights)


@dataclass(frozen=True)
class Spread:
    """`Var[x | x_t]` of data of standard deviation `std`: `r^2 = sigma^2 std^2 / (alpha^2 std^2 + sigma^2)`.

    1 is that of Black et al. (2025, eq. 4), others are A. Soare's (2025), whose largest weight is the number of steps.
    What matters is the spread of the chunks that one observation leaves open, in the unit box: it is less than 1, and
    then more guidance is right.
    """

    std: float = 1.0

    def __call__(self, alpha: float, sigma: float) -> float:
        """`r^2`."""
        return (sigma * self.std) ** 2 / ((alpha * self.std) ** 2 + sigma**2)


class RealTimeChunk(Denoiser):
    """Guidance towards what is known, through the Jacobian (Black et al. 2025, real-time chunking; Song et al. 2023).

    One vector-Jacobian product an evaluation: about three times the cost of a plain one. What is known is approached,
    not met: its weight is bounded by `beta`. With all weights 0 it is the denoiser itself, to the bit. Put it around a
    clipped denoiser and clip again: near `t = 1` the Jacobian of a noise prediction is of the order `1 / alpha`.

    Args:
        denoiser: of free chunks, any prediction; differentiable in `x_t`.
        chunk: what is known, `(B, Tp, Da)`, finite everywhere.
        weights: `(Tp,)`, or anything that broadcasts to the chunk's shape, in [0, 1].
        beta: largest weight of the guidance, in units of a flow's velocity; Black et al. use 5.
        variance: `(alpha, sigma) -> r^2`; with the true variance of one known action and `beta` infinite, the result
            is exact on a Gaussian. On Push-T (epsilon, `cosine`, 64 histories, delay 4) the change of velocity at the
            border, as a share of the action's range, is 0.118 without a prefix, and 0.066 with DDIM in 10 steps
            (0.059 with DDPM in 20) as it stands here, 0.043 (0.028) with `beta` 50 and `Spread(0.3)`, 0.025 (0.012)
            with `Spread(0.1)`; below that it grows again.
        jacobian: False takes the identity for the Jacobian, as LeRobot's does: no derivative, but what is free follows
            through the next evaluations alone, and a large `beta` diverges. For comparison only.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        chunk: torch.Tensor,
        weights: torch.Tensor,
        beta: float = 5.0,
        variance: Variance = Spread(),
        jacobian: bool = True,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.chunk = chunk
        self.weights = per_action(weights, chunk)
        self.beta = beta
        self.variance = variance
        self.jacobian = jacobian

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """`D + sigma min(beta, sigma / (alpha r^2)) J^T W (Y - D)`; `t` is a float, as in every sampler."""
        assert isinstance(t, float)
        alpha, sigma = self.schedule(t)
        gain = sigma * min(self.beta, sigma / (alpha * self.variance(alpha, sigma)))
        if not self.jacobian:
            x = self.denoiser(x_t, t, cond)
            return x + gain * (self.weights * (self.chunk - x))
        x, pull = vector_jacobian(self.denoiser, x_t, t, cond, lambda x: self.weights * (self.chunk - x))
        return x + gain * pull


def blended(
    denoiser: Denoiser, chunk: torch.Tensor, weights: torch.Tensor, beta: float = 50.0, std: float = 0.1
) -> Pinned:
    """Guidance inside inpainting: the Jacobian moves what is free, then the weights blend what is known into it."""
    return Pinned(RealTimeChunk(denoiser, chunk, weights, beta, Spread(std)), chunk, weights)


class Trained(Denoiser):
    """Training-time real-time chunking (Black et al. 2025, arXiv 2512.05964): the network was told what is known.

    Actions of weight 1 stand clean in `x_t` with the time 0, the others have the time of the sampler: networks that
    were trained so (`DenoiserConfig.max_delay`) continue them, without a derivative and at no cost. A chunk sampled to
    the end equals `chunk` to the bit where the weight is 1; weights below 1 count as 0.

    Args:
        denoiser: of chunks whose actions have their own times.
        chunk: what is known, `(B, Tp, Da)`, finite everywhere.
        weights: `(Tp,)`, or anything that broadcasts to the chunk's shape.
    """

    def __init__(self, denoiser: Denoiser, chunk: torch.Tensor, weights: torch.Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.chunk = chunk
        self.known = per_action(weights, chunk) == 1

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """`Y` where it is known, else `D` of the chunk that begins with it; `t` is a float, as in every sampler."""
        times = torch.where(self.known[..., 0], 0.0, t)
        return torch.where(self.known, self.chunk, self.denoiser(torch.where(self.known, self.chunk, x_t), times, cond))


def vector_jacobian(
    denoiser: Denoiser,
    x_t: torch.Tensor,
    t: float,
    cond: torch.Tensor | None,
    error: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(D, J^T error(D))` with `J = dD / dx_t`; works inside `torch.inference_mode` too."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x_t.clone().requires_grad_()  # copies: tensors made in inference mode cannot be differentiated
        x = denoiser(leaf, t, None if cond is None else cond.clone())
        (pull,) = torch.autograd.grad(x, leaf, error(x.detach()))
    return x.detach(), pull


def per_action(weights: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """Give weights `(Tp,)` or `(B, Tp)` the trailing axis of a chunk `(B, Tp, Da)`."""
    weights = weights.to(chunk)
    return (weights[..., None] if weights.ndim < chunk.ndim else weights).expand(chunk.shape)
