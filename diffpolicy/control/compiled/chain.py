"""One sampling as a chain around the part of the network that runs at every step.

    history --encode--> cond --its share of the modulation--> (B, M)   + (R, M), the share of each time, kept
    noise ----------------------> body -> body -> ... -> body --decode--> chunk

The times of a sampler are known before it starts, so little of the network's first stage (`nets/network.py`) is left to
a plan. Backends differ in `body(x_t, modulation)` only: one compilation serves every sampler and number of steps, every
choice among samples, and every prefix. A guide that follows the Jacobian gets it from PyTorch's body.

At `t = 1` the noise prediction is divided by `alpha`, about 5e-4: there 8 bits decide the sign of what is clipped. So
the first evaluation of a plan has a body of its own, and is exact where the others are not. On 40 windows of Push-T,
with a trained network of 3.0 M, that brings the largest difference of an action from 0.43 % of its range to 0.18 %.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from diffpolicy.diffusion.denoiser import Denoiser, NetworkDenoiser
from diffpolicy.diffusion.prefix import Prefix
from diffpolicy.diffusion.sampler import sample
from diffpolicy.nets.network import Network
from diffpolicy.parts import make_planner, make_selector
from diffpolicy.policy import Policy

Body = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Bodies:
    """The body at the first time of a plan and the one at all others, often the same."""

    first: Body
    rest: Body


class _Modulated(Denoiser):
    """Hands the modulation of time `t` to that time's body; the shares of times are those of the weights at its making.

    Its condition is the policy's own, `cond_dim` numbers, then its share of the modulation: `(B, C + M)`. A critic
    reads the first of them, and repeating rows repeats all that belongs to them.
    """

    of_times: torch.Tensor

    def __init__(
        self, bodies: Bodies, own: Body, denoiser: NetworkDenoiser, times: list[float], of_times: torch.Tensor,
        cond_dim: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bodies, self.own, self.plain, self.schedule = bodies, own, denoiser, denoiser.schedule
        self.register_buffer("of_times", of_times)
        self.rows = {t: row for row, t in enumerate(times)}
        self.cond_dim = cond_dim

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        assert cond is not None
        if isinstance(t, torch.Tensor):  # each action has its own time: no modulation knows it
            return self.plain(x_t, t, cond[:, : self.cond_dim])
        row = self.rows[t]
        body = self.bodies.rest if row else self.bodies.first
        if x_t.requires_grad:  # compiled bodies have no derivative
            body = self.own
        c_skip, c_out = self.plain.prediction.coefficients(*self.schedule(t))
        return c_skip * x_t + c_out * body(x_t, self.of_times[row] + cond[:, self.cond_dim :])


class _Times(Denoiser):
    """Writes down the times a sampler asks for."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.schedule = denoiser.schedule
        self.seen: list[float] = []

    def forward(self, x_t: torch.Tensor, t: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        assert isinstance(t, float)
        self.seen.append(t)
        return x_t


def times_of(policy: Policy) -> list[float]:
    """Return the diffusion times that one sampling evaluates, each once, in order; taking steps again adds none."""
    times, planner = _Times(policy.denoiser), policy.planner
    sample(times, planner.sampler, torch.zeros(planner.draws, 1, 1, 1), None, planner.steps)
    return list(dict.fromkeys(times.seen))


def samples_of(policy: Policy) -> int:
    """Return how many chunks are sampled a plan, of which one is kept."""
    return 1 if policy.selection is None else policy.selection.config.samples


class Chain(nn.Module):
    """`(cond, noise, prefix) -> chunk` in physical units, by the policy's sampler around bodies.

    Never waits for the device.
    """

    def __init__(self, policy: Policy, network: Network, bodies: Bodies, cond_dim: int) -> None:
        super().__init__()
        times = times_of(policy)
        self.network, self.normalizer, self.joining = network, policy.normalizer, policy.joining
        with torch.no_grad():
            of_times = network.of_time(torch.tensor(times, device=policy.device))
        self.denoiser = _Modulated(bodies, network.body, policy.denoiser, times, of_times, cond_dim)
        planner = make_planner(self.denoiser, policy.denoiser_config.clip, policy.sampler_config)
        self.planner = make_selector(planner, policy.selection)

    def forward(self, cond: torch.Tensor, noise: torch.Tensor, prefix: Prefix | None = None) -> torch.Tensor:
        """Sample `(B, Tp, Da)` from `cond (B, C)` and `noise (draws, B, Tp, Da)`."""
        planner = self.planner if prefix is None else self.joining(self.denoiser, prefix)
        known = torch.cat([cond, self.network.of_cond(cond)], dim=1)
        return self.normalizer.decode_action(planner(known, noise))
