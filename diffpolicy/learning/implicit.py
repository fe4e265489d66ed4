"""Critics that never ask for an action which is not in the data (implicit Q-learning), and the agents that have them.

    L_V = E |tau - 1(u < 0)| u^2,    u = Q_target(s, a) - V(s)                       (Kostrikov et al. 2022, eq. 5)
    L_Q = E (r + discount V(s') - Q(s, a))^2

V is the expectile of the values of the data's actions: 0.5 is their mean, towards 1 the best of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from diffpolicy.data.windows import Batch
from diffpolicy.errors import SpecError
from diffpolicy.learning.actor_critic import ActorCritic, ActorCriticConfig, Learned
from diffpolicy.learning.critics import Metrics, whole_chunks
from diffpolicy.learning.descent import restore
from diffpolicy.nets.critic import Value
from diffpolicy.parts import make_value


def expectile_loss(u: torch.Tensor, tau: float) -> torch.Tensor:
    """`|tau - 1(u < 0)| u^2`, elementwise: its minimum over V of `u = q - V` is the expectile of q."""
    return torch.where(u < 0, 1 - tau, tau) * u * u


class ExpectileValue:
    """A value of states alone, the expectile of the data's Q, in training: no action but the data's is ever asked for.

    Args:
        value: on its device.
        tau: 0.5 is the mean, towards 1 the largest.
        learning_rate: of Adam.

    Raises:
        SpecError: if there is no such expectile.
    """

    def __init__(self, value: Value, tau: float, learning_rate: float) -> None:
        if not 0 < tau < 1:
            raise SpecError(f"got the expectile tau {tau}; wanted it above 0 and below 1")
        self.value, self.tau = value, tau
        self.optimizer = torch.optim.Adam(value.parameters(), learning_rate, fused=True)

    def compile(self) -> None:
        """Have the network compiled at the first step."""
        self.value.compile(dynamic=False)

    def update(self, cond: torch.Tensor, q: torch.Tensor, weight: torch.Tensor) -> tuple[Metrics, torch.Tensor]:
        """Take one step towards the expectile of `q` `(B,)`; `value_loss`, and `q - V` `(B,)` before the step."""
        u = q - self.value(cond)
        loss = (expectile_loss(u, self.tau) * weight).sum() / weight.sum().clamp(min=1)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"value_loss": loss.detach()}, u.detach()

    @torch.no_grad()
    def __call__(self, cond: torch.Tensor) -> torch.Tensor:
        """Value `(B,)`."""
        return self.value(cond)

    def state_dict(self) -> dict[str, Any]:
        """Return all that continuing needs."""
        return {"value": self.value.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.value.load_state_dict(state["value"])
        restore(self.optimizer, state["optimizer"])


@dataclass(frozen=True)
class ImplicitConfig(ActorCriticConfig):
    """What agents with such critics are made of."""

    tau: float = 0.7
    """Expectile of V."""


C = TypeVar("C", bound=ImplicitConfig)


class ImplicitCritic(ActorCritic[C]):
    """An agent whose critics learn by expectiles; a subclass says how its actor learns."""

    def more(self) -> Mapping[str, Learned]:
        """Return the value of states."""
        value = make_value(self.config.critic, self.spec, self.normalizer).to(self.device)
        self.value = ExpectileValue(value, self.config.tau, self.config.td.learning_rate)
        return {"value": self.value}

    def update_critics(self, batch: Batch) -> tuple[Metrics, torch.Tensor]:
        """Take one step of V, then of Q; return what is logged, and the advantages `(B,)` before it."""
        cond, next_cond = self.critics.cond(batch.obs), self.critics.cond(batch.next_obs)
        with torch.no_grad():
            q = self.critics.target.value(cond, batch.action)
        metrics, advantage = self.value.update(cond, q, whole_chunks(batch, self.spec))
        return metrics | self.critics.update(batch, self.value(next_cond)), advantage

    @torch.no_grad()
    def statistics(self, batch: Batch, seed: int = 0) -> dict[str, float | torch.Tensor]:
        """Add the advantages over V of an encoded batch's chunks, `advantage_over_v`."""
        cond = self.critics.cond(batch.obs)
        advantage = self.critics.target.value(cond, batch.action) - self.value(cond)
        return {**super().statistics(batch, seed), "advantage_over_v": advantage}
