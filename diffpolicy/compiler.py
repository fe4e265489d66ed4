"""The C++ compiler that `torch.compile` and AOTInductor need."""

import shutil


def no_compiler() -> str:
    """Say what compiling lacks on this machine, or nothing."""
    if any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return ""
    return "needs a C++ compiler and finds none; install g++ or clang++"
