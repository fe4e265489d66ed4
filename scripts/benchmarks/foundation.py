"""Benchmarks of the foundation: gathering windows, a forward pass, a training step, each beside the naive way.

    python scripts/benchmarks/foundation.py [--device cuda] [--quick]

Ours and the peer alternate in one process; a figure is the median. Results go to scripts/benchmarks/results/.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from measuring import medians, where
from plain import ItemDataset, PlainTrainer, PlainUNet
from torch.utils.data import DataLoader

from diffpolicy.agents.bc import Bc, BcConfig
from diffpolicy.data.episodes import Episode, Episodes, from_list
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows
from diffpolicy.nets.unet1d import UNet1d
from diffpolicy.parts import DenoiserConfig

RESULTS = Path(__file__).parent / "results"
CANONICAL = (256, 512, 1024)
FIVE_MILLION = (64, 128, 256)


def result(name: str, unit: str, ours: float, peer: float, ratio: float, samples: int, device: torch.device) -> dict:
    """Return one row; `ratio` above 1 means that ours is better."""
    row = {
        "name": f"{device.type}-{name}",
        "ours": ours,
        "peer": peer,
        "ratio": ratio,
        "unit": unit,
        "samples": samples,
        **where(device),
    }
    print(f"{name:<28} ours {ours:10.4g} {unit:<10} peer {peer:10.4g}   ratio {ratio:.2f}")
    return row


def random_episodes(steps: int, length: int, obs_dim: int) -> Episodes:
    """Episodes of random numbers."""
    rng = np.random.default_rng(0)
    one = [
        Episode({"obs": rng.normal(size=(length + 1, obs_dim)).astype(np.float32)},
                rng.uniform(-1, 1, size=(length, 2)).astype(np.float32), np.zeros(length, np.float32), False, True)
        for _ in range(steps // length)
    ]  # fmt: skip
    return from_list(one)


def bench_gather(samples: int, device: torch.device) -> dict:
    """Batches of 256 windows from 10^6 steps."""
    episodes = random_episodes(1_000_000, 200, 20)
    spec = Spec.from_episodes(episodes, 16, 2, 8)
    windows = Windows(episodes, spec, device=device)
    items = ItemDataset(
        [{"obs": e.obs["obs"], "action": e.action} for e in (episodes[i] for i in range(len(episodes)))], 16, 2, 8
    )
    loader = itertools.cycle(iter(DataLoader(items, batch_size=256, shuffle=True)))
    generator = torch.Generator().manual_seed(0)

    def ours() -> None:
        windows.gather(torch.randint(len(windows), (256,), generator=generator))

    seconds = medians((ours, lambda: next(loader)), samples, device)
    return result(
        "gather-256-of-1e6",
        "batches/s",
        1 / seconds[0],
        1 / seconds[1],
        seconds[1] / seconds[0],
        samples,
        device,
    )


def bench_forward(batch: int, samples: int, device: torch.device) -> dict:
    """Forward pass of the canonical network."""
    ours, peer = UNet1d(2, 40, CANONICAL).to(device).eval(), PlainUNet(2, 40, CANONICAL).to(device).eval()
    x, cond = torch.randn(batch, 16, 2, device=device), torch.randn(batch, 40, device=device)
    t = torch.full((batch,), 0.5, device=device)
    with torch.inference_mode():
        seconds = medians((lambda: ours(x, t, cond), lambda: peer(x, 100 * t - 1, cond)), samples, device)
    return result(
        f"forward-b{batch}-canonical",
        "ms",
        1e3 * seconds[0],
        1e3 * seconds[1],
        seconds[1] / seconds[0],
        samples,
        device,
    )


def bench_train(
    name: str, dims: tuple[int, int, int], batch: int, samples: int, device: torch.device, compiled: bool = True
) -> dict:
    """Whole training steps: batch, loss, gradient, optimizer, average of the weights; ours with `--compile` or not."""
    episodes = random_episodes(20_000, 200, 20)
    spec = Spec.from_episodes(episodes, 16, 2, 8)
    config = BcConfig(DenoiserConfig(down_dims=dims), compile=compiled, bf16=False)  # as the peer
    agent = Bc(spec, Normalizer.fit(episodes), config, 10_000, device)
    windows = Windows(episodes, spec, device=device)
    generator = torch.Generator().manual_seed(0)
    items = ItemDataset(
        [{"obs": e.obs["obs"], "action": e.action} for e in (episodes[i] for i in range(len(episodes)))], 16, 2, 8
    )
    loader = itertools.cycle(iter(DataLoader(items, batch_size=batch, shuffle=True, drop_last=True)))
    trainer = PlainTrainer(PlainUNet(2, 40, dims), device)

    def ours() -> None:
        agent.update(
            agent.normalizer.encode(windows.gather(torch.randint(len(windows), (batch,), generator=generator)))
        )

    def peer() -> None:
        item = {k: v.to(device) for k, v in next(loader).items()}
        trainer.update(item["action"], item["obs"].flatten(1), item["valid"])

    seconds = medians((ours, peer), samples, device)
    return result(
        name,
        "samples/s",
        batch / seconds[0],
        batch / seconds[1],
        seconds[1] / seconds[0],
        samples,
        device,
    )


def main() -> None:
    """Run all, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few samples, to see that it runs; nothing is written")
    args = parser.parse_args()
    device, few = torch.device(args.device), args.quick
    torch.manual_seed(0)
    rows = [
        bench_gather(3 if few else 200, device),
        bench_forward(1, 2 if few else 30, device),
        bench_forward(64, 1 if few else 10, device),
        bench_train("train-b256-canonical", CANONICAL, 16 if few else 256, 1 if few else 5, device),
        bench_train("train-5m", FIVE_MILLION, 128, 1 if few else 40, device),
        bench_train("train-5m-not-compiled", FIVE_MILLION, 128, 1 if few else 40, device, compiled=False),
    ]
    if not few:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"foundation-{device.type}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
