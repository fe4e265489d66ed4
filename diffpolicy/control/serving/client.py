r"""Client: actions from a policy that runs elsewhere (`diffpolicy serve`); numpy, msgpack and websockets, no torch.

    with Client("ws://127.0.0.1:8700") as client:
        action, state = client.predict(obs, state, episode_start)      stable-baselines3's protocol, as a `Policy`

`predict` sends every observation: history, chunk and episode number live at the server, under this connection, and are
gone with it. `plan` sends a history and gets a chunk: one message a chunk, and nothing is kept at the server.
"""

import json
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from diffpolicy.control.serving import wire
from diffpolicy.data.spec import Spec
from diffpolicy.errors import ControlError, MissingExtraError

MAX_REPLY = 1 << 28


@dataclass(frozen=True)
class RemoteState:
    """A rollout whose state is at the server: `number` counts the calls of `predict` of this client."""

    number: int


class Client:
    """A connection to a policy's server; its rollout is one, of any number of environments.

    Args:
        url: `ws://host:port`, or `wss://` behind a proxy with TLS.
        token: the server's, needed off loopback.
        seed: of the noise, the policy's own if None: the actions are those of a policy with this seed.
        timeout: seconds a request may find nobody who takes it (except through TLS), and its answer may take; then the
            connection is closed.

    Raises:
        ControlError: if there is no server, or it refuses.
        MissingExtraError: if websockets or msgpack are not installed.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8700",
        token: str | None = None,
        seed: int | None = None,
        timeout: float = 10.0,
    ) -> None:
        self.url, self.timeout = url, timeout
        self._lock, self._stack = Lock(), ExitStack()
        with self._stack as stack:  # which ends the connection if the server does not welcome
            self._connection = stack.enter_context(_connect(url, token, timeout))
            welcome = self.ask("hello", protocol=wire.PROTOCOL, seed=seed)
            self.about: dict[str, Any] = json.loads(welcome["about"])
            """What the server says of its policy."""
            self.numbers: dict[str, dict[str, Any]] = welcome["numbers"]
            """Arrays of the policy's normalizer, as they came."""
            self.spec = Spec.from_json(self.about["spec"])
            self._calls = 0
            self._stack = stack.pop_all()

    def predict(
        self,
        obs: Mapping[str, np.ndarray] | np.ndarray,
        state: RemoteState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, RemoteState]:
        """Choose the next action of each environment; arguments and result as `Policy.predict`.

        Args:
            obs: one observation or a batch of N, named or a plain array, physical units.
            state: what the last call returned, None at the start of a rollout.
            episode_start: which environments begin an episode with this observation, `(N,)` bool.
            deterministic: True draws the noise from (seed, episode, plan), False draws it afresh.

        Raises:
            ControlError: if the observation is not the policy's, the state is not the last one, or the server fails.
        """
        named, batched = self._named(obs)
        if state is not None and state.number != self._calls:
            raise ControlError(
                f"the state is that of call {state.number} and this client made {self._calls}; a client holds one "
                "rollout: open another for another"
            )
        begins = None if episode_start is None else np.atleast_1d(episode_start).astype(np.uint8)
        said = {"obs": named, "start": begins, "fresh": state is None, "deterministic": bool(deterministic)}
        n = len(next(iter(named.values())))
        action = wire.array(self.ask("predict", **said).get("action"), "the action", (n, self.spec.action_dim)).copy()
        self._calls += 1
        return (action if batched else action[0]), RemoteState(self._calls)

    def plan(
        self, history: Mapping[str, np.ndarray], noise: np.ndarray, prefix: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """Plan chunks, as `Policy.plan`.

        Args:
            history: `{name: (B, To, ...)}`, physical units.
            noise: `(draws, B, Tp, Da)`, standard normal; `draws()` of them.
            prefix: as `diffpolicy.control.serving.remote.describe` makes it.

        Returns:
            `(B, Tp, Da)` in physical units.

        Raises:
            ControlError: if a shape is not the policy's, or the server fails.
        """
        history = {name: _compact(array) for name, array in history.items()}
        reply = self.ask("plan", history=history, noise=_compact(noise), prefix=prefix)
        shape = (np.shape(noise)[1], self.spec.horizon, self.spec.action_dim)
        return wire.array(reply.get("chunk"), "the chunk", shape).copy()

    def draws(self, repeats: int = 1) -> int:
        """Return how many noise arrays a plan needs, as `Policy.draws`."""
        return int(self.ask("draws", repeats=repeats)["draws"])

    def reset(self) -> None:
        """Let the next observation begin an episode, in every environment."""
        self.ask("reset")

    def health(self) -> dict[str, Any]:
        """Return the server's figures: clients, requests, latency and batch sizes."""
        return json.loads(self.ask("health")["health"])

    def ask(self, kind: str, **content: Any) -> dict[str, Any]:
        """Send a request and return its answer; requests of several threads wait for each other.

        Raises:
            ControlError: if the server refuses, is gone, or does not answer in time.
        """
        from websockets.exceptions import ConnectionClosed

        request = wire.pack({"kind": kind, **content})
        with self._lock:
            try:
                self._connection.send(request)
                answer = self._connection.recv(timeout=self.timeout)
            except TimeoutError as error:
                self._stack.close()
                raise ControlError(
                    f"the server at {self.url} did not answer within {self.timeout:g} s; connect again"
                ) from error
            except ConnectionClosed as error:
                raise ControlError(f"the connection to {self.url} is closed ({error}); connect again") from error
            except BaseException:  # Ctrl-C: the answer that is on its way would be taken for the next request's
                self._stack.close()
                raise
        reply = wire.unpack(answer)
        if reply["kind"] == "error":
            raise ControlError(str(reply.get("message")))
        return reply

    def close(self) -> None:
        """End the connection; the server forgets this client."""
        self._stack.close()

    def __enter__(self) -> "Client":
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _named(self, obs: Mapping[str, np.ndarray] | np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
        """Name and batch an observation; also return whether it came as a batch."""
        given = obs if isinstance(obs, Mapping) else {"obs": obs}
        arrays, batched = {}, True
        for name, shape in self.spec.obs_shapes.items():
            if name not in given:
                raise ControlError(
                    f"the observation has {sorted(given)}; the policy needs {sorted(self.spec.obs_shapes)}"
                )
            array = _compact(given[name])
            batched = array.ndim > len(shape)
            if array.shape[batched:] != shape:
                raise ControlError(f"observation {name!r} has shape {array.shape}; wanted {shape} or (N, *{shape})")
            arrays[name] = array if batched else array[None]
        return arrays, batched


def _compact(array: np.ndarray) -> np.ndarray:
    """Images stay bytes; every other number is a float32, as the policy takes it."""
    array = np.asarray(array)
    return array if array.dtype == np.uint8 else array.astype(np.float32)


def _connect(url: str, token: str | None, timeout: float) -> Any:
    try:
        from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI
        from websockets.sync.client import connect
    except ImportError as error:
        raise MissingExtraError(f"{error}; pip install 'diffpolicy[serve]' for servers and clients") from error
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        connection = connect(
            url, additional_headers=headers, compression=None, proxy=None, open_timeout=timeout, close_timeout=1,
            max_size=MAX_REPLY,
        )  # fmt: skip
        _bound_sending(connection.socket, timeout)
        return connection
    except InvalidStatus as error:
        said = bytes(error.response.body or b"").decode(errors="replace").strip()
        raise ControlError(f"the server at {url} refuses ({error.response.status_code}): {said}") from error
    except (OSError, InvalidHandshake, InvalidURI) as error:  # a TimeoutError is an OSError
        raise ControlError(f"there is no policy server at {url} ({error}); start one with diffpolicy serve") from error


def _bound_sending(connection: socket.socket, timeout: float) -> None:
    """Let no sending block for longer: websockets has a time limit for receiving only."""
    milliseconds = max(1, round(1e3 * timeout))
    posix = struct.pack("@ll", milliseconds // 1000, milliseconds % 1000 * 1000)  # a timeval
    option = milliseconds if sys.platform == "win32" else posix
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, option)
