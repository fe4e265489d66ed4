"""A server among strangers: 10,000 hostile messages, none crashes it, and who is honest gets the very actions."""

import ast
import base64
import itertools
import logging
import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

import msgpack
import numpy as np
import pytest
import torch

import diffpolicy
from diffpolicy.control import Client, Door, Server
from diffpolicy.control.serving import wire
from diffpolicy.errors import ControlError
from diffpolicy.policy import Policy

POLICY = Path(__file__).parents[1] / "fixtures" / "policy_format_3"
TOKEN = "correct horse battery"
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


# --- what they send ---


def shaped(dtype: object = "float32", shape: object = (1, 3), data: object = b"\0" * 12) -> dict:
    return {"dtype": dtype, "shape": shape, "data": data}


GOOD = {"pose": shaped(), "goal": shaped(shape=[1, 2], data=b"\0" * 8)}
NOISE = shaped(shape=[1, 1, 8, 2], data=b"\0" * 64)
BAD_ARRAYS = [
    None, 3, "text", [], [1.0, 2.0, 3.0], {}, b"raw",
    shaped(shape=[3]), shaped(shape=[2, 3]), shaped(shape=[1, 3, 1]), shaped(shape=[]), shaped(shape=[0, 3], data=b""),
    shaped(shape=[-1, 3]), shaped(shape=[-1, -3]), shaped(shape=[1.0, 3]), shaped(shape=[True, 3]), shaped(shape="13"),
    shaped(shape=[2**31 - 1, 3]), shaped(shape=[2**31 - 1] * 60), shaped(shape=[2**63, 3]), shaped(shape=[10**6, 3]),
    shaped(data=b""), shaped(data=b"\0" * 11), shaped(data=b"\0" * 13), shaped(data="text"), shaped(data=[0] * 12),
    shaped("float64", data=b"\0" * 24), shaped("object", data=b"\0" * 24), shaped("O"), shaped(">f4"), shaped("V12"),
    shaped(["f4"]), shaped({"a": 1}), shaped("<U3"), shaped("datetime64[ns]"),
    shaped(data=struct.pack("<3f", 0, float("nan"), 0)), shaped(data=struct.pack("<3f", 0, 0, float("inf"))),
]  # fmt: skip


def bad_requests() -> list[bytes]:
    """Messages that can be read and must be refused, each in one sentence."""
    predict = {"kind": "predict", "obs": GOOD, "fresh": True}
    plan = {"kind": "plan", "noise": NOISE, "history": {k: None for k in GOOD}}
    prefix = {"chunk": NOISE, "weights": NOISE, "guide": "real_time", "options": {}, "repeats": 1}
    bad = [{**predict, "obs": {**GOOD, "pose": array}} for array in BAD_ARRAYS]
    bad += [{**predict, "start": array} for array in BAD_ARRAYS[1:]]
    bad += [{**predict, "obs": obs} for obs in (None, 1, [], {}, {"pose": shaped()}, {**GOOD, "more": shaped()})]
    bad += [{**plan, "noise": array} for array in BAD_ARRAYS] + [plan]
    bad += [{**plan, "prefix": {**prefix, "guide": guide}} for guide in (None, "__class__", "exec", 3, [])]
    bad += [{**plan, "prefix": {**prefix, "repeats": repeats}} for repeats in (0, -1, 10**9, "1", None, True, 1.5)]
    bad += [{"kind": "draws", "repeats": repeats} for repeats in (0, 10**12, None, "many")]
    bad += [{"kind": "hello", "protocol": wire.PROTOCOL, "seed": seed} for seed in (-1, "x", 1.5, True, [1])]
    bad += [{"kind": kind} for kind in ("", "__init__", "answer", "shutdown", "x" * 5000)]
    bad += [{}, {"kind": None}, {"kind": ["predict"]}, {"kind": {"a": 1}}]
    packed = [msgpack.packb(message) for message in bad]
    packed += [
        msgpack.packb(value) for value in (None, 1, [], [predict], "predict", b"", 1.5, msgpack.ExtType(5, b"a"))
    ]
    packed += [msgpack.packb(predict)[:-1], msgpack.packb(predict) + b"\0", b"", b"\xc1", msgpack.packb({1: 2})]
    return packed


def bombs() -> list[bytes]:
    """Short messages that claim to be long, or deep: who believes them allocates gigabytes."""
    huge = [b"\xdd\x7f\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
    deep = [b"\x91" * 60_000, b"\x81\xa1a" * 20_000, b"\xdd\x00\x00\xea\x60" * 10_000, b"\xdc\xff\xff" * 20_000]
    return huge + deep + [b"\x82\xa4kind\xa7predict\xa3obs" + head for head in huge + deep]


def random_bytes(rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(0, 400)))


def damaged(rng: np.random.Generator, good: bytes) -> bytes:
    """A good message with some bytes changed: now and then it is still good."""
    data = np.frombuffer(good, np.uint8).copy()
    data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3, dtype=np.uint8)
    return data.tobytes()


