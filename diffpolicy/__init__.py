"""diffpolicy: diffusion policies for reinforcement learning and robot control."""
