"""The real clock: a loop at a fixed rate, and plans that are fast enough for a control period."""

from diffpolicy.control.compiled import compile_plan
from diffpolicy.control.limits import Limits
from diffpolicy.control.loop import Safety, Stamped
from diffpolicy.control.report import Report
from diffpolicy.control.runner import Runner
from diffpolicy.control.strategies import Bidirectional, Ensemble, RealTime, Switch, Synchronous

__all__ = [
    "Bidirectional",
    "Ensemble",
    "Limits",
    "RealTime",
    "Report",
    "Runner",
    "Safety",
    "Stamped",
    "Switch",
    "Synchronous",
    "compile_plan",
]
