"""What `torch.compile` and AOTInductor call, beside PyTorch, and whether it is here."""

import os
import shutil
import sys
from importlib.util import find_spec


def why_no_compiler(kind: str = "cpu") -> str:
    """Say what compiling for a `cpu` or for `cuda` lacks on this machine, or nothing; looks for what PyTorch calls."""
    if kind == "cuda":
        if find_spec("triton") is None:
            return "needs triton, and it is not installed; pip install triton"
        own, usual, language, variable = os.environ.get("CC"), ("gcc", "clang"), "C", "CC"
    else:
        name = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        own, usual, language, variable = os.environ.get("CXX"), (name,), "C++", "CXX"
    names = (own,) if own else usual
    if any(shutil.which(name) for name in names):
        return ""
    return f"needs a {language} compiler and finds no {' nor '.join(names)}; install it, or name yours in {variable}"
