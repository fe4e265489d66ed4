"""The reason for diffusion: two equally good ways, of which regression takes the mean, which is the obstacle."""

import numpy as np
import torch

from diffpolicy.agents.bc import Bc, BcConfig
from diffpolicy.data.episodes import Episodes
from diffpolicy.data.normalizer import Normalizer
from diffpolicy.data.order import Order
from diffpolicy.data.spec import Spec
from diffpolicy.data.windows import Windows
from diffpolicy.nets.unet1d import UNet1d
from diffpolicy.parts import DenoiserConfig, SamplerConfig
from diffpolicy.rollout import make_envs, rollout
from diffpolicy.train import TrainConfig, fit
from diffpolicy_envs import DetourExpert
from diffpolicy_envs.detour import START, passes

HORIZON, STEPS, BATCH = 24, 2500, 64
NETWORK = DenoiserConfig(down_dims=(32, 64), kernel_size=5, step_embed_dim=32)


def test_diffusion_takes_both_ways_with_share_0_5_and_regression_hits_the_obstacle():
    episodes = balanced(
        rollout(DetourExpert(seed=0, margin=0.15), make_envs("diffpolicy_envs:Detour-v0", 20), 240, seed=0)
    )
    spec = Spec.from_episodes(episodes, HORIZON, n_obs_steps=1, n_action_steps=HORIZON)
    config = BcConfig(NETWORK, SamplerConfig("ddpm", 50), learning_rate=2e-3, warmup_steps=100)
    agent = Bc(spec, Normalizer.fit(episodes), config, STEPS)
    windows = Windows(episodes, spec)
    for _ in fit(agent, windows, TrainConfig(steps=STEPS, batch_size=BATCH)):
        pass
    start = torch.tensor(START).view(1, 1, 2).expand(500, 1, 2)
    noise = torch.randn(50, 500, HORIZON, 2, generator=torch.Generator().manual_seed(0))
    ways = passes(START, agent.policy().plan({"obs": start}, noise).numpy())
    assert abs(np.mean(ways[ways != 0] > 0) - 0.5) <= 0.1
    assert np.mean(ways == 0) <= 0.01

    assert passes(START, regress(agent, windows)[None].numpy()).item() == 0


def balanced(episodes: Episodes) -> Episodes:
    """As many demonstrations of either way."""
    above = np.array([passes(START, episodes[i].action[None])[0] > 0 for i in range(len(episodes))])
    n = min(above.sum(), (~above).sum())
    return episodes.select(np.concatenate([np.flatnonzero(above)[:n], np.flatnonzero(~above)[:n]]))


def regress(agent: Bc, windows: Windows) -> torch.Tensor:
    """Train the same network to predict the chunk by its mean squared error; return its chunk from the start."""
    torch.manual_seed(0)
    network = UNet1d(2, 2, NETWORK.down_dims, NETWORK.kernel_size, step_embed_dim=NETWORK.step_embed_dim)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    order = Order(len(windows), BATCH, 0)

    def predict(cond: torch.Tensor) -> torch.Tensor:
        return network(torch.zeros(len(cond), HORIZON, 2), torch.ones(len(cond)), cond)

    for step in range(300):
        batch = agent.normalizer.encode(windows.gather(order(step)))
        error = (predict(agent.model.encoder(batch.obs)) - batch.action) ** 2 * batch.valid[..., None]
        optimizer.zero_grad()
        (error.sum() / batch.valid.sum()).backward()
        optimizer.step()
    with torch.no_grad():
        obs = agent.normalizer.encode_obs({"obs": torch.tensor(START).view(1, 1, 2)})
        return agent.normalizer.decode_action(predict(agent.model.encoder(obs)))[0]