def everything(count: int, seed: int) -> Iterator[bytes]:
    rng, good = np.random.default_rng(seed), msgpack.packb({"kind": "predict", "obs": GOOD, "fresh": True})
    listed = itertools.cycle([*bad_requests(), *bombs(), pickle.dumps({"kind": "health"})])
    for k in range(count):
        yield (next(listed), random_bytes(rng), damaged(rng, good), next(listed))[k % 4]


# --- how they send it ---


def opened(url: str, headers: str = f"Authorization: Bearer {TOKEN}\r\n", receive: int | None = None) -> socket.socket:
    """A connection after the handshake, without a client around it."""
    place, raw = urlparse(url), socket.socket()
    if receive is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    raw.settimeout(20)
    raw.connect((place.hostname, place.port))
    key = base64.b64encode(os.urandom(16)).decode()
    raw.sendall(
        f"GET / HTTP/1.1\r\nHost: {place.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n".encode()
    )
    answer = b""
    while b"\r\n\r\n" not in answer and (more := raw.recv(1)):
        answer += more
    assert answer.startswith(b"HTTP/1.1 101"), answer
    return raw


def frame(data: bytes, opcode: int = 2, length: int | None = None) -> bytes:
    """A masked frame, by a mask of zeros; `length` is what it claims."""
    length = len(data) if length is None else length
    head = bytes([0x80 | opcode])
    if length < 126:
        head += bytes([0x80 | length])
    else:
        head += b"\xfe" + struct.pack(">H", length) if length < 2**16 else b"\xff" + struct.pack(">Q", length)
    return head + b"\0\0\0\0" + data


def send_messages(url: str, count: int, seed: int, tell: Callable[[str], None]) -> None:
    """Each is answered, most by one sentence."""
    from websockets.sync.client import connect

    with connect(url, additional_headers={"Authorization": f"Bearer {TOKEN}"}, compression=None, proxy=None) as hostile:
        for data in everything(count, seed):
            hostile.send(data)
            answer = msgpack.unpackb(hostile.recv(timeout=20))
            assert answer["kind"] in ("error", "action"), answer
            assert answer["kind"] == "action" or "\n" not in answer["message"]
            tell(answer["kind"])


