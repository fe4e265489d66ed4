"""A run folder: what a training writes, how it is continued, and what is kept of it.

runs/maze/
config.json                      all that made it: arguments, dataset fingerprint, versions, seed
policy.json policy.safetensors   the deployable policy: averaged weights, normalizer, sizes, sampler
checkpoint/state.pt              all that resuming needs, written atomically
metrics.jsonl, events.*          what was logged, the latter for TensorBoard
best/                            with `--evaluate-every`: the policy that played best so far, and its score
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from diffpolicy.data.files import write_atomically
from diffpolicy.errors import PolicyError, TrainingError
from diffpolicy.policy import Policy
from diffpolicy.provenance import check_same_dataset


class Saved(Protocol):
    """What of an agent is kept."""

    step: int
    device: torch.device

    def policy(self) -> Policy:
        """Return the policy as it stands."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that continuing needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        ...


def checkpoint(agent: Saved, run: Path) -> None:
    """Write the state for resuming, then the deployable policy; on failure the former ones stay.

    Raises:
        TrainingError: if the disk is full or cannot be written.
    """
    with _writing(run):
        (run / "checkpoint").mkdir(exist_ok=True)
        write_atomically(run / "checkpoint" / "state.pt", lambda path: torch.save(agent.state_dict(), path))
        agent.policy().save(run)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"the checkpoint in {folder} could not be written ({error}); the former one is unharmed: free some space "
            "and resume"
        ) from error


def is_begun(run: Path) -> bool:
    """Return whether a folder holds a run that can be continued."""
    return (run / "checkpoint" / "state.pt").exists()


def resumed(agent: Saved, run: Path, description: dict[str, Any]) -> dict[str, Any]:
    """Continue `agent` from the run's checkpoint; return what the run's description is from there on.

    Raises:
        DatasetError: if the run began with other data.
        PolicyError: if the checkpoint is damaged or of another configuration.
    """
    try:
        before = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"{run} cannot be resumed: its config.json cannot be read ({error}); start in a new folder"
        ) from error
    data = description["dataset_fingerprint"]
    check_same_dataset(before.get("dataset_fingerprint", data), data)
    restore(agent, run)
    history = before.pop("resumed", [])
    if before != json.loads(json.dumps(description)):
        history = [*history, {"step": agent.step, "before": before}]
    return {**description, "resumed": history} if history else description


def restore(agent: Saved, run: Path) -> None:
    """Continue `agent` from the run's checkpoint; only plain tensors and numbers are read.

    Raises:
        PolicyError: if the checkpoint is damaged or of another configuration.
    """
    path = run / "checkpoint" / "state.pt"
    try:
        agent.load_state_dict(torch.load(path, map_location=agent.device, weights_only=True))
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        first = str(error).splitlines()[0] if str(error) else repr(error)
        raise PolicyError(
            f"{path} cannot be resumed ({first}); use the same arguments and kind of device, or start in a new folder"
        ) from error


def forget_after(run: Path, step: int) -> None:
    """Drop logged lines beyond the checkpoint, and one that a crash cut short; also a best policy from there."""
    best, path = run / "best", run / "metrics.jsonl"
    if (best / "evaluation.json").exists() and json.loads((best / "evaluation.json").read_text())["step"] > step:
        shutil.rmtree(best)
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    write_atomically(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))


def keep_best(agent: Saved, run: Path, step: int, evaluation: Mapping[str, float]) -> None:
    """Save the policy in `run/best`, unless one before it had more successes, or as many and as high a return.

    Raises:
        TrainingError: if the disk is full or cannot be written.
    """

    def rank(found: Mapping[str, float]) -> tuple[float, float]:
        return found.get("evaluation/success", 0.0), found["evaluation/return"]

    best, record = run / "best", run / "best" / "evaluation.json"
    if not record.exists() or rank(evaluation) > rank(json.loads(record.read_text())):
        with _writing(best):
            agent.policy().save(best)
            write_atomically(best / "config.json", lambda path: path.write_text((run / "config.json").read_text()))
            write_atomically(record, lambda path: path.write_text(json.dumps({"step": step, **evaluation}, indent=1)))
