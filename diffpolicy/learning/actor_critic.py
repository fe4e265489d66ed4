"""An agent with a denoiser that acts and critics that choose: what such agents have in common, all but their losses.

    batch --> losses (an agent's own) --> actor:   model, average, optimizer --> policy: sample n chunks, keep the one
                                          critics: members, slow copies      -->         that the slow copies like best

A subclass says what one step of learning is; it may add parts (a value of states, a teacher), which are then saved.
What all of them do otherwise than their originals stands at the end.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.rewards import check_preference, preferred, transformed
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Batch, Windows
from diffpolicy.errors import SpecError
from diffpolicy.guides import Guidance
from diffpolicy.learning.actor import Actor, ActorConfig
from diffpolicy.learning.critics import Critics, TdConfig
from diffpolicy.parts import (
    CriticConfig,
    DenoiserConfig,
    SamplerConfig,
    Selection,
    SelectionConfig,
    make_critic,
    make_rewards,
    reward_transform,
    why_not,
)
from diffpolicy.policy import Policy


@dataclass(frozen=True)
class ActorCriticConfig:
    """What every such agent is made of; each has its own paper's defaults."""

    denoiser: DenoiserConfig = field(default_factory=lambda: DenoiserConfig("mlp", step_embed_dim=64))
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    td: TdConfig = field(default_factory=TdConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    compile: bool = False
    """Compile networks and sampling with torch.compile, for GPUs: a CPU spends its time on products of matrices, which
    are as fast without. On a CPU it needs a C++ compiler."""
    preference: float = 0.0
    """How much more often windows of good episodes are drawn: in proportion to exp(preference R), R in [0, 1] the
    return of the whole episode (return weighting, Hong et al. 2023: 10 with IQL and TD3+BC, 5 with CQL); 0 draws all
    alike."""


def check_count(name: str, count: int) -> None:
    """Refuse a number of samples below 1.

    Raises:
        SpecError: if it is.
    """
    if count < 1:
        raise SpecError(f"{name} is {count}; give a whole number of at least 1")


class Learned(Protocol):
    """A part of an agent that has something to save."""

    def compile(self) -> None:
        """Have its networks compiled at the first step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that continuing needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        ...


C = TypeVar("C", bound=ActorCriticConfig)


class ActorCritic(ABC, Generic[C]):
    """Trains an actor and critics on encoded batches; `policy()` is the averaged actor and the target critics.

    Args:
        spec: sizes.
        normalizer: fitted.
        config: settings.
        steps: length of the run, for the learning rate.
        device: where to train.
        seed: of weights, times and noise.
    """

    def __init__(
        self,
        spec: Spec,
        normalizer: Normalizer,
        config: C,
        steps: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        if reason := why_not(config.sampler, SamplerConfig(), config.denoiser.prediction):
            raise SpecError(reason)
        check_preference(config.preference)
        self.spec, self.config, self.steps, self.seed = spec, config, steps, seed
        self.device = torch.device(device)
        self.normalizer = normalizer.to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone: a user's GPUs keep theirs
            self.actor = self.make_actor(config.denoiser, config.sampler)
            critic = make_critic(config.critic, spec, normalizer).to(self.device)
            self.critics = Critics(critic, spec, config.td)
            self.learned: dict[str, Learned] = {"actor": self.actor, "critics": self.critics, **self.more()}
        if config.compile:
            for part in self.learned.values():
                part.compile()
        self.policy()  # an impossible selection is refused now, not after the first thousand steps

    def make_actor(self, denoiser: DenoiserConfig, sampler: SamplerConfig) -> Actor:
        """Return a fresh actor of this agent's settings."""
        return Actor(denoiser, sampler, self.config.actor, self.spec, self.normalizer, self.steps, self.device)

    def more(self) -> Mapping[str, Learned]:
        """Return what else this agent learns, by name; made after actor and critics."""
        return {}

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, torch.Tensor | float]:
        """Take one step of everything on an encoded batch; `loss` is the actor's."""

    def update(self, batch: Batch) -> dict[str, torch.Tensor | float]:
        """Take one step on an encoded batch."""
        rate = self.imitator.learning_rate
        metrics = self.losses(batch)
        self.step += 1
        return {**metrics, "learning_rate": rate}

    def check(self) -> None:
        """Stop where the critics have diverged.

        Raises:
            TrainingError: if they have.
        """
        self.critics.check(self.step)

    def windows(
        self, episodes: Episodes, device: str | torch.device = "cpu", only: np.ndarray | None = None
    ) -> Windows:
        """Return what this agent learns from: its rewards and discount, where the next observation was recorded."""
        rewards, gamma = self.config.td.rewards, self.config.td.gamma
        judged = make_rewards(rewards, preferred(episodes, self.config.preference))
        return Windows(judged, self.spec, gamma, device, require_next=True, only=only)

    @property
    def imitator(self) -> Actor:
        """Return who learns from the data's chunks by imitation."""
        return self.actor

    @property
    def guidance(self) -> Guidance | None:
        """Return what bends the samples when the policy acts: nothing, unless an agent says what."""
        return None

    @property
    def model(self) -> torch.nn.Module:
        """The network that acts, as it trains."""
        return self.actor.model

    def policy(self) -> Policy:
        """Return the policy as it stands: averaged actor and target critics, shared with the agent."""
        actor, config = self.actor, self.config
        averaged = actor.ema.module
        selection = Selection(self.critics.target, config.critic, config.selection)
        parts = (self.spec, self.normalizer, averaged.encoder, averaged.denoiser)
        return Policy(*parts, actor.denoiser_config, actor.sampler_config, self.seed, selection, self.guidance)

    @torch.no_grad()
    def validation_loss(self, batch: Batch, seed: int = 0) -> float:
        """Return the averaged weights' imitation loss on an encoded batch, with times and noise from `seed`."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return float(self.imitator.ema.module.loss(batch, generator))

    def hindsight(self, played: Episodes, data: Episodes, every: int) -> dict[str, float]:
        """Compare the critics' values of episodes with what followed (`learning/critics.py` has the names).

        Args:
            played: physical units, by whomever.
            data: what the agent learns from, whose rewards say how rewards are transformed.
            every: looks at each `every`-th step of an episode: `n_action_steps` where the policy itself played.
        """
        td = self.config.td
        scale, shift = reward_transform(td.rewards, data)
        return self.critics.overestimation(transformed(played, scale, shift), every, self.normalizer)

    @torch.no_grad()
    def statistics(self, batch: Batch, seed: int = 0) -> dict[str, float | torch.Tensor]:
        """Describe the critics on an encoded batch (`learning/critics.py` has the names), with noise from `seed`."""
        policy = self.policy()
        noise = policy.draw(len(batch.action), torch.Generator(self.device).manual_seed(seed))
        return self.critics.statistics(batch, policy.planner(policy.encoder(batch.obs), noise))

    def state_dict(self) -> dict[str, Any]:
        """Return all that continuing needs."""
        learned = {name: part.state_dict() for name, part in self.learned.items()}
        return {**learned, "generator": self.generator.get_state(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        for name, part in self.learned.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]


# Differences of every agent with critics from its original; each file of `agents` adds its own:
#   1. a chunk may follow a history and be longer than what is executed, which is what critics value, by n-step returns;
#      one observation and one action are the single-step papers', and horizon = n_action_steps the chunked ones'. A
#      chunk within which its task ended counts, and its return ends there; one that the recording cuts short teaches
#      the actor alone;
#   2. observations and actions are normalised: the box is the range of the data's actions, and noise, distances and
#      their weights are in its units; theirs are as recorded, in the environment's box. Every estimate of the clean
#      chunk is clipped to the box. Rewards are as recorded unless `td.rewards` says otherwise;
#   3. the actor is this library's Mlp of residual LayerNorm blocks, or any other denoiser, on any schedule; diffusion
#      times are continuous and stratified over the batch; initial weights are PyTorch's;
#   4. the averaged actor acts, its decay rises to 0.999 and it is updated at every step; the target critics choose;
#   5. the actor's learning rate falls to zero along half a cosine, and its gradient is clipped at one norm; the
#      critics' is clipped only where `td.grad_clip` says so;
#   6. batch and length are `TrainConfig`'s, the same for all networks; the last checkpoint is the result, not the best.
