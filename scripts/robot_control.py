"""A control script as one writes it for an arm, here a simulated Fetch in MuJoCo at 50 Hz on the wall clock.

    diffpolicy collect --task fetch-reach-50hz --episodes 300 --out demos/reach
    diffpolicy train --dataset demos/reach --task fetch-reach-50hz --out runs/reach
    python scripts/robot_control.py runs/reach
    diffpolicy serve runs/reach                                  or: the policy elsewhere
    python scripts/robot_control.py --server ws://127.0.0.1:8700

The policy is the three lines of `main`. An action is a velocity here and 0 rests, so the arm may wait for each chunk:
like this it held 10 of 10 goals in 40 s, with the policy here and behind a server on the same 2 cores. Where an arm
must not stop, `RealTime(blended)` goes on moving. For a real arm, `read` and `write` talk to its driver instead.
"""

import os
from dataclasses import dataclass

import numpy as np
import tyro

from diffpolicy.control import Client, Limits, RemotePolicy, Runner, Safety, Synchronous
from diffpolicy.policy import Policy
from diffpolicy.rollout import make_env

HZ = 50.0
HURRY = 200  # actions, 4 s, at the end of which the gripper has to be at its goal


@dataclass(frozen=True)
class Args:
    """Drive a simulated Fetch arm."""

    run: tyro.conf.Positional[str | None] = None
    """Folder of a run, or of a policy."""
    server: str | None = None
    """Url of a server instead; its token is read from the environment variable DIFFPOLICY_TOKEN."""
    seconds: float = 20.0
    """How long."""
    device: str = "cpu"
    """Where the policy plans."""


class Arm:
    """An arm with two calls, as a driver has them: what it sees, and the velocity its gripper is to have."""

    def __init__(self) -> None:
        self.env = make_env("diffpolicy_envs:FetchReach50Hz-v0", max_episode_steps=10**9)
        self.obs, _ = self.env.reset(seed=0)
        self.held = self.goals = 0
        self.written: list[np.ndarray] = []

    def read(self) -> dict[str, np.ndarray]:
        """Return the newest observation."""
        return self.obs

    def write(self, action: np.ndarray) -> None:
        """Move for one period; now and then the arm is put back and the goal jumps."""
        self.obs, _, _, _, info = self.env.step(action.astype(np.float32))
        self.written.append(action)
        if len(self.written) % HURRY == 0:
            self.goals += 1
            self.held += int(info["is_success"])
            self.obs, _ = self.env.reset(seed=self.goals)


def load(args: Args) -> Policy | RemotePolicy:
    """Return the policy, here or at its server."""
    if args.server is not None:
        return RemotePolicy(Client(args.server, os.environ.get("DIFFPOLICY_TOKEN")))
    if args.run is None:
        raise SystemExit("error: give the folder of a run, or --server with a url")
    return Policy.load(args.run, args.device)


def main(args: Args) -> None:
    """Run, then say what happened."""
    arm = Arm()
    safety = Safety(Limits(low=-1.0, high=1.0, velocity=20.0), rest=np.zeros(4))

    policy = load(args)
    runner = Runner(policy, HZ, Synchronous(), safety)
    report = runner.run(arm.read, arm.write, seconds=args.seconds)

    print(report)
    print(f"goals        {arm.held} of {arm.goals} held at the end of their {HURRY / HZ:g} s")
    steps = np.abs(np.diff(arm.written, axis=0)).max(axis=1)
    print(f"steps        {np.median(steps):.3f} median, {steps.max():.3f} largest change of an action")


if __name__ == "__main__":
    main(tyro.cli(Args))
