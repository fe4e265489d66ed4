"""A policy behind a server: its actions are those of the policy in process, whoever else is asking."""

import base64
import hashlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from diffpolicy.cli.serve import line
from diffpolicy.control import Client, Door, RealTime, RemotePolicy, Runner, Server, Synchronous
from diffpolicy.control.clock import VirtualClock, VirtualWorker
from diffpolicy.control.serving import wire
from diffpolicy.control.serving.client import _connect
from diffpolicy.control.serving.remote import describe, described
from diffpolicy.control.strategies import Strategy
from diffpolicy.data.spec import Spec
from diffpolicy.diffusion.guidance import Pinned, RealTimeChunk, Spread, Trained, blended
from diffpolicy.diffusion.prefix import Prefix, hard
from diffpolicy.errors import ControlError
from diffpolicy.policy import Policy

POLICY = Path(__file__).parents[1] / "fixtures" / "policy_format_3"
TOKEN = "correct horse battery"


@pytest.fixture
def policy() -> Policy:
    return Policy.load(POLICY)


def row_by_row(policy: Policy, seconds: float = 0.003) -> Policy:
    """The policy with a plan whose rows do not round differently in other company; it takes a little time."""

    def plan(history, noise: torch.Tensor, prefix: Prefix | None) -> torch.Tensor:
        time.sleep(seconds)
        observed = sum(array[:, step].flatten(1)[:, :1] for array in history.values() for step in range(array.shape[1]))
        return noise[0] + observed[:, None]

    return policy.with_plan(plan)


def observations(spec: Spec, seed: int, count: int, *rows: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {name: rng.uniform(-1, 1, (*rows, *shape)).astype(np.float32) for name, shape in spec.obs_shapes.items()}
        for _ in range(count)
    ]


def actions(actor: Policy | Client, seed: int, count: int, *rows: int) -> np.ndarray:
    """What it does over a rollout in which episodes begin now and then."""
    begins = np.random.default_rng(seed + 1000).random((count, *rows)) < 0.15
    state, said = None, []
    for obs, begin in zip(observations(actor.spec, seed, count, *rows), begins, strict=True):
        action, state = actor.predict(obs, state, begin)
        said.append(action)
    return np.stack(said)


def seeded(policy: Policy, seed: int) -> Policy:
    policy = policy.with_plan(policy.compiled) if policy.compiled else policy.with_sampler(policy.sampler_config)
    policy.seed = seed
    return policy


# --- the same actions ---


@pytest.mark.parametrize("rows", [(), (1,), (3,)])
def test_a_client_acts_to_the_bit_as_the_policy_of_its_seed_in_process(policy: Policy, rows: tuple[int, ...]):
    with Server(policy, Door(port=0)).background() as url, Client(url, seed=7) as client, Client(url) as unseeded:
        np.testing.assert_array_equal(actions(client, 0, 30, *rows), actions(seeded(policy, 7), 0, 30, *rows))
        np.testing.assert_array_equal(actions(unseeded, 1, 20, *rows), actions(policy, 1, 20, *rows))


def test_64_clients_at_once_each_act_to_the_bit_as_the_policy_in_process(policy: Policy):
    slow, count = row_by_row(policy), 24

    def one(url: str, seed: int) -> np.ndarray:
        with Client(url, seed=seed, timeout=60) as client:
            return actions(client, seed, count)

    server = Server(slow, Door(port=0))
    with server.background() as url, ThreadPoolExecutor(64) as pool:
        said = list(pool.map(partial(one, url), range(64)))
    for seed in range(64):
        np.testing.assert_array_equal(said[seed], actions(seeded(row_by_row(policy, 0), seed), seed, count))
    assert server.figures["batch"]["max"] >= 8  # they were planned together


