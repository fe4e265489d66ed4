"""How weights descend: one step, its learning rate, the length of its gradient, a compiled network."""

import math
from typing import Any

import torch
from torch import nn

from diffpolicy.compiler import why_no_compiler
from diffpolicy.errors import SpecError
from diffpolicy.nets.ema import Ema
from diffpolicy.nets.norm import fuse_norms


def warmup_cosine(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """Learning rate: linear warm-up (at most a tenth of the run), then half a cosine to zero at `steps`."""
    warmup = min(warmup_steps, max(steps // 10, 1))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def descend(
    loss: torch.Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema, rate: float, limit: float
) -> torch.Tensor:
    """Take one step on `loss` at a learning rate and move the average; return the gradient's norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = clip_gradient(model, limit)
    optimizer.step()
    ema.update(model)
    return norm


def clip_gradient(module: nn.Module, limit: float) -> torch.Tensor:
    """Shorten the gradient to a norm of `limit`; return its norm before, still on the device."""
    parameters = list(module.parameters())
    norm = nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
    if norm.device.type != "cpu" or not norm <= limit:  # multiplying by 1 would read and write it all
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's moments and steps, but none of its settings: a resumed run may have been given others."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def compile_training(network: nn.Module, device: torch.device, *more: nn.Module) -> None:
    """Have a network compiled at its first training step: the U-Net's norms on a CPU, else all of it, and `more`.

    Raises:
        SpecError: if there is no compiler.
    """
    reason = why_no_compiler(device.type)
    if reason:
        raise SpecError(f"--compile {reason}, or leave it out")
    if device.type == "cpu" and fuse_norms(network):
        return
    for module in (network, *more):
        module.compile(dynamic=False)  # the few batches of a run are known
