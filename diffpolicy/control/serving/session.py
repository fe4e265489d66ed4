"""One client's rollout at a server: what its requests may hold, and the state that lives under its connection.

    predict   obs -> history -> [plan, with those of others] -> chunk -> action     history, cursor, episode kept here
    plan      history, noise, [prefix] -> chunk                                     nothing kept

The steps of `predict` are those of `Policy.predict`, so the actions are too. Every array is compared with the policy's
sizes before anything is made of it.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from diffpolicy.control.serving import wire
from diffpolicy.control.serving.batching import Batcher, Wish
from diffpolicy.control.serving.remote import described, normalizer_numbers, read_repeats
from diffpolicy.errors import ControlError
from diffpolicy.policy import PolicyState

Message = Mapping[str, Any]


class Session:
    """The requests of one connection, answered one after the other."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher, self.policy, self.spec = batcher, batcher.policy, batcher.policy.spec
        self.seed = self.policy.seed
        self.state: PolicyState | None = None
        self._begins = False
        self._answers: dict[str, Callable[[Message], Awaitable[dict[str, Any]]]] = {
            "hello": self._hello,
            "predict": self._predict,
            "plan": self._plan,
            "draws": self._draws,
            "reset": self._reset,
        }

    async def answer(self, message: Message) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            ControlError: if the request is not as it should be, or the policy failed.
        """
        kind = message["kind"]
        if kind not in self._answers:
            raise ControlError(f"there is no request {kind[:40]!r}; choose one of {', '.join(self._answers)}, health")
        return await self._answers[kind](message)

    async def _hello(self, message: Message) -> dict[str, Any]:
        """Take the seed of the noise; say what the policy is."""
        protocol, seed = message.get("protocol"), message.get("seed")
        if protocol != wire.PROTOCOL:
            raise ControlError(
                f"the client speaks protocol {str(protocol)[:40]}, the server {wire.PROTOCOL}; install one version of "
                "diffpolicy on both"
            )
        if seed is not None and (type(seed) is not int or seed < 0):
            raise ControlError(f"the seed is {str(seed)[:40]}; wanted a whole number of at least 0")
        self.seed = self.policy.seed if seed is None else seed
        policy = self.policy
        about = {
            "spec": self.spec.to_json(), "normalizer": policy.normalizer.to_json(), "seed": self.seed,
            "max_delay": policy.max_delay,
        }  # fmt: skip
        return {"kind": "welcome", "about": json.dumps(about), "numbers": normalizer_numbers(policy.normalizer)}

    async def _predict(self, message: Message) -> dict[str, Any]:
        """Observe, plan where a chunk is used up, act."""
        state = None if message.get("fresh") else self.state
        obs, n = self._rows(message.get("obs"), ())
        if state is not None and len(state.cursor) != n:
            raise ControlError(f"{n} observations came, and this rollout has {len(state.cursor)} environments")
        start = message.get("start")
        if start is not None:
            start = wire.array(start, "episode_start", (n,)).astype(bool)
        if self._begins:
            start = np.ones(n, dtype=bool)
        policy = self.policy
        state, _ = policy.observe(obs, state, start)
        due = policy.due(state)
        if len(due):
            wish = Wish(*policy.wanted(state, due, message.get("deterministic") is not False, self.seed))
            state = policy.planned(state, due, await self.batcher.plan(wish))
        action, self.state = policy.act(state)  # what failed before this has changed nothing
        self._begins = False
        return {"kind": "action", "action": action}

    async def _plan(self, message: Message) -> dict[str, Any]:
        """Plan chunks from the client's own history and noise."""
        spec, policy = self.spec, self.policy
        history, n = self._rows(message.get("history"), (spec.n_obs_steps,))
        shape = (n, spec.horizon, spec.action_dim)
        prefix = None if message.get("prefix") is None else described(message["prefix"], shape)
        draws = policy.planner.draws if prefix is None else policy.draws(prefix.repeats)
        noise = wire.array(message.get("noise"), "the noise", (draws, *shape)).astype(np.float32)
        history = {name: array.astype(np.float32) for name, array in history.items()}
        return {"kind": "chunk", "chunk": await self.batcher.plan(Wish(history, noise, prefix))}

    async def _draws(self, message: Message) -> dict[str, Any]:
        """Say how many noise arrays a plan needs."""
        return {"kind": "draws", "draws": self.policy.draws(read_repeats(message.get("repeats")))}

    async def _reset(self, message: Message) -> dict[str, Any]:
        """Let the next observation begin an episode, in every environment."""
        self._begins = True
        return {"kind": "done"}

    def _rows(self, named: Any, before: tuple[int, ...]) -> tuple[dict[str, np.ndarray], int]:
        """Read arrays `(n, *before, *shape)` of every name of the policy, of one n; return them and n."""
        shapes = self.spec.obs_shapes
        if not isinstance(named, dict) or set(named) != set(shapes):
            came = sorted(str(name)[:40] for name in named) if isinstance(named, dict) else "no map of arrays"
            raise ControlError(f"the observation has {came}; the policy needs {sorted(shapes)}")
        arrays = {k: wire.array(named[k], f"observation {k!r}", (None, *before, *s)) for k, s in shapes.items()}
        sizes = {len(array) for array in arrays.values()}
        n, most = max(sizes), self.batcher.max_rows
        if len(sizes) > 1 or not 1 <= n <= most:
            raise ControlError(f"the observations have {sorted(sizes)} rows; wanted one number of them, 1 to {most}")
        return arrays, n