def test_planned_together_a_network_rounds_by_less_than_1e_5_of_the_actions_range(policy: Policy):
    def one(url: str, seed: int) -> np.ndarray:
        with Client(url, seed=seed, timeout=60) as client:
            return actions(client, seed, 12)

    server = Server(policy, Door(port=0))
    with server.background() as url, ThreadPoolExecutor(16) as pool:
        said = list(pool.map(partial(one, url), range(16)))
    action = policy.normalizer["action"]
    width = (action.maximum - action.minimum).numpy()
    for seed in range(16):
        assert (abs(said[seed] - actions(seeded(policy, seed), seed, 12)) / width).max() < 1e-5
    assert server.figures["batch"]["max"] >= 4


def test_reset_begins_an_episode_and_a_refused_request_changes_nothing(policy: Policy):
    obs = observations(policy.spec, 0, 6)
    with Server(policy, Door(port=0)).background() as url, Client(url) as client:
        state = mine = None
        for k in range(6):
            if k == 3:
                client.reset()
            else:
                bad = {name: np.full_like(array, np.nan) for name, array in obs[k].items()}
                with pytest.raises(ControlError, match="not finite"):
                    client.predict(bad, state)
            said, state = client.predict(obs[k], state)
            wanted, mine = policy.predict(obs[k], mine, np.array([k == 3]))
            np.testing.assert_array_equal(said, wanted)
        with pytest.raises(ControlError, match="a client holds one rollout"):
            client.predict(obs[0], type(state)(2))


def test_images_stay_bytes_on_the_way_and_dictionaries_keep_their_names(policy: Policy):
    policy.spec = Spec({"camera": (8, 8, 3), "arm.joints": (7,)}, policy.spec.action_dim, 16, 2, 8)
    policy = row_by_row(policy, 0)
    rng, state, mine = np.random.default_rng(0), None, None
    with Server(policy, Door(port=0)).background() as url:
        client = object.__new__(Client)  # the policy's own normalizer has no images yet, so `hello` is left out
        client.__dict__.update(Client(url).__dict__)
        for _ in range(12):
            obs = {"camera": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), "arm.joints": rng.normal(size=7)}
            said, state = client.predict(obs, state)
            wanted, mine = policy.predict(obs, mine)
            np.testing.assert_array_equal(said, wanted)


@pytest.mark.parametrize(
    "strategy",
    [Synchronous(), RealTime(), RealTime(partial(Pinned), hard, 3)],
    ids=["synchronous", "guided", "repeats"],
)
def test_a_runner_writes_the_same_actions_through_a_server(policy: Policy, strategy: Strategy):
    def written(planner) -> np.ndarray:
        clock = VirtualClock()
        loop = Runner(planner, 50.0, strategy, delay=1, warm_up=0).start(VirtualWorker(clock, lambda: 0.01))
        said = []
        for obs in observations(policy.spec, 3, 24):
            clock.time += 0.02
            said.append(loop.step(clock.now(), obs))
        assert loop.report.ok
        return np.stack([action for action in said if action is not None])

    with Server(policy, Door(port=0)).background() as url, Client(url, timeout=30) as client:
        remote = written(RemotePolicy(client))
    assert len(remote) > 20
    np.testing.assert_array_equal(remote, written(policy))


@pytest.mark.parametrize(
    "guide",
    [
        *(RealTimeChunk, Pinned, Trained, blended, partial(blended, beta=20.0, std=0.3)),
        partial(RealTimeChunk, beta=50.0, variance=Spread(0.3), jacobian=False),
    ],
)
def test_what_a_chunk_must_agree_with_comes_through(guide: Callable):
    prefix = Prefix(torch.randn(2, 8, 3), torch.rand(8), guide, repeats=2)
    read = described(wire.unpack(wire.pack({"kind": "plan", **describe(prefix)})), (2, 8, 3))
    assert torch.equal(read.chunk, prefix.chunk) and torch.equal(read.weights, prefix.weights.expand(2, 8))
    assert read.repeats == 2
    assert getattr(read.guide, "func", read.guide) is getattr(guide, "func", guide)
    assert getattr(read.guide, "keywords", {}) == getattr(guide, "keywords", {})


