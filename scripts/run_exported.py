"""An exported policy plays a maze, with numpy, gymnasium-robotics and ONNX Runtime: no torch, none of this library.

diffpolicy export runs/maze --format onnx -o maze.onnx
python scripts/run_exported.py maze.onnx 20           # the episodes and the noise of `diffpolicy evaluate`
"""

import json
import sys
from pathlib import Path

import gymnasium
import gymnasium_robotics
import numpy as np
import onnxruntime

onnxruntime.set_default_logger_severity(3)


def play(path: str, env: gymnasium.Env, episode: int, seed: int = 100_000) -> tuple[np.ndarray, bool]:
    """Play one episode; return its actions `(steps, Da)` and whether it succeeded."""
    about = json.loads(Path(f"{path}.json").read_text())
    session = onnxruntime.InferenceSession(path)
    draws, _, *chunk = about["noise"]["shape"]
    obs, info = env.reset(seed=seed + episode)
    history, actions, plan, ended = [obs] * about["n_obs_steps"], [], 0, False
    while not ended:
        stream = np.random.default_rng([about["noise"]["seed"], episode, plan])
        seen = {name: [[step[name] for step in history]] for name in about["observations"]}
        inputs = {name: np.array(array, dtype=np.float32) for name, array in seen.items()}
        inputs["noise"] = stream.standard_normal((draws, *chunk), dtype=np.float32)[:, None]
        for action in np.asarray(session.run(["action"], inputs)[0])[0]:
            obs, _, terminated, truncated, info = env.step(action)
            actions.append(action)
            history, ended = [*history[1:], obs], terminated or truncated
            if ended:
                break
        plan += 1
    return np.array(actions), bool(info["success"])


if __name__ == "__main__":
    gymnasium.register_envs(gymnasium_robotics)
    maze = gymnasium.make("PointMaze_UMaze-v3", continuing_task=False)
    won = [play(sys.argv[1], maze, episode)[1] for episode in range(int(sys.argv[2]))]
    print(f"success {sum(won)} of {len(won)}: {''.join('x' if one else '.' for one in won)}")
