"""What learns to denoise the data's chunks, and its one loss.

L = E | F(alpha x + sigma eps, t, cond) - target |^2,   t ~ U(0, 1], stratified,   eps ~ N(0, I),   no padding
"""

import torch
from torch import nn

from diffpolicy.data.windows import Batch
from diffpolicy.diffusion.denoiser import NetworkDenoiser
from diffpolicy.nets.prefixed import Prefixed

T_MIN = 0.005


class Imitator(nn.Module):
    """What is trained: the encoder of the observations and the denoiser of the actions."""

    def __init__(self, encoder: nn.Module, denoiser: NetworkDenoiser) -> None:
        super().__init__()
        self.encoder = encoder
        self.denoiser = denoiser

    def forward(self, batch: Batch, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Elementwise loss `(B, Tp, Da)` of an encoded batch."""
        return self.denoiser.loss(batch.action, t, eps, self.encoder(batch.obs))

    def loss(self, batch: Batch, generator: torch.Generator, bf16: bool = False) -> torch.Tensor:
        """Return the loss of an encoded batch at random times, averaged over its real actions.

        A network that continues chunks sees the first of them clean, at time 0, and those do not count.
        """
        x, valid, network = batch.action, batch.valid, self.denoiser.network
        t = stratified_times(len(x), generator, x.device)
        eps = torch.randn(x.shape, generator=generator, device=x.device)
        if isinstance(network, Prefixed):
            clean = network.prefixes(len(x), x.shape[1], generator, x.device)
            t, valid = torch.where(clean, 0.0, t.unsqueeze(-1)), valid & ~clean
        with autocast(x.device, bf16):
            error = self(batch, t, eps)
        return mean_of_real(error, valid)


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Return the context that computes in bfloat16 where it is asked for and the device is CUDA."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")


def mean_of_real(error: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of an elementwise error `(B, Tp, Da)` over the real actions, `valid (B, Tp)`; 0 where there is none."""
    return (error.float() * valid.unsqueeze(-1)).sum() / (valid.sum().clamp(min=1) * error.shape[-1])


def stratified_times(n: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Uniform times in `(T_MIN, 1]`, one in each of n equal intervals, shuffled: less variance than free ones."""
    order = torch.randperm(n, generator=generator, device=device)
    u = (order + torch.rand(n, generator=generator, device=device)) / n
    return 1 - (1 - T_MIN) * u