def test_a_failing_policy_is_one_sentence_and_the_next_client_is_served(policy: Policy):
    fails = [False, True, True, False]  # the first plan is the server's own

    def plan(history, noise: torch.Tensor, prefix: Prefix | None) -> torch.Tensor:
        if fails.pop(0):
            raise RuntimeError("out of memory\nwith a long story")
        return noise[0]

    with Server(policy.with_plan(plan), Door(port=0)).background() as url, Client(url) as client:
        obs = observations(policy.spec, 0, 1)[0]
        for _ in range(2):
            with pytest.raises(ControlError, match=r"the policy failed: RuntimeError: out of memory$"):
                client.predict(obs)
        assert client.predict(obs)[0].shape == (policy.spec.action_dim,)
        assert client.health()["refused"] == 2


def test_nobody_fails_because_of_whom_he_was_planned_with(policy: Policy):
    together = []

    def plan(history, noise: torch.Tensor, prefix: Prefix | None) -> torch.Tensor:
        time.sleep(0.01)
        if (history["pose"] > 100).any():
            together.append(noise.shape[1])
            raise ValueError("too far")
        return noise[0]

    def ask(url: str, k: int) -> bool:
        with Client(url, timeout=60) as client:
            obs = observations(policy.spec, 0, 1)[0]
            obs["pose"] = obs["pose"] + 1000 * (k % 2)
            for _ in range(5):
                try:
                    client.predict(obs)
                    failed = False
                except ControlError as error:
                    failed = "the policy failed: ValueError: too far" in str(error)
                if failed != bool(k % 2):
                    return False
        return True

    server = Server(policy.with_plan(plan), Door(port=0))
    with server.background() as url, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(partial(ask, url), range(8)))
    assert max(together) > 1


def test_a_chunk_that_is_not_finite_never_reaches_a_client(policy: Policy):
    server = Server(policy.with_plan(lambda history, noise, prefix: noise[0] + float("nan")), Door(port=0))
    with pytest.raises(ControlError, match="not finite; do not execute it"), server.background():
        pass  # the server's own first plan says so already


# --- the door ---


def test_a_server_that_others_can_reach_wants_a_token_of_16_characters():
    with pytest.raises(ControlError, match="can be reached by others and there is no token"):
        Door("0.0.0.0")
    with pytest.raises(ControlError, match="at least 16 characters"):
        Door("0.0.0.0", token="short")
    assert Door("0.0.0.0", token=TOKEN).token == TOKEN
    assert Door("::1").token is None


def test_without_the_token_nobody_comes_in(policy: Policy):
    server = Server(row_by_row(policy, 0), Door(port=0, token=TOKEN))
    with server.background() as url:
        for wrong in (None, "", "correct horse batterx", TOKEN + "x"):
            with pytest.raises(ControlError, match=r"401.*the token is missing or wrong"):
                Client(url, wrong)
        with Client(url, TOKEN) as client:
            assert client.health()["turned_away"] == 4


def test_a_page_in_a_browser_is_not_let_in_and_one_too_many_neither(policy: Policy):
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    with Server(row_by_row(policy, 0), Door(port=0, max_clients=2)).background() as url:
        with pytest.raises(InvalidStatus, match="403"):
            connect(url, origin="http://evil.example").__enter__()
        with Client(url), Client(url), pytest.raises(ControlError, match=r"503.*all 2 places are taken"):
            Client(url)


def test_who_says_nothing_is_cut_off_and_who_was_late_is_told(policy: Policy):
    with Server(row_by_row(policy, 0.5), Door(port=0, idle_seconds=0.3)).background() as url:
        obs = observations(policy.spec, 0, 1)[0]
        with Client(url) as client:
            time.sleep(0.6)
            with pytest.raises(ControlError, match="is closed"):
                client.predict(obs)
        with Client(url, timeout=0.1) as client, pytest.raises(ControlError, match=r"did not answer within 0.1 s"):
            client.predict(obs)
        with pytest.raises(ControlError, match="there is no policy server"):
            Client("ws://127.0.0.1:9")


