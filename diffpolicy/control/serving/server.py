r"""Server: one policy for many clients over WebSocket, planned in batches; the door, the limits and the figures.

    server = Server(policy, Door())                     127.0.0.1 only; elsewhere a token is required
    with server.background() as url:                    or `await server.run(...)`, as `diffpolicy serve` does
        client = Client(url)

A connection is answered one request at a time, so a client has at most one plan on its way and at most one answer
unread; who does not read it, says nothing for long, sends what is too large, or pings without end, is cut off. Nobody
else notices.
"""

import asyncio
import hmac
import ipaddress
import json
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import numpy as np

from diffpolicy.control.serving import wire
from diffpolicy.control.serving.batching import RECENT, Batcher, Wish
from diffpolicy.control.serving.remote import MAX_REPEATS
from diffpolicy.control.serving.session import Session
from diffpolicy.errors import ControlError, DiffPolicyError, MissingExtraError
from diffpolicy.policy import Policy

MIN_TOKEN = 16
SLACK = 1 << 16
BUFFER = 1 << 16
"""Bytes the system keeps of a connection each way: who floods or does not read is stopped after so many."""


@dataclass(frozen=True)
class Door:
    """Where a server listens, and what it lets in.

    Args:
        host: address to bind.
        port: 0 for any that is free.
        token: that clients must know; required off loopback, at least 16 characters. The connection itself is not
            encrypted: on a network that is not yours, put a proxy with TLS or a tunnel in front.
        max_clients: connected at once.
        max_rows: environments, or sampled chunks, of one request, and rows of one batch.
        open_seconds: a handshake may take.
        idle_seconds: a client may say nothing.
        send_seconds: a client may take to read its answer.

    Raises:
        ControlError: if the host is not loopback and there is no token, or a number is impossible.
    """

    host: str = "127.0.0.1"
    port: int = 8700
    token: str | None = None
    max_clients: int = 256
    max_rows: int = 64
    open_seconds: float = 5.0
    idle_seconds: float = 300.0
    send_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not _is_loopback(self.host) and self.token is None:
            raise ControlError(f"{self.host} can be reached by others and there is no token; give one, or 127.0.0.1")
        if self.token is not None and not (len(self.token) >= MIN_TOKEN and self.token.isascii()):
            raise ControlError(f"the token is too short or not ASCII; give one of at least {MIN_TOKEN} characters")
        numbers = (self.max_clients, self.max_rows, self.open_seconds, self.idle_seconds, self.send_seconds)
        if min(numbers) <= 0 or not 0 <= self.port < 2**16:
            raise ControlError(f"port is {self.port} and the limits {numbers}; give a port below 65536, limits above 0")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server:
    """A policy behind a door; `figures` says what has happened.

    Args:
        policy: on its device, with a compiled plan (`with_plan`) or without.
        door: where it listens.

    Raises:
        MissingExtraError: if websockets or msgpack are not installed.
    """

    def __init__(self, policy: Policy, door: Door = Door()) -> None:
        wire.msgpack()
        _websockets()
        self.policy, self.door = policy, door
        self.batcher = Batcher(policy, door.max_rows)
        self._clients = 0
        self._requests = self._refused = self._turned_away = self._cut_off = 0
        self._request_ms: deque[float] = deque(maxlen=RECENT)
        self._began = time.monotonic()

    async def run(self, stop: asyncio.Event, opened: Callable[[str], object] = lambda url: None) -> None:
        """Serve until `stop` is set; `opened` is told the url once the first plan has been made.

        Raises:
            ControlError: if the address cannot be had.
        """
        planning = asyncio.create_task(self.batcher.run())
        door = self.door
        try:
            await self.batcher.plan(self._example())  # what compiles or loads at the first plan does so now
            async with _websockets().asyncio.server.serve(
                self._converse, sock=_listening(door), process_request=self._admit, origins=[None], compression=None,
                open_timeout=door.open_seconds, close_timeout=1, max_size=self.max_message, max_queue=1,
                create_connection=_bounded(4 * self.max_message, self._cut),
            ) as server:  # fmt: skip
                opened(_url(server.sockets[0].getsockname()))
                await stop.wait()
        except OSError as error:
            raise ControlError(f"{door.host} port {door.port} cannot be had ({error}); choose another") from error
        finally:
            planning.cancel()
            self.batcher.close()

    @contextmanager
    def background(self) -> Iterator[str]:
        """Serve from a thread; yields the url."""
        opened: Future[str] = Future()
        stopper: Future[Callable[[], object]] = Future()

        async def main() -> None:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()
            stopper.set_result(lambda: loop.call_soon_threadsafe(stop.set))
            await self.run(stop, opened.set_result)

        def work() -> None:
            try:
                asyncio.run(main())
            except Exception as error:
                if opened.done():
                    raise
                opened.set_exception(error)

        thread = Thread(target=work, daemon=True, name="diffpolicy-server")
        thread.start()
        url = opened.result()
        try:
            yield url
        finally:
            stopper.result()()
            thread.join()

    @property
    def max_message(self) -> int:
        """Bytes of the largest message that can be right: one row may take each step of the sampler 16 times."""
        spec, rows = self.policy.spec, self.door.max_rows
        observed = spec.n_obs_steps * sum(int(np.prod(shape)) for shape in spec.obs_shapes.values())
        draws = max(rows * self.policy.planner.draws, self.policy.draws(MAX_REPEATS))
        return SLACK + 4 * (rows * observed + (draws + 2 * rows) * spec.horizon * spec.action_dim)

    @property
    def figures(self) -> dict[str, Any]:
        """Clients, requests, latency in ms and rows a batch, of the last 4096."""
        plans = self.batcher.figures
        return {
            "clients": self._clients,
            "requests": self._requests,
            "refused": self._refused,
            "turned_away": self._turned_away,
            "cut_off": self._cut_off,
            "plans": plans.plans,
            "request_ms": _quantiles(self._request_ms),
            "plan_ms": _quantiles(plans.plan_ms),
            "batch": _quantiles(plans.batch),
            "device": str(self.policy.device),
            "compiled": getattr(self.policy.compiled, "backend", None),
            "uptime_s": round(time.monotonic() - self._began, 1),
        }

    def _admit(self, connection: Any, request: Any) -> Any:
        """Turn away who has not the token, and who comes when all places are taken."""
        token, given = self.door.token, request.headers.get_all("Authorization")
        wanted = [] if token is None else [f"Bearer {token}"]
        if wanted and not (len(given) == 1 and _same(given[0], wanted[0])):
            self._turned_away += 1
            return connection.respond(401, "the token is missing or wrong; give the server's\n")
        if self._clients >= self.door.max_clients:
            self._turned_away += 1
            return connection.respond(503, f"all {self.door.max_clients} places are taken; try again later\n")
        return None

    async def _converse(self, connection: Any) -> None:
        """Answer one client until it leaves or is cut off."""
        session = Session(self.batcher)
        self._clients += 1
        try:
            while True:
                data = await asyncio.wait_for(connection.recv(), self.door.idle_seconds)
                answer = await self._answer(session, data)
                await asyncio.wait_for(connection.send(answer), self.door.send_seconds)
        except TimeoutError:
            self._cut(connection)
        except _websockets().exceptions.ConnectionClosed:
            pass
        finally:
            self._clients -= 1

    def _cut(self, connection: Any) -> None:
        self._cut_off += 1
        connection.transport.abort()

    async def _answer(self, session: Session, data: bytes | str) -> bytes:
        begin = time.perf_counter()
        self._requests += 1
        try:
            message = wire.unpack(data)
            if message["kind"] == "health":
                return wire.pack({"kind": "health", "health": json.dumps(self.figures)})
            answer = await session.answer(message)
        except DiffPolicyError as error:
            self._refused += 1
            answer = {"kind": "error", "message": str(error)}
        self._request_ms.append(1e3 * (time.perf_counter() - begin))
        return wire.pack(answer)

    def _example(self) -> Wish:
        """A first plan."""
        policy, spec = self.policy, self.policy.spec
        obs = {name: np.zeros(shape, dtype=np.float32) for name, shape in spec.obs_shapes.items()}
        state, _ = policy.observe(obs)
        return Wish(*policy.wanted(state, policy.due(state)))


