r"""What critics of every agent share: temporal differences over the executed chunk, and target networks.

    y    = reward + discount V(s')      all three from `Windows`: over the executed steps, discount 0 at true ends
    L_Q  = E sum_members (Q(s, a) - y)^2
    Q_target <- (1 - polyak) Q_target + polyak Q

A chunk that the recording cuts short (a time limit, not a true end) was not executed as a whole: its return belongs to
fewer actions, so critics leave it out. A true end within the chunk counts: what comes after it has no effect.

Logged names, in the units of transformed rewards: `q` (mean over batch and members), `q_spread` (standard deviation
between the members), `td_loss`, `q_target` (mean of y), `value_loss` (of V, in `implicit.py`), `q_loss` (what an actor
descends to climb the critics), `distillation` (squared distance of a student to its teacher), `better` (share of the
chunks with an advantage above 0, of `cfgrl`); and on held-out windows, by the target networks, `validation/q_data` and
`validation/q_policy` (of the data's actions and of the policy's own), `validation/q_spread` (of the policy's own),
`validation/advantage/05`, `/50`, `/95` (quantiles of the value of the data's actions minus that of the policy's own).
TensorBoard has the histogram, `validation/advantage`, and where there is a V that of Q minus V,
`validation/advantage_over_v`.

What followed says how much of a value is true. `monte_carlo` is the mean discounted return that followed the chunks of
some episodes, `overestimation` how much higher the target networks value those chunks on average: as `evaluation/...`
for episodes that the policy itself played while training (`--evaluate-every`), where an honest critic is near 0; as
`validation/...` for held-out episodes of the data, where it also holds what the agent would do better than the data
from the next chunk on. Of an episode that was cut, the value of its last whole chunk stands for what would have
followed; its own error hides as much of that of the chunks before, at most `TAIL` of it: left out are steps so late
that more of what follows them lies behind the time limit, whether they reached it or not.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.rewards import returns_to_go
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Batch, Obs, Windows
from diffpolicy.errors import SpecError, TrainingError
from diffpolicy.learning.descent import restore
from diffpolicy.nets.critic import Critic
from diffpolicy.nets.encoder import FlattenEncoder
from diffpolicy.parts import RewardConfig

TAIL = 0.5
LOOKED_AT = 2048
MARGIN = 10.0

Metrics = dict[str, torch.Tensor | float]


@dataclass(frozen=True)
class TdConfig:
    """How critics learn from temporal differences."""

    gamma: float = 0.99
    """Discount a step."""
    polyak: float = 0.005
    """Share of the critics that their target networks take over at each step."""
    learning_rate: float = 3e-4
    """Of Adam."""
    grad_clip: float | None = None
    """Largest norm of the gradient; None for no limit."""
    rewards: RewardConfig = field(default_factory=RewardConfig)


class FrozenWeights:
    """`with FrozenWeights(module)`: gradients pass through the module, none is worked out for its weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.module.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        self.module.requires_grad_(True)


@torch.no_grad()
def polyak_update(target: nn.Module, source: nn.Module, share: float) -> None:
    """Move the target's weights towards the source's by `share` of the way."""
    targets: list[torch.Tensor] = [*target.parameters()]
    weights: list[torch.Tensor] = [*source.parameters()]
    torch._foreach_lerp_(targets, weights, share)  # pyright: ignore[reportPrivateImportUsage]


