"""Compiled plans: `plan(history, noise)` of a policy, the same function, in a control period.

    policy = policy.with_plan(compile_plan(policy, batch_size=1))      # predict, rollout and evaluate now use it

`auto` builds every backend that is present, compares its actions with the policy's own from the same noise, measures
it, and keeps the fastest of those within the limit. What it found stands in `CompiledPlan.measured`.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from diffpolicy.control.compiled.backends import BACKENDS, Job, usable_on
from diffpolicy.control.compiled.chain import Bodies
from diffpolicy.control.compiled.timing import median_ms
from diffpolicy.diffusion.prefix import Prefix
from diffpolicy.errors import DiffPolicyError, PolicyError
from diffpolicy.parts import SamplerConfig
from diffpolicy.policy import Policy
from diffpolicy.precision import full_precision

CHECKS = 4


@dataclass(frozen=True)
class Measured:
    """What a backend did here: `p50_ms` of a plan, largest `difference` of an action as a share of its range.

    `left_out` says in one sentence why it was not taken; empty if it could have been.
    """

    backend: str
    p50_ms: float | None = None
    difference: float | None = None
    left_out: str = ""

    def __str__(self) -> str:
        """Return one line."""
        numbers = "" if self.p50_ms is None else f"{self.p50_ms:9.2f} ms   difference {self.difference:.1e}   "
        return f"{self.backend:<18}{numbers}{self.left_out}".rstrip()


class CompiledPlan:
    """`plan(history, noise)` for histories of any batch, computed `batch_size` at a time; one call at a time.

    The last piece is filled up with copies of its last row.
    """

    def __init__(self, job: Job, backend: str, bodies: Bodies) -> None:
        self.backend = backend
        self.batch_size = job.batch_size
        self.measured: tuple[Measured, ...] = ()
        self._policy, self._bodies = job.policy.with_sampler(job.policy.sampler_config), bodies
        with torch.inference_mode(), full_precision(job.policy.device):
            self._chain = BACKENDS[backend].chain(job, bodies)

    def with_sampler(self, config: SamplerConfig) -> "CompiledPlan":
        """Return a plan by another sampler around the same compiled bodies, which takes no time."""
        return CompiledPlan(Job(self._policy.with_sampler(config), self.batch_size), self.backend, self._bodies)

    @torch.inference_mode()
    def __call__(
        self, history: Mapping[str, torch.Tensor], noise: torch.Tensor, prefix: Prefix | None = None
    ) -> torch.Tensor:
        """Sample chunks of actions; arguments and result as `Policy.plan`.

        Raises:
            PolicyError: if a shape or the device is not the policy's.
        """
        draws = self._policy.planner.draws if prefix is None else self._policy.draws(prefix.repeats)
        self._check(history, noise, draws, prefix)
        policy, n, size = self._policy, noise.shape[1], self.batch_size
        with full_precision(policy.device):
            cond = policy.encoder(policy.normalizer.encode_obs(history))
            noise = noise[:draws].clone()  # of inference mode as every later x_t is: a compiler tells them apart
            if n == size:
                return self._chain(cond, noise, prefix)
            filled = torch.arange(-(-n // size) * size, device=noise.device).clamp_(max=n - 1)
            pieces = [self._chain(cond[rows], noise[:, rows], _of_rows(prefix, rows)) for rows in filled.split(size)]
            return torch.cat(pieces)[:n]

    def _check(
        self, history: Mapping[str, torch.Tensor], noise: torch.Tensor, draws: int, prefix: Prefix | None
    ) -> None:
        spec, device = self._policy.spec, self._policy.device
        n = noise.shape[1] if noise.ndim == 4 else 0
        found = {name: tuple(history[name].shape) for name in spec.obs_shapes if name in history}
        wanted = {name: (n, spec.n_obs_steps, *shape) for name, shape in spec.obs_shapes.items()}
        if n < 1 or noise.shape[2:] != (spec.horizon, spec.action_dim) or len(noise) < draws or found != wanted:
            shapes = {name: ("B", *shape[1:]) for name, shape in wanted.items()}
            raise PolicyError(
                f"got histories {found} and noise {tuple(noise.shape)}; this plan wants histories {shapes} "
                f"and noise ({draws}, B, {spec.horizon}, {spec.action_dim}) of one B"
            )
        if noise.device != device:
            raise PolicyError(f"the noise is on {noise.device} and the plan was compiled on {device}; compile it there")
        if prefix is not None and prefix.chunk.shape != noise.shape[1:]:
            raise PolicyError(
                f"got a prefix {tuple(prefix.chunk.shape)} and noise {tuple(noise.shape)}; give one known chunk a plan"
            )


def _of_rows(prefix: Prefix | None, rows: torch.Tensor) -> Prefix | None:
    if prefix is None:
        return None
    weights = prefix.weights.to(rows.device).expand(prefix.chunk.shape[:2])
    return replace(prefix, chunk=prefix.chunk[rows], weights=weights[rows])


def compile_plan(policy: Policy, batch_size: int = 1, backend: str = "auto", limit: float = 0.01) -> CompiledPlan:
    """Compile a policy's `plan` for a batch size.

    Args:
        policy: with the sampler it is to use, on the device it is to run on.
        batch_size: how many chunks one computation plans; other batches are cut into pieces of it.
        backend: a name of `backends.BACKENDS`, or `auto` for the fastest that is present.
        limit: largest difference of an action from the policy's own, as a share of the action's range.

    Returns:
        The plan; `measured` says what was tried. Its weights are those of this moment, a copy: training goes on in the
        policy's own.

    Raises:
        PolicyError: if the name is unknown, the backend cannot run here, or its actions differ by more than `limit`.
        MissingExtraError: if the backend's packages are not installed.
    """
    if batch_size < 1:
        raise PolicyError(f"batch_size is {batch_size}; give how many environments are planned at once, at least 1")
    policy = deepcopy(policy.with_sampler(policy.sampler_config))
    job = Job(policy, batch_size)
    if backend == "auto":
        return _fastest(job, limit)
    if backend not in BACKENDS:
        raise PolicyError(f"there is no backend {backend!r}; choose auto or one of {', '.join(BACKENDS)}")
    plan = build(job, backend)
    plan.measured = (measure(plan, policy, limit),)
    if plan.measured[0].left_out:
        raise PolicyError(f"the backend {backend!r} {plan.measured[0].left_out}; choose another, or raise the limit")
    return plan


def build(job: Job, backend: str) -> CompiledPlan:
    """Compile a job for one backend, unmeasured; errors as `compile_plan`."""
    BACKENDS[backend].check(backend, job.policy)
    with torch.inference_mode():
        return CompiledPlan(job, backend, BACKENDS[backend].bodies(job))


def _fastest(job: Job, limit: float) -> CompiledPlan:
    """Build all backends of the device, keep the fastest within the limit; at any time two plans are held at most."""
    best, found = None, []
    for name in usable_on(job.policy.device.type):
        try:
            plan = build(job, name)
            measured = measure(plan, job.policy, limit)
        except Exception as error:  # a compiler that fails must not take the robot's plan with it
            found.append(Measured(name, left_out=_reason(error)))
            continue
        found.append(measured)
        plan.measured = (measured,)
        if not measured.left_out and (best is None or _milliseconds(plan) < _milliseconds(best)):
            best = plan
    if best is None:
        raise PolicyError("no backend can plan: " + "; ".join(str(one) for one in found))
    best.measured = tuple(found)
    return best


def _milliseconds(plan: CompiledPlan) -> float:
    return plan.measured[0].p50_ms or float("inf")


def _reason(error: Exception) -> str:
    if isinstance(error, DiffPolicyError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"failed here: {type(error).__name__}: {lines[0] if lines else 'without a word'}"


def measure(plan: CompiledPlan, policy: Policy, limit: float) -> Measured:
    """Compare a plan with the policy's own on histories of the data's range, then time it."""
    cases = [example(policy, plan.batch_size, seed) for seed in range(CHECKS)]
    own = policy.with_sampler(policy.sampler_config)
    difference = max(share_of_range(policy, plan(*case), own.plan(*case)) for case in cases)
    p50 = median_ms(lambda: plan(*cases[0]).cpu())
    ok = difference <= limit
    why = "" if ok else f"differs from the policy by {difference:.1e} of the action range, limit {limit:.1e}"
    return Measured(plan.backend, p50, difference, why)


def example(
    policy: Policy, batch_size: int, seed: int, edges: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Histories spread over the range of the data, or over its corners, and noise: arguments of `plan`."""
    generator, spec = torch.Generator().manual_seed(seed), policy.spec
    history = {}
    for name, shape in spec.obs_shapes.items():
        low, high = (bound.cpu() for bound in (policy.normalizer[name].minimum, policy.normalizer[name].maximum))
        spread = torch.rand(batch_size, spec.n_obs_steps, *shape, generator=generator)
        spread = spread.round() if edges else spread
        history[name] = (low + (high - low) * spread).to(policy.device)
    noise = torch.randn(policy.planner.draws, batch_size, spec.horizon, spec.action_dim, generator=generator)
    return history, noise.to(policy.device)


def share_of_range(policy: Policy, a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of an action, as a share of its range in the data; infinite where one is not a number."""
    action = policy.normalizer["action"]
    width = action.maximum - action.minimum
    share = ((a - b).abs() / torch.where(width > 0, width, 1.0)).max()
    return float(share) if bool(share.isfinite()) else float("inf")