def test_an_interrupted_request_never_gets_the_next_one_the_wrong_answer(policy: Policy):
    spec = policy.spec
    history = {name: np.zeros((1, spec.n_obs_steps, *shape), np.float32) for name, shape in spec.obs_shapes.items()}
    noise = np.ones((1, 1, spec.horizon, spec.action_dim), np.float32)
    with Server(row_by_row(policy, 0), Door(port=0)).background() as url, Client(url) as client:
        receive = client._connection.recv

        def interrupted(timeout: float) -> bytes:
            client._connection.recv = receive
            raise KeyboardInterrupt

        client._connection.recv = interrupted
        with pytest.raises(KeyboardInterrupt):
            client.plan(history, noise)
        with pytest.raises(ControlError, match="connect again"):  # rather than the answer to the first
            client.plan(history, 2 * noise)


def shaking_hands(listening: socket.socket, release: threading.Event) -> None:
    """A server that opens the connection, answers `hello`'s bytes by none, and reads nothing more."""
    peer, _ = listening.accept()
    data = b""
    while b"\r\n\r\n" not in data:
        data += peer.recv(1000)
    key = re.search(rb"(?i)sec-websocket-key: (\S+)", data).group(1)
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    peer.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )
    release.wait(30)
    peer.close()


def test_a_server_that_stops_reading_is_given_up_after_the_timeout():
    """8 MB are more than the system keeps of a connection."""
    release = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        peer = threading.Thread(target=shaking_hands, args=(listening, release), daemon=True)
        peer.start()
        url = f"ws://127.0.0.1:{listening.getsockname()[1]}"
        client = object.__new__(Client)  # this server has no welcome
        client.url, client.timeout, client._lock, client._stack = url, 0.5, threading.Lock(), ExitStack()
        client._connection = client._stack.enter_context(_connect(url, None, 0.5))
        threading.Timer(10, release.set).start()
        begin = time.monotonic()
        with pytest.raises(ControlError, match="connect again"):
            client.ask("predict", obs=np.zeros(8_000_000, np.float32))
        assert time.monotonic() - begin < 5
        release.set()
        peer.join()


