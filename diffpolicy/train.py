"""Training: `fit` is a generator of (step, metrics); `train` runs it in a run folder (`runs.py`), stopped or resumed.

Logged names: `loss` and `validation/loss` (squared error of the prediction, unit scale), `grad_norm` (before
clipping), `learning_rate`, `samples_per_s`, `validation/action_error` (mean absolute error of sampled actions against
the data's, unit scale) and `validation/action_error_by_index/k` for the k-th action of the chunk; with
`--evaluate-every`, `evaluation/return`, `/length` and `/success` of episodes played meanwhile, on seeds that no report
has: to look at, the last checkpoint is the result. Those of critics, and of actors that climb them, are explained in
`learning/critics.py`. `best/` was chosen by those few episodes, so its score, in `best/evaluation.json`, is too high:
`diffpolicy evaluate RUN/best` plays it on others.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from diffpolicy import pictures, runs
from diffpolicy.data.episodes import Episodes, split
from diffpolicy.data.files import write_atomically
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.order import Order, WeightedOrder
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Batch, Windows
from diffpolicy.errors import SpecError, TrainingError
from diffpolicy.policy import Policy
from diffpolicy.provenance import fingerprint
from diffpolicy.runs import Saved

Metrics = dict[str, float]
Play = Callable[[Policy, int], Episodes]
VALIDATION_WINDOWS = 512
VALIDATION_EPISODES = 20
WATCHED = ("loss", "grad_norm")
"""Not to become anything but numbers; a gradient spoils the weights before any loss shows it."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batches and bookkeeping of a run."""

    steps: int = 20_000
    """Optimizer steps."""
    batch_size: int = 128
    """Windows a step."""
    validation_fraction: float = 0.02
    """Share of the episodes held out."""
    log_every: int = 50
    """Steps between logged metrics."""
    validate_every: int = 1000
    """Steps between validations and pictures."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    evaluate_every: int = 0
    """Steps between evaluations in the task's environment; 0 for none."""
    evaluate_episodes: int = 10
    """Episodes of each of them."""
    seed: int = 0
    """Of the split, the order of the data, weights and noise."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "validate_every", "checkpoint_every", "evaluate_episodes"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; give a whole number of at least 1")
        if self.evaluate_every < 0 or not 0 <= self.validation_fraction < 1:
            raise SpecError(
                f"got evaluate_every {self.evaluate_every} and validation_fraction {self.validation_fraction}; wanted "
                "the first at least 0, the second at least 0 and below 1"
            )

    def due(self, step: int, every: int) -> bool:
        """Whether something done every `every` steps, and at the last step, is done after `step`; 0 means never."""
        return every > 0 and (step % every == 0 or step == self.steps)


class Agent(Saved, Protocol):
    """What `fit` needs of an algorithm."""

    spec: Spec
    normalizer: Normalizer

    @property
    def model(self) -> torch.nn.Module:
        """The networks that act, as they train."""
        ...

    def update(self, batch: Batch) -> Mapping[str, torch.Tensor | float]:
        """One optimizer step on an encoded batch."""
        ...

    def windows(self, episodes: Episodes, device: torch.device, only: np.ndarray | None = None) -> Windows:
        """Return what it learns from, of the episodes numbered `only`."""
        ...

    def check(self) -> None:
        """Raise `TrainingError` if what it has learned is beyond use; before anything is logged or saved."""
        ...

    def validation_loss(self, batch: Batch, seed: int = 0) -> float:
        """Loss of the averaged weights on an encoded batch."""
        ...

    def statistics(self, batch: Batch, seed: int = 0) -> Mapping[str, float | torch.Tensor]:
        """Whatever else describes it on an encoded batch, by name: a number, or many of which a histogram is drawn."""
        ...

    def hindsight(self, played: Episodes, data: Episodes, every: int) -> dict[str, float]:
        """Whatever the returns of episodes say about its values, by name; looks at each `every`-th step."""
        ...


def resolve_device(name: str) -> torch.device:
    """Return the device named, the first CUDA device for `auto` where there is one.

    Raises:
        SpecError: if there is no such device here.
    """
    there = torch.cuda.device_count()
    try:
        device = torch.device(("cuda" if there else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise SpecError(f"there is no device {name!r}; wanted cpu, cuda, cuda:1 and so on, or auto") from error
    if device.type == "cuda" and (device.index or 0) >= there:
        raise SpecError(f"the device is {name!r}, and PyTorch finds {there} GPUs here; take cpu, or another of them")
    return device


def fit(agent: Agent, windows: Windows, config: TrainConfig, run: Path | None = None) -> Iterator[tuple[int, Metrics]]:
    """Train from `agent.step` to `config.steps`; yield metrics where anything of `config` is due, and at the last.

    Raises:
        TrainingError: if the loss is not a number, the batch is then saved in `run`; or if the agent's own `check`,
            before metrics are yielded, fails.
    """
    if windows.weight is None:
        order = Order(len(windows), config.batch_size, config.seed)
    else:
        order = WeightedOrder(windows, config.batch_size, config.seed)
    last, clock = agent.step, time.perf_counter()
    intervals = config.log_every, config.validate_every, config.checkpoint_every, config.evaluate_every

    def batch_of(step: int) -> Batch:
        return agent.normalizer.encode(windows.gather(order(step)).to(agent.device))

    waits, watch = agent.device.type != "cpu", _Watch(agent.device)
    while agent.step < config.steps:
        step = agent.step
        metrics = agent.update(batch_of(step))
        log = any(config.due(agent.step, every) for every in intervals)
        if waits:  # whoever reads a number waits for the GPU: it keeps the first bad step until something is logged
            watch.note(metrics, step)
            bad = watch.first_bad() if log else None
        else:
            bad = None if all(math.isfinite(metrics[name]) for name in WATCHED) else step
        if bad is not None:
            raise TrainingError(_report_nan(batch_of(bad), bad + 1, run))
        if log:
            agent.check()
            seconds = time.perf_counter() - clock
            values = {name: float(value) for name, value in metrics.items()}
            values["samples_per_s"] = (agent.step - last) * config.batch_size / seconds
            yield agent.step, values
            last, clock = agent.step, time.perf_counter()


class _Watch:
    """The first step whose loss or gradient was not a number, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.first = torch.full((), -1, device=device)

    def note(self, metrics: Mapping[str, torch.Tensor | float], step: int) -> None:
        """Take in one step's metrics without waiting for them."""
        seen = torch.stack([torch.as_tensor(metrics[name], device=self.first.device) for name in WATCHED])
        self.first = torch.where((self.first < 0) & ~seen.isfinite().all(), step, self.first)

    def first_bad(self) -> int | None:
        """Wait for the device; return the step, None where all were sound."""
        step = int(self.first)
        return None if step < 0 else step


