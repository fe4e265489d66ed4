"""`diffpolicy serve`: a trained policy behind a WebSocket, for many clients; or the figures of a running server."""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from diffpolicy.cli.evaluate import load_policy
from diffpolicy.control.compiled.plan import compile_plan
from diffpolicy.control.serving.client import Client
from diffpolicy.control.serving.server import Door, Server
from diffpolicy.errors import PolicyError

TOKEN = "DIFFPOLICY_TOKEN"


@dataclass(frozen=True)
class ServeArgs:
    """Serve a policy's actions until Ctrl-C. The token is read from the environment variable DIFFPOLICY_TOKEN."""

    run: tyro.conf.Positional[Path | None] = None
    """Run folder, or any folder with a saved policy."""
    host: str = "127.0.0.1"
    """Address to listen at; others than this machine's own need a token."""
    port: int = 8700
    """Port; 0 for any that is free."""
    max_clients: int = 256
    """Connected at once."""
    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpm++2m"] | None = None
    """Instead of the policy's own."""
    steps: int | None = None
    """Sampler steps, instead of the policy's own."""
    compile: int | None = None
    """Compile the plan, for this many clients at once."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    health: str | None = None
    """Print the figures of the server at this url instead, for example ws://127.0.0.1:8700."""


def serve(argv: Sequence[str]) -> None:
    """Run `diffpolicy serve`."""
    args = tyro.cli(ServeArgs, args=argv, prog="diffpolicy serve")
    token = os.environ.get(TOKEN)
    if args.health is not None:
        with Client(args.health, token) as client:
            print(line(client.health()))
        return
    if args.run is None:
        raise PolicyError("there is no policy to serve; give the folder of a run, or --health with a server's url")
    door = Door(args.host, args.port, token, args.max_clients)
    policy = load_policy(args.run, args.device, args.sampler, args.steps)
    if args.compile is not None:
        policy = policy.with_plan(compile_plan(policy, args.compile))
    server = Server(policy, door)
    asyncio.run(until_stopped(server, str(args.run)))
    print(f"stopped    {line(server.figures)}")


async def until_stopped(server: Server, name: str) -> None:
    """Serve until SIGINT or SIGTERM."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        if sys.platform == "win32":  # its event loop takes no signals
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
        else:
            loop.add_signal_handler(number, stop.set)
    await server.run(stop, lambda url: print(f"serving    {name} at {url}   (Ctrl-C stops)", flush=True))


def line(figures: dict[str, Any]) -> str:
    """Return a server's figures as one line."""

    def ms(name: str) -> str:
        p50, p99 = figures[name]["p50"], figures[name]["p99"]
        return "none yet" if p50 is None else f"{p50:.1f} ms p50 {p99:.1f} ms p99"

    refused, batch = figures["refused"] + figures["turned_away"], figures["batch"]
    return "   ".join(
        [
            f"{figures['clients']} clients",
            f"{figures['requests']} requests, {refused} refused, {figures['cut_off']} cut off",
            f"answer {ms('request_ms')}",
            f"{figures['plans']} plans {ms('plan_ms')}",
            "batch none yet" if batch["mean"] is None else f"batch {batch['mean']:.1f} mean {batch['max']:g} largest",
            f"{figures['uptime_s']:g} s",
        ]
    )