def _bounded(most: int, cut: Callable[[Any], object]) -> type:
    """A connection that is cut if more than `most` bytes wait to be read: pings are answered without `_converse`."""

    class Bounded(_websockets().asyncio.server.ServerConnection):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.transport.get_write_buffer_size() > most and not self.transport.is_closing():
                cut(self)

    return Bounded


def _listening(door: Door) -> socket.socket:
    family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
    listening = socket.create_server((door.host, door.port), family=family)
    for side in (socket.SO_RCVBUF, socket.SO_SNDBUF):  # accepted connections inherit them
        listening.setsockopt(socket.SOL_SOCKET, side, BUFFER)
    return listening


def _same(a: str, b: str) -> bool:
    """Compare in a time that does not tell how much was right."""
    return hmac.compare_digest(a.encode(errors="surrogateescape"), b.encode())


def _url(address: tuple[Any, ...]) -> str:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"ws://{host}:{address[1]}"


def _quantiles(values: deque[Any]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(("mean", "p50", "p99", "max"))
    array = np.asarray(values, dtype=np.float64)
    found = (array.mean(), *np.percentile(array, [50, 99, 100]))
    return {name: round(float(x), 3) for name, x in zip(("mean", "p50", "p99", "max"), found, strict=True)}


def _websockets() -> Any:
    try:
        import websockets.asyncio.server
        import websockets.exceptions
    except ImportError as error:
        raise MissingExtraError(f"{error}; pip install 'diffpolicy[serve]' for servers and clients") from error
    return websockets