def _report_nan(batch: Batch, step: int, run: Path | None) -> str:
    message = f"the loss or its gradient became not a number at step {step}"
    if run is not None:
        arrays: dict[str, Any] = {f"obs.{k}": v for k, v in batch.obs.items()} | {
            "action": batch.action,
            "valid": batch.valid,
        }
        np.savez(run / "nan_batch.npz", **{k: v.cpu().numpy() for k, v in arrays.items()})
        message += f"; its batch is in {run / 'nan_batch.npz'}"
    return message + "; lower the learning rate or look at that batch; the last checkpoint is unharmed"


def residence(episodes: Episodes, device: torch.device) -> torch.device:
    """Where the windows live: on the GPU if they take at most half of what is free there, else on the host."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if sum(array.nbytes for array in episodes.arrays().values()) <= free // 2 else torch.device("cpu")


@torch.no_grad()
def validate(agent: Agent, windows: Windows) -> tuple[Metrics, dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Numbers on fixed windows with fixed noise, and distributions; also sampled and true chunks `(B, Tp, Da)`."""
    n = min(len(windows), VALIDATION_WINDOWS)
    index = torch.linspace(0, len(windows) - 1, n).round().long()
    batch = windows.gather(index).to(agent.device)
    encoded = agent.normalizer.encode(batch)
    policy = agent.policy()
    noise = policy.draw(n, torch.Generator().manual_seed(0))
    chunk = policy.plan(batch.obs, noise.to(agent.device))
    error = (policy.normalizer["action"].encode(chunk) - encoded.action).abs().mean(-1) * batch.valid
    by_index = error.sum(0) / batch.valid.sum(0).clamp(min=1)
    metrics = {
        "validation/loss": agent.validation_loss(encoded),
        "validation/action_error": float(error.sum() / batch.valid.sum()),
        **{f"validation/action_error_by_index/{k:02d}": float(e) for k, e in enumerate(by_index)},
    }
    distributions = {}
    for name, value in agent.statistics(encoded).items():
        if isinstance(value, torch.Tensor):
            distributions[f"validation/{name}"] = value.cpu().numpy()
        else:
            metrics[f"validation/{name}"] = value
    return metrics, distributions, (chunk.cpu().numpy(), batch.action.cpu().numpy())


