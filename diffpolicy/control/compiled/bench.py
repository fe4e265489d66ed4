"""Latency of a policy's plans, backends x samplers x steps, and the best of them within a budget.

    plan(history, noise) and its transfer back, at a fixed batch:   p50, p95, p99 and jitter, the standard deviation

A backend compiles the network once and serves all samplers. A combination that is not defined is left out with the
reason, one whose actions differ from the policy's own by more than the limit likewise. The score of a sampler is
measured elsewhere, since it does not depend on the backend.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffpolicy.control.compiled.backends import Job
from diffpolicy.control.compiled.plan import CHECKS, CompiledPlan, build, example, share_of_range
from diffpolicy.errors import PolicyError, first_line
from diffpolicy.parts import MOST_STEPS, SamplerConfig, why_not
from diffpolicy.policy import Policy

WARM_UP = 5
FEWEST = 20
SECONDS = 20.0
LIMIT = 0.01


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a plan: quantiles of `samples` plans and their standard deviation."""

    p50: float
    p95: float
    p99: float
    jitter: float
    samples: int


@dataclass(frozen=True)
class Row:
    """One backend under one sampler: its latency, or in one sentence why there is none.

    `evaluations` of the network a plan; largest `difference` of an action from the policy's own, a share of its range.
    """

    backend: str
    sampler: SamplerConfig
    evaluations: int = 0
    latency: Latency | None = None
    difference: float | None = None
    left_out: str = ""

    def __str__(self) -> str:
        """Return one line."""
        name = f"  {self.backend:<18}{self.sampler.sampler:<9}{self.sampler.steps:>4}"
        if self.latency is None:
            return f"{name}  {self.left_out}"
        it = self.latency
        return f"{name}{self.evaluations:>5}{it.p50:>10.2f}{it.p95:>9.2f}{it.p99:>9.2f}{it.jitter:>9.2f}"


HEADER = f"  {'backend':<18}{'sampler':<9}steps  NFE    p50 ms      p95      p99   jitter"


def samplers_of(policy: Policy) -> list[str]:
    """Names of the samplers worth comparing: those that the network was trained for, each function once."""
    own = policy.sampler_config.sampler
    if own in MOST_STEPS:
        return [own]
    first = "euler" if policy.denoiser_config.schedule == "flow" else "ddim"
    return [first, "heun", "dpm++2m", "ddpm"]


def combinations(
    policy: Policy, samplers: Sequence[str], steps: Sequence[int]
) -> tuple[list[SamplerConfig], list[tuple[SamplerConfig, str]]]:
    """Return the samplers x steps that are defined for a policy, and those that are not, with the reason.

    One step is the same function under every sampler: it is kept under the first.
    """
    able, not_able = [], []
    for name in samplers:
        for count in steps:
            wanted = replace(policy.sampler_config, sampler=name, steps=count)
            why = why_not(wanted, policy.sampler_config, policy.denoiser_config.prediction)
            if not why and count == 1 and name != samplers[0]:
                why = f"one step is the same as with {samplers[0]}"
            if why:
                not_able.append((wanted, why))
            else:
                able.append(wanted)
    return able, not_able


def measure(
    policy: Policy, backends: Sequence[str], configs: Sequence[SamplerConfig], batch_size: int = 1, samples: int = 100
) -> Iterator[Row]:
    """Compile for each backend, then time each sampler; one row for every pair.

    Args:
        policy: on the device that it is to run on.
        backends: names of `backends.BACKENDS`.
        configs: samplers that are defined for it.
        batch_size: how many chunks one plan makes.
        samples: plans a row; fewer, but at least 20, where they take longer than 20 s together.
    """
    job = Job(policy, batch_size)
    for backend in backends:
        try:
            plan = build(job, backend)
        except Exception as error:  # compilers fail in many ways, none of which should cost the other rows
            yield from (Row(backend, config, left_out=first_line(error)) for config in configs)
            continue
        for config in configs:
            yield _row(policy.with_sampler(config), plan, samples)


def _row(policy: Policy, compiled: CompiledPlan, samples: int) -> Row:
    try:
        return _measured(policy, compiled.with_sampler(policy.sampler_config), samples)
    except Exception as error:  # torch.compile compiles, and a graph is captured, only now
        return Row(compiled.backend, policy.sampler_config, left_out=first_line(error))


def _measured(policy: Policy, plan: CompiledPlan, samples: int) -> Row:
    cases = [example(policy, plan.batch_size, seed) for seed in range(CHECKS)]
    difference = max(share_of_range(policy, plan(*case), policy.plan(*case)) for case in cases)
    row = Row(plan.backend, policy.sampler_config, policy.planner.evaluations, difference=difference)
    if not difference <= LIMIT:
        return replace(row, left_out=f"differs from the policy by {difference:.1e} of the action range")
    return replace(row, latency=latency(lambda: plan(*cases[0]).cpu(), samples))


def latency(run: Callable[[], object], samples: int) -> Latency:
    """Time `run`, after warming up."""
    for _ in range(WARM_UP):
        run()
    seconds: list[float] = []
    while len(seconds) < samples and (len(seconds) < FEWEST or sum(seconds) < SECONDS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    ms = 1e3 * np.array(seconds)
    p50, p95, p99 = (float(x) for x in np.percentile(ms, [50, 95, 99]))
    return Latency(p50, p95, p99, float(ms.std()), len(ms))


def best_within(rows: Sequence[Row], scores: Mapping[SamplerConfig, float], budget_ms: float) -> Row:
    """Return the row with the best score whose p99 is within the budget; of equals, the quickest.

    Raises:
        PolicyError: if no row is that quick.
    """
    measured = [row for row in rows if row.latency is not None]
    if not measured:
        raise PolicyError("no backend could be measured; look at the reasons above")
    quick = [row for row in measured if row.latency is not None and row.latency.p99 <= budget_ms]
    if not quick:
        least = min(row.latency.p99 for row in measured if row.latency is not None)
        raise PolicyError(
            f"nothing measured plans within {budget_ms:g} ms; the quickest takes {least:.2f} ms in 99 of 100 plans: "
            "raise the budget, give fewer --steps, or train for two steps (--agent mip) or one (--agent distill)"
        )
    return max(quick, key=lambda row: (scores[row.sampler], -(row.latency.p50 if row.latency else 0.0)))
