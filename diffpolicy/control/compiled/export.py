"""Export: the complete policy in one file, which needs neither this library nor, as ONNX or OpenVINO, torch.

    history, noise --encode--> K steps --decode--> chunk --[To-1 : To-1+Ta]--> action (B, Ta, Da)

All noise of a plan is an input, so a file is a function. What it takes and gives stands beside it, in `NAME.json`.
Files appear under their names only after they, read back from the disk, have acted as the policy does. The kinds of
files stand in `formats`.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffpolicy.control.compiled.backends import Job
from diffpolicy.control.compiled.chain import samples_of
from diffpolicy.control.compiled.formats import FORMATS, Run
from diffpolicy.control.compiled.plan import example, share_of_range
from diffpolicy.errors import PolicyError
from diffpolicy.parts import SamplerConfig
from diffpolicy.policy import Policy
from diffpolicy.provenance import versions

VERSION = 1
LIMIT = 1e-4
CHECKS = 4  # on random histories, and as many on corners of the training ranges


@dataclass(frozen=True)
class Exported:
    """What was written: `path`, `description` beside it, largest `difference` of an action as a share of its range."""

    path: Path
    description: Path
    difference: float


def export(
    policy: Policy, path: str | Path, format: str = "onnx", batch_size: int = 1, sampler: SamplerConfig | None = None
) -> Exported:
    """Write a policy as a file that runs without this library.

    Args:
        policy: on the CPU; for `torch_export` and `aoti` on the device that they are to run on.
        path: name of the file, in the suffix of the format.
        format: a name of `FORMATS`.
        batch_size: how many histories a run takes, always.
        sampler: in place of the policy's own.

    Returns:
        Where it is, and how far its actions are from the policy's.

    Raises:
        PolicyError: if the format is unknown or cannot be written here, or if an action differs by more than 1e-4 of
            its range; then nothing is left at `path`, or what was there before.
        MissingExtraError: if the format's packages are not installed.
    """
    path = Path(path)
    if format not in FORMATS:
        raise PolicyError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    if batch_size < 1:
        raise PolicyError(f"batch_size is {batch_size}; give how many histories a run takes, at least 1")
    kind, policy = FORMATS[format], policy.with_sampler(sampler or policy.sampler_config)
    kind.check(format, policy, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    job = Job(policy, batch_size)
    with TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        draft = Path(folder) / path.name
        kind.write(job, draft)
        difference = check_parity(policy, batch_size, kind.read(draft), format)
        described = describe(job, format, path.name, difference)
        Path(f"{draft}.json").write_text(json.dumps(described, indent=1))
        for written in sorted(draft.parent.iterdir(), key=lambda written: written == draft):  # the file itself last
            os.replace(written, path.parent / written.name)
    return Exported(path, Path(f"{path}.json"), difference)


def check_parity(policy: Policy, batch_size: int, run: Run, format: str) -> float:
    """Compare with the policy, on random histories inside the training ranges and on their corners.

    Returns:
        Largest difference of an action, as a share of its range.

    Raises:
        PolicyError: if it is above `LIMIT`.
    """
    cases = [example(policy, batch_size, seed, edges) for seed in range(CHECKS) for edges in (False, True)]
    executed = policy.spec.executed
    difference = max(share_of_range(policy, run(*case), policy.plan(*case)[:, executed]) for case in cases)
    if difference > LIMIT:
        raise PolicyError(
            f"as {format!r} an action differs from the policy's by {difference:.1e} of its range, limit {LIMIT:.0e}, "
            "and nothing was written; export another format, or sample in more steps"
        )
    return difference


def describe(job: Job, format: str, name: str, difference: float) -> dict[str, Any]:
    """Return what stands beside a file: its inputs and output, the policy's sizes, how it was made and checked."""
    policy, spec, batch = job.policy, job.policy.spec, job.batch_size
    observations = {
        key: {
            "shape": [batch, spec.n_obs_steps, *shape],
            "dtype": "float32",
            "minimum": policy.normalizer[key].minimum.tolist(),
            "maximum": policy.normalizer[key].maximum.tolist(),
        }
        for key, shape in spec.obs_shapes.items()
    }
    noise = [policy.planner.draws, batch, spec.horizon, spec.action_dim]
    box = policy.normalizer["action"]
    return {
        "version": VERSION,
        "format": format,
        "file": name,
        "options": dict(FORMATS[format].options),
        "observations": observations,
        "noise": {"shape": noise, "dtype": "float32", "distribution": "standard normal", "seed": policy.seed},
        "action": {
            "shape": [batch, spec.n_action_steps, spec.action_dim],
            "dtype": "float32",
            "low": box.minimum.tolist(),
            "high": box.maximum.tolist(),
        },
        "control_period": spec.control_period,
        "n_obs_steps": spec.n_obs_steps,
        "n_action_steps": spec.n_action_steps,
        "horizon": spec.horizon,
        "sampler": {**asdict(policy.sampler_config), "evaluations": policy.planner.evaluations},
        "samples": samples_of(policy),
        "parity": {"difference": difference, "limit": LIMIT, "of": "the action's range", "cases": 2 * CHECKS},
        "versions": versions(),
    }