def evaluate_meanwhile(agent: Agent, played: Episodes, data: Episodes) -> Metrics:
    """Numbers of episodes that the agent's policy played while it trains."""
    found = {"return": float(played.returns.mean()), "length": float(np.mean(played.length))}
    success = next((played.info[name] for name in ("success", "is_success") if name in played.info), None)
    if success is not None:
        found["success"] = float((np.maximum.reduceat(success, played.start) > 0).mean())
    found |= agent.hindsight(played, data, agent.spec.n_action_steps)
    return {f"evaluation/{name}": value for name, value in found.items()}


def train(
    agent: Agent,
    episodes: Episodes,
    config: TrainConfig,
    run: Path,
    description: Mapping[str, Any],
    play: Play | None = None,
) -> Iterator[tuple[int, Metrics]]:
    """Train in a run folder; continues from its checkpoint if there is one. Yields what `fit` yields.

    A run that has all its steps is left as it is. What else is not as it was when a run goes on, a learning rate for
    example, is kept in `config.json` under `resumed`: the step, and the description until then.

    Args:
        agent: made for `episodes`.
        episodes: physical units.
        config: length and bookkeeping.
        run: the run folder, made if absent.
        description: what goes into `config.json`, JSON values.
        play: `(policy, number of episodes) -> Episodes`, for `evaluate_every`; None where there is no environment.

    Raises:
        DatasetError: if the run began with other data.
        PolicyError: if its checkpoint is damaged or of another configuration.
        TrainingError: see `fit`; or if the disk is full or cannot be written.
    """
    description = {"dataset_fingerprint": fingerprint(episodes), **description}
    kept, held_out = split(episodes, config.validation_fraction, config.seed)
    device = residence(episodes, agent.device)
    windows = agent.windows(episodes, device, kept)
    held_out = held_out if len(held_out) else kept[:1]
    on_host = torch.device("cpu")  # windows hold all arrays: a second copy would leave no room
    validation, recorded = agent.windows(episodes, on_host, held_out), episodes.select(held_out[:VALIDATION_EPISODES])
    run.mkdir(parents=True, exist_ok=True)
    if runs.is_begun(run):
        description = runs.resumed(agent, run, description)
        if agent.step >= config.steps:
            return
    write_atomically(run / "config.json", lambda path: path.write_text(json.dumps(description, indent=1)))
    runs.forget_after(run, agent.step)
    with SummaryWriter(str(run), purge_step=agent.step) as board, (run / "metrics.jsonl").open("a") as log:
        for step, metrics in fit(agent, windows, config, run):
            if config.due(step, config.validate_every):
                with torch.compiler.set_stance("force_eager"):  # a look now and then is not worth compiling for
                    found, distributions, (sampled, true) = validate(agent, validation)
                    before = agent.hindsight(recorded, episodes, 1)
                metrics |= found | {f"validation/{name}": value for name, value in before.items()}
                for name, values in distributions.items():
                    board.add_histogram(name, values, step)
                board.add_figure("validation/chunks", pictures.chunks(sampled, true), step)
            if play and config.due(step, config.evaluate_every):
                with torch.compiler.set_stance("force_eager"):
                    played = play(agent.policy(), config.evaluate_episodes)
                    evaluation = evaluate_meanwhile(agent, played, episodes)
                runs.keep_best(agent, run, step, evaluation)
                metrics |= evaluation
            for name, value in metrics.items():
                board.add_scalar(name, value, step)
            log.write(json.dumps({"step": step, **metrics}) + "\n")
            log.flush()
            if config.due(step, config.checkpoint_every):
                runs.checkpoint(agent, run)
            yield step, metrics
