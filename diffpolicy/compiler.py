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
        names, kept = (os.environ.get("CC"), "gcc", "clang"), "CC"
    else:
        names, kept = (os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"),), "CXX"
    if any(name and shutil.which(name) for name in names):
        return ""
    wanted = " nor ".join(name for name in names if name)
    language = "C" if kind == "cuda" else "C++"
    return f"needs a {language} compiler and finds no {wanted}; install it, or name yours in {kept}"
