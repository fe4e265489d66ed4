"""Policy: observations in, actions out, in physical units; what is trained, saved, loaded, evaluated and deployed.

    obs --> history --encode--> cond --plan--> chunk --decode--> chunk[To-1 : To-1+Ta] --cursor--> action

`plan(history, noise)` is a function of its arguments. `predict` follows stable-baselines3's protocol; the state of a
rollout is a value that the caller holds, so one policy serves many environments, and starting one of them over
touches no other. The noise of a plan is drawn from (seed, episode, plan), where episodes are numbered over all
environments in turn: a rollout of the same episodes gives the same actions with any number of environments, up to the
rounding of other batch sizes.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffpolicy import saved
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.denoiser import Denoiser, NetworkDenoiser
from diffpolicy.diffusion.prefix import Prefix
from diffpolicy.diffusion.sampler import Sample
from diffpolicy.diffusion.selection import BestOf
from diffpolicy.errors import PolicyError, SpecError
from diffpolicy.guides import Guidance, describe
from diffpolicy.observations import Obs, name_observations
from diffpolicy.parts import (
    DenoiserConfig,
    SamplerConfig,
    Selection,
    SelectionConfig,
    make_planner,
    make_selector,
    why_not,
)
from diffpolicy.precision import full_precision

Plan = Callable[[Mapping[str, torch.Tensor], torch.Tensor, Prefix | None], torch.Tensor]


@dataclass(frozen=True)
class PolicyState:
    """Rollout of N environments: `history {name: (N, To, ...)}`, executed part `chunk (N, Ta, Da)`, counters `(N,)`.

    `cursor` is the next action of the chunk, `episode` how many episodes began before this one, `plan` how many
    plans this episode has had.
    """

    history: Mapping[str, np.ndarray]
    chunk: np.ndarray
    cursor: np.ndarray
    episode: np.ndarray
    plan: np.ndarray


class Policy(nn.Module):
    """A diffusion policy: normalizer, encoder, denoiser and sampler.

    Args:
        spec: sizes and horizons.
        normalizer: fitted, the border of units.
        encoder: named history to condition.
        denoiser: the trained network.
        denoiser_config: what `denoiser` was made from.
        sampler_config: how to sample.
        seed: seed of the noise of `predict`.
        selection: the critic that chooses among several samples; None for a policy that samples once.
        guidance: what bends the samples; None for a policy that samples as it was trained.
    """

    def __init__(
        self,
        spec: Spec,
        normalizer: Normalizer,
        encoder: nn.Module,
        denoiser: NetworkDenoiser,
        denoiser_config: DenoiserConfig,
        sampler_config: SamplerConfig,
        seed: int = 0,
        selection: Selection | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.normalizer = normalizer
        self.encoder = encoder
        self.denoiser = denoiser
        self.denoiser_config = denoiser_config
        self.sampler_config = sampler_config
        if reason := why_not(sampler_config, sampler_config, denoiser_config.prediction):
            raise PolicyError(reason)
        self.seed = seed
        self.selection = selection
        self.critic = None if selection is None else selection.critic
        self.guidance = guidance
        self.guided = denoiser if guidance is None else guidance.guide(denoiser, encoder, self.critic)
        self.planner = self._planner(self.guided)
        self.compiled: Plan | None = None
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the policy plans."""
        return self.normalizer["action"].scale.device

    @property
    def max_delay(self) -> int:
        """Longest delay, in actions, for which the policy was trained to continue chunks; 0 for none."""
        return self.denoiser_config.max_delay

    @property
    def acting(self) -> dict[str, Any]:
        """How noise becomes actions: sampler, selection (None for none) and guidance (None for none), plain values."""
        return {
            "sampler": asdict(self.sampler_config),
            "selection": None if self.selection is None else asdict(self.selection.config),
            "guidance": describe(self.guidance),
        }

    def with_sampler(self, config: SamplerConfig | None = None, **changes: Any) -> "Policy":
        """Return the same policy, weights shared, under another sampler.

        Args:
            config: all of its settings, the noise's temperature among them; the policy's own if None.
            changes: fields of `SamplerConfig` by name: `with_sampler(steps=5)` leaves the others as they are.

        Raises:
            PolicyError: if the network was not trained for it.
            SpecError: if a sampler has no such setting.
        """
        try:
            config = replace(config or self.sampler_config, **changes)
        except TypeError as error:
            names = ", ".join(f.name for f in fields(SamplerConfig))
            raise SpecError(
                f"got {config!r} and {changes}; wanted a SamplerConfig, or its settings by name: {names}"
            ) from error
        if reason := why_not(config, self.sampler_config, self.denoiser_config.prediction):
            raise PolicyError(reason)
        return self._with(config, self.selection, self.guidance)

    def with_selection(self, config: SelectionConfig) -> "Policy":
        """Return the same policy, weights shared, that chooses in another way; one sample means no choosing.

        Raises:
            PolicyError: if the policy has no critic to choose with.
        """
        if self.selection is None:
            raise PolicyError("this policy has no critic to choose with; train one, for example with --agent idql")
        return self._with(self.sampler_config, replace(self.selection, config=config), self.guidance)

    def with_guidance(self, weight: float | None = None, goal: float | None = None) -> "Policy":
        """Return the same policy, weights shared, under a guidance of another weight or goal; what is None stays.

        Args:
            weight: 0 or more; 0 is no guidance, with `cfgrl` the more the more improvement.
            goal: what the policy is told to reach, such as the return of `decision-diffuser`, 1 for the data's best.

        Raises:
            PolicyError: if the policy has no guidance.
            SpecError: if the weight or the goal is impossible.
        """
        if self.guidance is None:
            raise PolicyError("this policy has no guidance to weigh; train one, for example with --agent cfgrl")
        return self._with(self.sampler_config, self.selection, self.guidance.changed(weight, goal))

    def _with(self, sampler: SamplerConfig, selection: Selection | None, guidance: Guidance | None) -> "Policy":
        parts = (self.spec, self.normalizer, self.encoder, self.denoiser, self.denoiser_config)
        return Policy(*parts, sampler, self.seed, selection, guidance)

    def _planner(self, denoiser: Denoiser, repeats: int = 1) -> Sample | BestOf:
        """Return what turns noise into chunks around `denoiser`."""
        planner = make_planner(denoiser, self.denoiser_config.clip, self.sampler_config, repeats)
        return make_selector(planner, self.selection)

    def with_plan(self, plan: Plan) -> "Policy":
        """Return the same policy, weights shared, that plans through `plan`: the same function, compiled."""
        policy = self.with_sampler(self.sampler_config)
        policy.compiled = plan
        return policy

    @torch.inference_mode()
    def plan(
        self, history: Mapping[str, torch.Tensor], noise: torch.Tensor, prefix: Prefix | None = None
    ) -> torch.Tensor:
        """Sample chunks of actions.

        Args:
            history: named observations, `{name: (B, To, ...)}`, physical units, on the policy's device.
            noise: every draw of one sampling, `(draws, B, Tp, Da)`, standard normal; `self.draws(repeats)` of them.
            prefix: actions that are decided already, in physical units, and how they are imposed.

        Returns:
            Chunks `(B, Tp, Da)` in physical units, on the policy's device.

        Raises:
            PolicyError: from a compiled plan, if a shape or the device is not the policy's.
        """
        if self.compiled is not None:
            return self.compiled(history, noise, prefix)
        with full_precision(self.device):
            cond = self.encoder(self.normalizer.encode_obs(history))
            planner = self.planner if prefix is None else self.joining(self.guided, prefix)
            return self.normalizer.decode_action(planner(cond, noise))

    def joining(self, denoiser: Denoiser, prefix: Prefix) -> Sample | BestOf:
        """Return a planner around `denoiser`, of the policy's sampler and selection, that knows the prefix.

        Clipped inside, for its Jacobian, and outside, for its result.
        """
        n, clip = 1 if self.selection is None else self.selection.config.samples, self.denoiser_config.clip
        known = self.normalizer["action"].encode(prefix.chunk).repeat(n, 1, 1)
        weights = prefix.weights.expand(prefix.chunk.shape[:2]).repeat(n, 1)
        free = make_planner(denoiser, clip, self.sampler_config).denoiser
        return self._planner(prefix.guide(free, known, weights), prefix.repeats)

    def draws(self, repeats: int = 1) -> int:
        """Return how many noise tensors a plan needs, with each step of the sampler taken `repeats` times."""
        return self._planner(self.guided, repeats).draws

    def draw(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draw the noise of one plan of `n` chunks, `(draws, n, Tp, Da)`, on the generator's device."""
        shape = (self.planner.draws, n, self.spec.horizon, self.spec.action_dim)
        return torch.randn(shape, generator=generator, device=generator.device)

    def predict(
        self,
        obs: Obs,
        state: PolicyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, PolicyState]:
        """Choose the next action of each environment; plans only for those whose chunk is used up.

        Args:
            obs: one observation or a batch of N, named or a plain array (called `obs`), physical units.
            state: what the last call returned, None at the start.
            episode_start: which environments begin an episode with this observation, `(N,)` bool.
            deterministic: True draws the noise from (seed, episode, plan), False draws it afresh. Never zero noise.

        Returns:
            Actions `(Da,)` or `(N, Da)`, and the state to pass to the next call.

        Raises:
            PolicyError: if a name is missing, a shape differs from the policy's, or a number is not finite.
        """
        state, batched = self.observe(obs, state, episode_start)
        due = self.due(state)
        if len(due):
            history, noise = self.wanted(state, due, deterministic)
            on_device = {name: torch.from_numpy(array).to(self.device) for name, array in history.items()}
            chunk = self.plan(on_device, torch.from_numpy(noise).to(self.device))
            state = self.planned(state, due, chunk.cpu().numpy())
        action, state = self.act(state)
        return (action if batched else action[0]), state

    # --- the parts of `predict`, for those who plan elsewhere or together with others ---

    def observe(
        self, obs: Obs, state: PolicyState | None = None, episode_start: np.ndarray | None = None
    ) -> tuple[PolicyState, bool]:
        """Append an observation to the history; also return whether it came as a batch. As `predict`."""
        named, batched = name_observations(self.spec, obs)
        n = len(next(iter(named.values())))
        start = np.ones(n, dtype=bool) if state is None or episode_start is None else np.atleast_1d(episode_start)
        if state is not None and episode_start is None:
            start = np.zeros(n, dtype=bool)
        return self._observe(named, state or self._blank_state(n), start.astype(bool)), batched

    def due(self, state: PolicyState) -> np.ndarray:
        """Return the numbers of the environments whose chunk is used up."""
        return np.flatnonzero(state.cursor >= self.spec.n_action_steps)

    def wanted(
        self, state: PolicyState, due: np.ndarray, deterministic: bool = True, seed: int | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the arguments of `plan` for the environments `due`; `seed` in place of the policy's own."""
        episode = due + state.episode[due] * len(state.cursor)
        noise = self._noise(self.seed if seed is None else seed, episode, state.plan[due], deterministic)
        return {name: array[due] for name, array in state.history.items()}, noise

    def planned(self, state: PolicyState, due: np.ndarray, chunk: np.ndarray) -> PolicyState:
        """Return the state in which the environments `due` begin their chunks `(len(due), Tp, Da)`."""
        executed, cursor, plan = state.chunk.copy(), state.cursor.copy(), state.plan.copy()
        executed[due] = chunk[:, self.spec.executed]
        cursor[due] = 0
        plan[due] += 1
        return replace(state, chunk=executed, cursor=cursor, plan=plan)

    def act(self, state: PolicyState) -> tuple[np.ndarray, PolicyState]:
        """Return the next action of each environment, `(N, Da)`, and the state after it."""
        action = state.chunk[np.arange(len(state.cursor)), state.cursor]
        return action, replace(state, cursor=state.cursor + 1)

    def _blank_state(self, n: int) -> PolicyState:
        spec = self.spec
        return PolicyState(
            history={k: np.zeros((n, spec.n_obs_steps, *s), dtype=np.float32) for k, s in spec.obs_shapes.items()},
            chunk=np.zeros((n, spec.n_action_steps, spec.action_dim), dtype=np.float32),
            cursor=np.full(n, spec.n_action_steps),
            episode=np.full(n, -1),
            plan=np.zeros(n, dtype=np.int64),
        )

    def _observe(self, obs: dict[str, np.ndarray], state: PolicyState, start: np.ndarray) -> PolicyState:
        """Append the observation to the history; where an episode starts, fill the history with it."""
        history = {}
        for name, array in obs.items():
            shifted = np.concatenate([state.history[name][:, 1:], array[:, None]], axis=1)
            shifted[start] = array[start, None]
            history[name] = shifted
        return replace(
            state,
            history=history,
            cursor=np.where(start, self.spec.n_action_steps, state.cursor),
            episode=state.episode + start,
            plan=np.where(start, 0, state.plan),
        )

    def _noise(self, seed: int, episode: np.ndarray, plan: np.ndarray, deterministic: bool) -> np.ndarray:
        shape = (self.planner.draws, self.spec.horizon, self.spec.action_dim)
        streams = (
            np.random.default_rng([seed, int(e), int(p)] if deterministic else None)
            for e, p in zip(episode, plan, strict=True)
        )
        return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams], axis=1)

    def save(self, folder: str | Path) -> Path:
        """Write `policy.json` and `policy.safetensors` into `folder`, each atomically; return the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        saved.write_weights(folder, self._modules_saved)
        self.save_description(folder)
        return folder

    def save_description(self, folder: Path, **notes: Any) -> None:
        """Write `policy.json` alone, atomically, beside weights that are there; notes are for who reads it."""
        made_of = (self.spec, self.normalizer, self.encoder, self.denoiser, self.denoiser_config, self.sampler_config)
        saved.write_description(folder, (*made_of, self.seed, self.selection, self.guidance), notes)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Policy":
        """Read a saved policy; nothing in it is executed.

        Raises:
            PolicyError: if a file is missing, cut short, of a newer format, or not what it should be.
        """
        policy = saved.read_policy(Path(folder), cls)
        saved.read_weights(Path(folder), policy._modules_saved)
        return policy.to(device)

    @property
    def _modules_saved(self) -> dict[str, nn.Module]:
        """What has weights, by name."""
        modules = {"normalizer": self.normalizer, "encoder": self.encoder, "denoiser": self.denoiser}
        return modules if self.critic is None else {**modules, "critic": self.critic}
