"""The C++ compiler that `torch.compile` and AOTInductor need on a CPU."""

import os
import shutil
import sys


def why_no_compiler() -> str:
    """Say what compiling lacks on this machine, or nothing; looks for what PyTorch would call."""
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return "" if shutil.which(name) else f"needs a C++ compiler and finds no {name}; install it, or name yours in CXX"