def climbing_loss(q: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`- E Q_i / sg(E |Q_j|)` of the members' values `(E, B)` of an actor's own chunks, i and j neighbours by chance.

    One member climbs and another sets the scale (Wang et al. 2023), so it is the same for rewards of any scale.
    """
    i = torch.randint(len(q), (1,), generator=generator, device=q.device)
    climbed, scale = q.index_select(0, i), q.index_select(0, (i + 1) % len(q))
    return -climbed.mean() / scale.detach().abs().mean().clamp(min=1e-8)


def whole_chunks(batch: Batch, spec: Spec) -> torch.Tensor:
    """Return 1 where the chunk was executed as a whole or the task ended within it, else 0, `(B,)`."""
    return ((batch.steps >= spec.n_action_steps) | (batch.discount == 0)).float()


def early(episodes: Episodes, gamma: float, every: int) -> np.ndarray:
    """Return which steps `(N,)` are compared with what followed: each `every`-th, as long as no limit hides too much.

    It does where `gamma^(limit - step) > TAIL`, with the limit of the longest episode that was cut. Whether this one
    was must not matter: late steps whose episode ended in time are a choice of the lucky or of the unlucky.
    """
    length, cut = np.asarray(episodes.length), ~np.asarray(episodes.terminated, dtype=bool)
    step = np.arange(episodes.steps) - np.repeat(episodes.start, length)
    seen = gamma ** np.maximum(length[cut].max() - step, 0.0) <= TAIL if cut.any() else np.ones(len(step), dtype=bool)
    return seen & (step % every == 0)


def spread_out(index: torch.Tensor) -> torch.Tensor:
    """Return at most `LOOKED_AT` of the numbers, evenly from first to last."""
    return index[torch.linspace(0, len(index) - 1, min(len(index), LOOKED_AT)).round().long()]


class Critics:
    """An ensemble in training: its slow copy and its optimizer.

    Args:
        critic: on its device.
        spec: sizes.
        config: settings.

    Raises:
        SpecError: if the discount or the share of the target networks is impossible.
    """

    def __init__(self, critic: Critic, spec: Spec, config: TdConfig) -> None:
        if not (0 <= config.gamma <= 1 and 0 < config.polyak <= 1):
            raise SpecError(
                f"got gamma {config.gamma} and polyak {config.polyak}; wanted both in [0, 1], polyak above 0"
            )
        self.critic, self.spec, self.config = critic, spec, config
        self.target = deepcopy(critic).requires_grad_(False)
        self.optimizer = torch.optim.Adam(critic.parameters(), config.learning_rate, fused=True)
        self.flatten = FlattenEncoder(tuple(spec.obs_shapes))
        device = next(critic.parameters()).device
        self.largest_reward = torch.zeros((), device=device)
        self.magnitude = torch.zeros((), device=device)

    def cond(self, obs: Obs) -> torch.Tensor:
        """Return the flat history of encoded observations, `(B, obs_dim)`."""
        return self.flatten(obs)

    def targets(self, batch: Batch, value: torch.Tensor) -> torch.Tensor:
        """`y = reward + discount value`, `(B,)`, with `value` `(B,)` of the next observations."""
        return batch.reward + batch.discount * value

    def loss(self, q: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Squared error summed over the members of `q` `(E, B)`, averaged over the chunks that count."""
        return ((q - y).square().sum(0) * weight).sum() / weight.sum().clamp(min=1)

    def update(self, batch: Batch, value: torch.Tensor) -> Metrics:
        """Take one step towards `targets(batch, value)`; `td_loss`, `q`, `q_spread`, `q_target`."""
        y, weight = self.targets(batch, value), whole_chunks(batch, self.spec)
        q = self.critic(self.cond(batch.obs), batch.action)
        loss = self.loss(q, y, weight)
        self._descend(loss)
        with torch.no_grad():
            self.largest_reward = torch.maximum(self.largest_reward, batch.reward.abs().max())
            self.magnitude = y.abs().mean()
            return {
                "td_loss": loss.detach(),
                "q": q.mean(),
                "q_spread": q.std(0, correction=0).mean(),
                "q_target": y.mean(),
            }

    def _descend(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.critic.parameters(), self.config.grad_clip)
        self.optimizer.step()
        polyak_update(self.target, self.critic, self.config.polyak)

    def compile(self) -> None:
        """Have the members compiled at the first step."""
        self.critic.compile(dynamic=False)
        self.target.compile(dynamic=False)

    def check(self, step: int) -> None:
        """Stop where values have left what any return of the rewards seen could be.

        Raises:
            TrainingError: if the mean magnitude of the targets is not a number or more than `MARGIN` times the largest
                possible return plus 1, which is more than fresh networks say; or if a weight is not a number.
        """
        share = 1 - self.config.gamma**self.spec.n_action_steps
        largest = float(self.largest_reward) / share if share > 0 else math.inf
        magnitude = float(self.magnitude)
        finite = all(bool(weight.isfinite().all()) for weight in self._weights())
        if not (finite and magnitude <= MARGIN * (largest + 1)):
            seen = f"their targets average {magnitude:.3g} in size and no return of these rewards exceeds {largest:.3g}"
            why = seen if finite else "their weights are not finite"
            raise TrainingError(
                f"the critics diverged at step {step}: {why}; lower --td.learning-rate or --td.gamma, or add "
                "--critic.layer-norm or members to the critics; what was saved is unharmed"
            )

    def _weights(self) -> Iterator[nn.Parameter]:
        return chain(self.critic.parameters(), self.target.parameters())

    @torch.no_grad()
    def statistics(self, batch: Batch, chunk: torch.Tensor) -> dict[str, float | torch.Tensor]:
        """Describe the values of an encoded batch's chunks and of the policy's own `(B, Tp, Da)`.

        Numbers, and the advantages `(B,)` of the data's chunks.
        """
        cond = self.cond(batch.obs)
        own, data = self.target(cond, chunk), self.target.value(cond, batch.action)
        advantage = data - self.target.aggregate(own)
        quantiles = torch.quantile(advantage, advantage.new_tensor([0.05, 0.5, 0.95])).tolist()
        return {
            "q_data": float(data.mean()),
            "q_policy": float(self.target.aggregate(own).mean()),
            "q_spread": float(own.std(0, correction=0).mean()),
            **{f"advantage/{name}": value for name, value in zip(("05", "50", "95"), quantiles, strict=True)},
            "advantage": advantage,
        }

    @torch.no_grad()
    def overestimation(self, episodes: Episodes, every: int, normalizer: Normalizer) -> dict[str, float]:
        """Compare the values of recorded chunks with the returns that followed, the tails of cut episodes estimated.

        Args:
            episodes: physical units, their rewards transformed.
            every: looks at each `every`-th step of an episode.
            normalizer: of the batches.

        Returns:
            `overestimation` and `monte_carlo`; nothing where no step is early enough for it.
        """
        windows = Windows(episodes, self.spec, self.config.gamma, require_next=True)
        known = torch.from_numpy(early(episodes, self.config.gamma, every))[windows.rows].nonzero().squeeze(-1)
        index = spread_out(known)
        value, whole = self._values(windows, index, normalizer)
        if not whole.any():
            return {}
        returns = returns_to_go(self._continued(episodes, windows, normalizer), self.config.gamma)
        followed = returns[windows.rows[index[whole]]]
        return {"overestimation": float((value[whole] - followed).mean()), "monte_carlo": float(followed.mean())}

    def _values(self, windows: Windows, index: torch.Tensor, normalizer: Normalizer) -> tuple[np.ndarray, np.ndarray]:
        """Values of the chunks of windows by the target networks, and which of them are whole, `(B,)` each."""
        batch = normalizer.encode(windows.gather(index).to(self.magnitude.device))
        value = self.target.value(self.cond(batch.obs), batch.action)
        return value.double().cpu().numpy(), (whole_chunks(batch, self.spec) > 0).cpu().numpy()

    def _continued(self, episodes: Episodes, windows: Windows, normalizer: Normalizer) -> Episodes:
        """Let the value of the last whole chunk of each episode that was cut stand for its rewards from there on.

        Not where a mask ends the task within that chunk: what followed is known.
        """
        n = self.spec.n_action_steps
        last = (windows.first + windows.count - n).clamp(min=0)
        cut = ~windows.terminated[windows.episode] & (windows.count >= n)
        if windows.stop is not None:
            cut &= windows.stop[windows.rows[last]] > n
        if not cut.any():
            return episodes
        last = last[cut]
        reward = np.array(episodes.reward, dtype=np.float64)
        ends = (windows.start + windows.length)[windows.episode[cut]]
        for row, end, value in zip(windows.rows[last], ends, self._values(windows, last, normalizer)[0], strict=True):
            reward[row:end] = 0
            reward[row] = value
        return replace(episodes, reward=reward)

    def state_dict(self) -> dict[str, Any]:
        """Return all that continuing needs."""
        return {
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "largest_reward": self.largest_reward,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.critic.load_state_dict(state["critic"])
        self.target.load_state_dict(state["target"])
        restore(self.optimizer, state["optimizer"])
        self.largest_reward = state["largest_reward"]
