"""The real clock: a loop at a fixed rate, plans that are fast enough for a control period, a policy behind a server.

Names are imported when they are first used: `Client` needs no torch.
"""

from typing import TYPE_CHECKING

from diffpolicy.lazy import import_when_used

if TYPE_CHECKING:
    from diffpolicy.control.compiled.plan import compile_plan
    from diffpolicy.control.delayed import Delayed
    from diffpolicy.control.limits import Limits
    from diffpolicy.control.loop import Safety, Stamped
    from diffpolicy.control.report import Report
    from diffpolicy.control.runner import Runner
    from diffpolicy.control.serving.client import Client
    from diffpolicy.control.serving.remote import RemotePolicy
    from diffpolicy.control.serving.server import Door, Server
    from diffpolicy.control.strategies import Bidirectional, Ensemble, RealTime, Switch, Synchronous
    from diffpolicy.diffusion.guidance import Pinned, RealTimeChunk, Trained, blended

import_when_used(
    __name__,
    {
        "diffpolicy.control.serving.client": ("Client",),
        "diffpolicy.control.compiled.plan": ("compile_plan",),
        "diffpolicy.control.delayed": ("Delayed",),
        "diffpolicy.control.limits": ("Limits",),
        "diffpolicy.control.loop": ("Safety", "Stamped"),
        "diffpolicy.control.serving.remote": ("RemotePolicy",),
        "diffpolicy.control.report": ("Report",),
        "diffpolicy.control.runner": ("Runner",),
        "diffpolicy.control.serving.server": ("Door", "Server"),
        "diffpolicy.control.strategies": ("Bidirectional", "Ensemble", "RealTime", "Switch", "Synchronous"),
        "diffpolicy.diffusion.guidance": ("Pinned", "RealTimeChunk", "Trained", "blended"),
    },
)

__all__ = [
    "Bidirectional",
    "Client",
    "Delayed",
    "Door",
    "Ensemble",
    "Limits",
    "Pinned",
    "RealTime",
    "RealTimeChunk",
    "RemotePolicy",
    "Report",
    "Runner",
    "Safety",
    "Server",
    "Stamped",
    "Switch",
    "Synchronous",
    "Trained",
    "blended",
    "compile_plan",
]
