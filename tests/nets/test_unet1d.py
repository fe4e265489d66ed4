"""The temporal U-Net computes the reference's function for the same weights, at any horizon."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from diffpolicy.nets.unet1d import UNet1d

FIXTURE = Path(__file__).parent / "fixtures" / "reference_unet1d.safetensors"

# The reference's names (LeRobot's `DiffusionConditionalUnet1d`) to ours, one part of a name a line.
RENAMES = [
    (r"^diffusion_step_encoder\.(\d)", lambda m: f"time.net.{int(m[1]) - 1}"),
    (r"^(down|mid|up)_modules\.", r"\1."),
    (r"^(down|up)\.(\d)\.0\.", r"\1.\2.first."),
    (r"^(down|up)\.(\d)\.1\.", r"\1.\2.second."),
    (r"^(down|up)\.(\d)\.2\.", r"\1.\2.resample."),
    (r"^final_conv\.0\.block\.", "head.0."),
    (r"^final_conv\.1\.", "head.1."),
    (r"\bconv1\.block\.", "first."),
    (r"\bconv2\.block\.", "second."),
    (r"\bcond_encoder\.", "film."),
    (r"\bresidual_conv\.", "skip."),
]


def ours(name: str) -> str:
    """Our name of one of the reference's weights."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def reference_weights() -> dict[str, torch.Tensor]:
    prefix = "weights."
    return {name.removeprefix(prefix): w for name, w in load_file(FIXTURE).items() if name.startswith(prefix)}


def reference_case(horizon: int) -> tuple[torch.Tensor, ...]:
    """`(x, step, cond, output)` of the reference."""
    tensors = load_file(FIXTURE)
    return tuple(tensors[f"horizon_{horizon}.{part}"] for part in ("x", "step", "cond", "output"))


def reference_size() -> UNet1d:
    """Our network in the size of the fixture."""
    return UNet1d(2, 12, down_dims=(16, 24, 32), kernel_size=5, groups=8, step_embed_dim=32)


@pytest.fixture(scope="module")
def network() -> UNet1d:
    """Our network with the reference's weights; loading refuses a name too few or too many."""
    network = reference_size()
    network.load_state_dict({ours(name): weight for name, weight in reference_weights().items()})
    return network.eval().requires_grad_(False)


def inputs(batch: int, horizon: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, horizon, 2, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.randn(batch, 12, generator=generator)


class FirstLength:
    """Writes down what reaches the first residual block, `(B, Da, L)`."""

    def __init__(self, network: UNet1d) -> None:
        self.seen: list[torch.Tensor] = []
        level = network.down[0]
        assert isinstance(level.first, nn.Module)
        self.handle = level.first.register_forward_pre_hook(lambda module, args: self.seen.append(args[0]))

    def __enter__(self) -> list[torch.Tensor]:
        return self.seen

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def test_with_the_canonical_push_t_sizes_it_has_65783298_parameters():
    with torch.device("meta"):
        network = UNet1d(2, 40, down_dims=(256, 512, 1024), kernel_size=5, groups=8, step_embed_dim=256)
        assert sum(weight.numel() for weight in UNet1d(2, 40).parameters()) == 65_783_298
    assert sum(weight.numel() for weight in network.parameters()) == 65_783_298


def test_it_has_the_weights_of_the_reference_one_for_one():
    theirs = {ours(name): tuple(weight.shape) for name, weight in reference_weights().items()}
    assert len(theirs) == len(reference_weights())
    assert theirs == {name: tuple(weight.shape) for name, weight in reference_size().state_dict().items()}


@pytest.mark.parametrize("horizon", [4, 8, 16, 32])
def test_with_the_references_weights_it_gives_the_references_output_to_1e_5(network: UNet1d, horizon: int):
    """The reference's step `k` of 0 to 99 is our time `(k + 1) / 100`."""
    x, step, cond, expected = reference_case(horizon)
    output = network(x, (step + 1) / 100, cond)
    assert expected.abs().mean() > 0.1
    assert (output - expected).abs().max() < 1e-5


@pytest.mark.parametrize("horizon", range(1, 34))
def test_any_horizon_from_1_to_33_gives_a_chunk_of_that_length(network: UNet1d, horizon: int):
    x, t, cond = inputs(3, horizon)
    output = network(x, t, cond)
    assert output.shape == (3, horizon, 2)
    assert output.isfinite().all()


@pytest.mark.parametrize(("horizon", "padded"), [(1, 4), (2, 4), (3, 4), (7, 8), (13, 16), (33, 36)])
def test_another_horizon_is_the_crop_of_its_last_action_repeated_up_to_a_multiple_of_4(
    network: UNet1d, horizon: int, padded: int
):
    x, t, cond = inputs(3, horizon)
    repeated = torch.cat([x, x[:, -1:].expand(-1, padded - horizon, -1)], dim=1)
    assert torch.equal(network(x, t, cond), network(repeated, t, cond)[:, :horizon])


@pytest.mark.parametrize("horizon", [4, 8, 16, 32])
def test_a_horizon_that_is_a_multiple_of_4_reaches_the_first_block_unpadded(network: UNet1d, horizon: int):
    x, t, cond = inputs(3, horizon)
    with FirstLength(network) as seen:
        network(x, t, cond)
    assert torch.equal(seen[0], x.transpose(1, 2))


@pytest.mark.parametrize(("levels", "multiple"), [(1, 1), (2, 2), (3, 4), (4, 8)])
def test_each_level_after_the_first_doubles_the_multiple_that_a_chunk_is_padded_to(levels: int, multiple: int):
    network = UNet1d(2, 12, down_dims=(8,) * levels, step_embed_dim=8)
    x, t, cond = inputs(2, 9)
    with FirstLength(network) as seen:
        assert network(x, t, cond).shape == x.shape
    assert seen[0].shape[-1] == -(-9 // multiple) * multiple


def test_each_chunk_of_a_batch_of_8_is_computed_as_if_alone_to_1e_5(network: UNet1d):
    x, t, cond = inputs(8, 16)
    together = network(x, t, cond)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(8)])
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("part", [0, 1, 2], ids=["chunk", "time", "condition"])
def test_every_input_matters_to_every_action(network: UNet1d, part: int):
    arguments = list(inputs(3, 16))
    before = network(*arguments)
    arguments[part] = arguments[part] + 0.1
    assert (network(*arguments) - before).abs().min() > 1e-6


def test_without_a_condition_it_takes_none():
    network = UNet1d(2, 0, down_dims=(8, 16), step_embed_dim=8)
    x, t, _ = inputs(3, 5)
    assert network(x, t, None).shape == x.shape
    assert torch.equal(network(x, t, None), network(x, t, torch.zeros(3, 0)))


def test_every_weight_gets_a_gradient():
    network = reference_size()
    x, t, cond = inputs(3, 13)
    functional.mse_loss(network(x, t, cond), torch.ones_like(x)).backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": 4}, "kernel_size 4"),
        ({"down_dims": (16, 20)}, r"down_dims \(16, 20\), groups 8"),
        ({"down_dims": (16, 32), "groups": 3}, "groups 3"),
        ({"down_dims": ()}, r"down_dims \(\)"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_what_came_and_what_was_wanted(options: dict, reason: str):
    with pytest.raises(ValueError, match=f"got .*{reason}.* wanted every entry of down_dims divisible by groups"):
        UNet1d(2, 12, **options)