def test_a_client_that_is_not_welcome_leaves_no_connection_behind(policy: Policy):
    server = Server(row_by_row(policy, 0), Door(port=0))
    with server.background() as url:
        with pytest.raises(ControlError, match="the seed is -1"):
            Client(url, seed=-1)
        deadline = time.monotonic() + 5
        while server.figures["clients"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.figures["clients"] == 0


def test_the_largest_legal_request_comes_through(policy: Policy):
    """RePaint of one chunk: 100 steps taken 16 times each are 3,100 draws, 200 kB."""
    many = row_by_row(policy.with_sampler(replace(policy.sampler_config, steps=100)), 0)
    with Server(many, Door(port=0, max_rows=1)).background() as url, Client(url) as client:
        remote = RemotePolicy(client)
        noise = torch.randn(remote.draws(16), 1, policy.spec.horizon, policy.spec.action_dim)
        history = {name: torch.zeros(1, policy.spec.n_obs_steps, *s) for name, s in policy.spec.obs_shapes.items()}
        known = Prefix(torch.zeros(noise.shape[1:]), torch.zeros(1, policy.spec.horizon), Pinned, 16)
        assert len(noise) > 2000
        assert torch.equal(remote.plan(history, noise, known), many.plan(history, noise, known))


def test_a_policy_at_a_server_says_for_which_delays_it_was_trained(policy: Policy):
    with Server(row_by_row(policy, 0), Door(port=0)).background() as url, Client(url) as client:
        assert RemotePolicy(client).max_delay == policy.max_delay == 0
        with pytest.raises(ControlError, match="up to 0 and the delay is 0"):
            Runner(RemotePolicy(client), 50.0, RealTime(Trained, hard))
    policy.denoiser_config = replace(policy.denoiser_config, max_delay=3)
    with Server(row_by_row(policy, 0), Door(port=0)).background() as url, Client(url) as client:
        Runner(RemotePolicy(client), 50.0, RealTime(Trained, hard), delay=2)


# --- without torch; from the command line ---

ROBOT = """
import sys
for name in ("torch", "gymnasium", "stable_baselines3", "safetensors", "h5py"):
    sys.modules[name] = None
import diffpolicy as dp
from diffpolicy.control import Client
import numpy as np
with Client(sys.argv[1], seed=5) as client:
    obs, state = {n: np.full(s, 0.25, np.float32) for n, s in client.spec.obs_shapes.items()}, None
    for _ in range(10):
        action, state = client.predict(obs, state)
        print(*(float(a).hex() for a in action))
assert not any(name.split(".")[0] == "torch" for name in sys.modules if sys.modules[name])
try:
    dp.Policy
except ImportError as error:
    print("none of", error.name)
"""


def test_a_robot_without_torch_gets_the_same_actions(policy: Policy):
    with Server(policy, Door(port=0)).background() as url:
        done = subprocess.run([sys.executable, "-c", ROBOT, url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    obs = {name: np.full(shape, 0.25, np.float32) for name, shape in policy.spec.obs_shapes.items()}
    mine, state, wanted = seeded(policy, 5), None, []
    for _ in range(10):
        action, state = mine.predict(obs, state)
        wanted.append(" ".join(float(a).hex() for a in action))
    assert done.stdout.splitlines() in [[*wanted, f"none of {first}"] for first in ("torch", "gymnasium")]


def test_the_command_serves_tells_its_health_and_stops_at_sigterm():
    command = [sys.executable, "-m", "diffpolicy.cli", "serve", str(POLICY), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            first = process.stdout.readline()
            url = re.search(r"ws://\S+", first).group()
            with Client(url) as client:
                client.predict(observations(client.spec, 0, 1)[0])
                assert re.match(
                    r"1 clients   3 requests, 0 refused, 0 cut off   answer .* ms p99", line(client.health())
                )
                begin = time.monotonic()
                process.send_signal(signal.SIGTERM)
                rest, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert time.monotonic() - begin < 20
    assert rest.startswith("stopped    ") and not errors


def test_dp_evaluate_is_the_function_whoever_imported_the_module_first():
    code = (
        "import diffpolicy.evaluate, diffpolicy.rollout, sys; import diffpolicy as dp; from diffpolicy import rollout;"
        "assert callable(dp.evaluate) and rollout is dp.rollout and callable(rollout);"
        "assert dp.evaluate is sys.modules['diffpolicy.evaluate'].evaluate;"
        "assert all(getattr(dp, name) is not None for name in dp.__all__) and set(dp.__all__) <= set(dir(dp));"
        "import diffpolicy.control as c; assert all(getattr(c, name) is not None for name in c.__all__);"
        "assert set(c.__all__) == set(c._places) and set(dp.__all__) == set(dp._places)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_threads_of_one_client_wait_for_each_other(policy: Policy):
    spec = policy.spec
    history = {name: np.zeros((1, spec.n_obs_steps, *shape), np.float32) for name, shape in spec.obs_shapes.items()}
    with Server(row_by_row(policy, 0), Door(port=0)).background() as url, Client(url) as client:
        failed = []

        def many(k: int) -> None:
            noise = np.full((client.draws(), 1, spec.horizon, spec.action_dim), k, np.float32)
            failed.extend(i for i in range(30) if not (client.plan(history, noise) == k).all())

        threads = [threading.Thread(target=many, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