def knock_without_token(url: str, count: int, tell: Callable[[str], None]) -> None:
    place, rng = urlparse(url), np.random.default_rng(0)
    heads = ["", "Authorization: Bearer wrong\r\n", "Authorization: \xff\xfe\r\n", "Authorization: Basic YTpi\r\n"]
    for k in range(count):
        if k % 2:
            with pytest.raises(AssertionError, match="401"):
                opened(url, heads[k // 2 % len(heads)])
        else:
            with socket.create_connection((place.hostname, place.port), timeout=5) as raw, suppress(OSError):
                raw.sendall(random_bytes(rng) or b"GET")
        tell("knock")


def break_off(url: str, count: int, tell: Callable[[str], None]) -> None:
    """Sockets closed half, or in the middle of a frame; frames that claim 2^63 bytes; bad opcodes; texts."""
    request = frame(msgpack.packb({"kind": "predict", "obs": GOOD, "fresh": True}))
    ends = [
        request[:-5], frame(b"", length=2**63 - 1), frame(b"x" * 10, length=2**31), frame(b"text", opcode=1),
        frame(b"", opcode=3), frame(b"", opcode=0), frame(b"\x03", opcode=8), b"\xff" * 50, request,
        frame(b"x" * 130, 9),
    ]  # fmt: skip
    for k in range(count):
        raw = opened(url)
        with suppress(OSError):
            raw.sendall(ends[k % len(ends)])
            if k % 3 == 0:
                raw.shutdown(socket.SHUT_WR)
                raw.recv(100)
        raw.close()
        tell("break")


HELLO = frame(msgpack.packb({"kind": "hello", "protocol": wire.PROTOCOL}))
PING = frame(b"x" * 125, opcode=9)


def never_read(url: str, stop: threading.Event, sent: bytes = HELLO) -> None:
    """Sends and sends; what it is answered stays where it is."""
    raw = opened(url, receive=4096)
    with suppress(OSError):
        while not stop.is_set():
            raw.sendall(sent * 50)
    raw.close()


# --- and what becomes of it ---


def plan(history, noise: torch.Tensor, prefix: object) -> torch.Tensor:
    """Rows that do not round differently in other company."""
    return noise[0] + history["pose"][:, :1, :2] - history["goal"][:, 1:]


def honest(url: str, policy: Policy, seed: int, stop: threading.Event, done: list[int]) -> None:
    """Act until told to stop, in steps of a robot; every action has to be the policy's own."""
    mine = policy.with_plan(plan)
    mine.seed, rng, state, own, acted = seed, np.random.default_rng(seed), None, None, 0
    with Client(url, TOKEN, seed) as client:
        while not stop.is_set():
            obs = {name: rng.uniform(-1, 1, shape).astype(np.float32) for name, shape in client.spec.obs_shapes.items()}
            said, state = client.predict(obs, state)
            wanted, own = mine.predict(obs, own)
            np.testing.assert_array_equal(said, wanted)
            acted += 1
            time.sleep(0.002)
    done.append(acted)


def memory_mb() -> float:
    """Of this process, where the system says so."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def test_10_000_hostile_messages_disturb_no_honest_client(caplog: pytest.LogCaptureFixture):
    policy, stop, done, told, failed = Policy.load(POLICY), threading.Event(), [], [], []
    door = Door(port=0, token=TOKEN, open_seconds=1.0, send_seconds=0.5)
    server, tell = Server(policy.with_plan(plan), door), told.append

    def run(job: Callable[..., None], *arguments: object) -> threading.Thread:
        def work() -> None:
            try:
                job(*arguments)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    with caplog.at_level(logging.WARNING), server.background() as url:
        good = [run(honest, url, policy, seed, stop, done) for seed in range(4)]
        before, threads = memory_mb(), []
        threads += [run(send_messages, url, 2400, seed, tell) for seed in range(4)]
        threads += [run(knock_without_token, url, 400, tell), run(break_off, url, 200, tell)]
        deaf = [run(never_read, url, stop) for _ in range(3)]
        for thread in threads + deaf:
            thread.join()
        grown = memory_mb() - before
        stop.set()
        for thread in good:
            thread.join()
        with Client(url, TOKEN) as last:
            figures = last.health()
    assert not failed, failed[:3]
    assert len(told) >= 10_000
    assert told.count("error") > 6_500 and told.count("knock") == 400 and told.count("break") == 200
    assert len(done) == 4 and min(done) > 50
    assert figures["clients"] == 1  # all others are gone
    assert figures["cut_off"] >= 3 and figures["turned_away"] >= 200
    assert grown < 100  # MB; the bombs claim gigabytes
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


@pytest.mark.parametrize("sent", [HELLO, PING], ids=["requests", "pings"])
def test_a_client_that_never_reads_is_cut_off_and_costs_no_memory(sent: bytes):
    """A ping is answered without a request, and nobody waits until its answer is read."""
    policy, stop = Policy.load(POLICY), threading.Event()
    server = Server(policy.with_plan(plan), Door(port=0, token=TOKEN, send_seconds=0.3))
    with server.background() as url:
        before, giving_up = memory_mb(), threading.Timer(5, stop.set)
        giving_up.start()
        never_read(url, stop, sent)  # returns because its connection is reset
        assert not stop.is_set()
        giving_up.cancel()
        assert memory_mb() - before < 20
        assert server.figures["cut_off"] == 1
        deadline = time.monotonic() + 5
        while server.figures["clients"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.figures["clients"] == 0
        deaf = threading.Thread(target=never_read, args=(url, stop, sent))
        deaf.start()
        time.sleep(0.1)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5  # nor does it hold up the end
    stop.set()
    deaf.join()


def test_each_bad_request_and_each_bomb_is_refused_and_the_connection_lives_on():
    server, before = Server(Policy.load(POLICY).with_plan(plan), Door(port=0)), memory_mb()
    with server.background() as url, Client(url) as client:
        for data in bad_requests() + bombs():
            client._connection.send(data)
            answer = wire.unpack(client._connection.recv(timeout=5))
            assert answer["kind"] == "error", data[:80]
        assert client.health()["refused"] == len(bad_requests() + bombs())
    assert memory_mb() - before < 50


def test_a_pickle_is_refused_and_not_executed(bomb):
    server = Server(Policy.load(POLICY).with_plan(plan), Door(port=0))
    with server.background() as url, Client(url) as client:
        for data in (pickle.dumps(bomb), pickle.dumps(bomb, protocol=0)):
            client._connection.send(data)
            assert wire.unpack(client._connection.recv(timeout=5))["kind"] == "error"
        inside = {"kind": "predict", "obs": {"pose": pickle.dumps(bomb), "goal": shaped(data=pickle.dumps(bomb))}}
        with pytest.raises(ControlError, match="is no array"):
            client.ask(**inside)
    assert not bomb.mark.exists()


def test_nothing_in_the_package_unpickles_or_evaluates():
    found = []
    for path in Path(diffpolicy.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [where for name in names if name.split(".")[0] in UNPICKLING]
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                evaluates = isinstance(node.func, ast.Name) and called in ("eval", "exec", "compile", "__import__")
                allows = any(k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in node.keywords)
                unsafe = (
                    called == "load" and getattr(node.func, "value", None) and ast.unparse(node.func) == "torch.load"
                )
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
                found += [where] if evaluates or allows or (unsafe and not safe) else []
    assert not found
