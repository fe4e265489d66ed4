"""The average of weights: its decay in numbers, against a loop by hand, and across a resume."""

import pytest
import torch
from torch import nn

from diffpolicy.nets.ema import Ema


def make_module(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def drift(module: nn.Module, step: int) -> None:
    """What an optimizer does: every weight and buffer moves."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
            else:
                tensor.add_(1)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def equal(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))


def test_the_decay_is_0_then_1_minus_2_to_the_minus_0_75_then_1_minus_3_to_the_minus_0_75():
    module = make_module()
    ema, decays = Ema(module), []
    for _ in range(4):
        decays.append(ema.decay)
        ema.update(module)
    assert decays == pytest.approx([0.0, 1 - 2**-0.75, 1 - 3**-0.75, 1 - 4**-0.75], abs=1e-12)
    assert decays[1] == pytest.approx(0.405396, abs=1e-6)


def test_the_decay_rises_to_0_9999_after_215443_updates_and_no_further():
    ema = Ema(make_module())
    ema.updates = 215_442
    assert ema.decay < 0.9999
    for updates in (215_443, 10_000_000):
        ema.updates = updates
        assert ema.decay == 0.9999


def test_the_first_update_overwrites_the_average_with_the_weights():
    module = make_module()
    ema = Ema(module)
    drift(module, 1)
    ema.update(module)
    assert equal(ema.module, module)


@pytest.mark.parametrize(("power", "max_decay"), [(0.75, 0.9999), (2 / 3, 0.9)])
def test_after_30_updates_it_equals_the_recursion_by_hand_to_1e_12(power: float, max_decay: float):
    module = make_module()
    ema = Ema(module, power, max_decay)
    by_hand = [weight.detach().clone() for weight in module.parameters()]
    for n in range(30):
        drift(module, n)
        ema.update(module)
        decay = min(max_decay, 1 - (1 + n) ** -power)
        by_hand = [decay * a + (1 - decay) * w.detach() for a, w in zip(by_hand, module.parameters(), strict=True)]
    assert max((a - b).abs().max() for a, b in zip(ema.module.parameters(), by_hand, strict=True)) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(ema.module.buffers(), module.buffers(), strict=True))


def test_constant_weights_have_themselves_as_average():
    module = make_module()
    ema = Ema(module)
    for _ in range(50):
        ema.update(module)
    assert equal(ema.module, module)


def test_an_average_resumed_after_10_of_25_updates_goes_on_exactly_as_the_unbroken_one():
    module = make_module()
    unbroken = Ema(module)
    for step in range(10):
        drift(module, step)
        unbroken.update(module)
    resumed = Ema(make_module(seed=1))
    resumed.load_state_dict(unbroken.state_dict())
    assert resumed.updates == 10
    assert resumed.decay == unbroken.decay == pytest.approx(1 - 11**-0.75)
    for step in range(10, 25):
        drift(module, step)
        unbroken.update(module)
        resumed.update(module)
    assert equal(resumed.module, unbroken.module)
    assert resumed.updates == unbroken.updates == 25


def test_the_average_is_a_frozen_copy_in_evaluation_mode_and_the_module_stays_as_it_was():
    module = make_module().train()
    before = weights(module)
    ema = Ema(module)
    drift(ema.module, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))
    assert module.training and all(weight.requires_grad for weight in module.parameters())
    assert not ema.module.training and not any(weight.requires_grad for weight in ema.module.parameters())
