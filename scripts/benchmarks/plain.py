"""The naive way, as the peer of the benchmarks: what a careful person writes first, with torch alone.

A per-item dataset behind a DataLoader; the reference block structure (Conv1d-GroupNorm-Mish residual blocks with
FiLM) as plain modules; 100 discrete noise levels in a table; AdamW and a weight average parameter by parameter.
"""

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset


class ItemDataset(Dataset):
    """One window an item, cut and padded with numpy from a list of episodes."""

    def __init__(self, episodes: list[dict[str, np.ndarray]], horizon: int, n_obs: int, n_action: int) -> None:
        self.episodes, self.horizon, self.n_obs = episodes, horizon, n_obs
        self.index = [(e, s) for e, ep in enumerate(episodes) for s in range(len(ep["action"]))]

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Return one window."""
        e, s = self.index[i]
        obs, action = self.episodes[e]["obs"], self.episodes[e]["action"]
        rows = np.clip(np.arange(s - self.n_obs + 1, s + 1), 0, None)
        chunk = np.arange(s - self.n_obs + 1, s - self.n_obs + 1 + self.horizon)
        return {
            "obs": obs[rows],
            "action": action[np.clip(chunk, 0, len(action) - 1)],
            "valid": (chunk >= 0) & (chunk < len(action)),
        }


class Block(nn.Module):
    """Residual block with FiLM."""

    def __init__(self, i: int, o: int, cond: int, k: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv1d(i, o, k, padding=k // 2), nn.GroupNorm(8, o), nn.Mish())
        self.b = nn.Sequential(nn.Conv1d(o, o, k, padding=k // 2), nn.GroupNorm(8, o), nn.Mish())
        self.film = nn.Sequential(nn.Mish(), nn.Linear(cond, 2 * o))
        self.skip = nn.Conv1d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Run."""
        scale, shift = self.film(cond)[..., None].chunk(2, 1)
        return self.b(self.a(x) * scale + shift) + self.skip(x)


class PlainUNet(nn.Module):
    """The reference U-Net of three levels."""

    def __init__(
        self, action_dim: int, cond_dim: int, dims: tuple[int, int, int], k: int = 5, embed: int = 256
    ) -> None:
        super().__init__()
        a, b, c = dims
        e = embed + cond_dim
        self.embed = embed
        self.time = nn.Sequential(nn.Linear(embed, 4 * embed), nn.Mish(), nn.Linear(4 * embed, embed))
        self.down = nn.ModuleList(
            [Block(i, o, e, k) for i, o in ((action_dim, a), (a, a), (a, b), (b, b), (b, c), (c, c))]
        )
        self.halve = nn.ModuleList([nn.Conv1d(a, a, 3, 2, 1), nn.Conv1d(b, b, 3, 2, 1)])
        self.mid = nn.ModuleList([Block(c, c, e, k), Block(c, c, e, k)])
        self.up = nn.ModuleList([Block(2 * c, b, e, k), Block(b, b, e, k), Block(2 * b, a, e, k), Block(a, a, e, k)])
        self.upsample = nn.ModuleList([nn.ConvTranspose1d(b, b, 4, 2, 1), nn.ConvTranspose1d(a, a, 4, 2, 1)])
        self.head = nn.Sequential(
            nn.Conv1d(a, a, k, padding=k // 2), nn.GroupNorm(8, a), nn.Mish(), nn.Conv1d(a, action_dim, 1)
        )

    def forward(self, x: torch.Tensor, step: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Predict the noise of `x (B, Tp, Da)` at discrete `step (B,)`."""
        half = self.embed // 2
        angle = step[:, None].float() * torch.exp(torch.arange(half, device=x.device) * (-math.log(1e4) / (half - 1)))
        e = torch.cat([self.time(torch.cat([angle.sin(), angle.cos()], -1)), cond], -1)
        x, skips = x.transpose(1, 2), []
        for level in range(3):
            x = self.down[2 * level + 1](self.down[2 * level](x, e), e)
            skips.append(x)
            x = self.halve[level](x) if level < 2 else x
        for block in self.mid:
            x = block(x, e)
        for level in range(2):
            x = torch.cat([x, skips.pop()], 1)
            x = self.upsample[level](self.up[2 * level + 1](self.up[2 * level](x, e), e))
        return self.head(x).transpose(1, 2)


class PlainTrainer:
    """Noise prediction at 100 discrete levels, AdamW, average of the weights."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network = network.to(device)
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(network.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        steps = torch.arange(101) / 100
        bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
        self.alpha_bar = torch.cumprod(1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999), 0).to(device)
        self.updates = 0

    def update(self, x: torch.Tensor, cond: torch.Tensor, valid: torch.Tensor) -> float:
        """Take one step."""
        step = torch.randint(100, (len(x),), device=x.device)
        bar, eps = self.alpha_bar[step].view(-1, 1, 1), torch.randn_like(x)
        error = (self.network(bar.sqrt() * x + (1 - bar).sqrt() * eps, step, cond) - eps) ** 2 * valid[..., None]
        loss = error.sum() / (valid.sum() * x.shape[-1])
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        decay = min(0.9999, 1 - (1 + self.updates) ** -0.75)
        for shadow, weight in zip(self.average.parameters(), self.network.parameters(), strict=True):
            shadow.mul_(decay).add_(weight.detach(), alpha=1 - decay)
        self.updates += 1
        return loss.item()
