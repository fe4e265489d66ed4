"""A GPU where there is none: its tensors are the CPU's, with a mark.

Within `PretendedCuda` whatever is made on `cuda`, moved there or computed from what is there carries the mark. As on a
GPU, an operation on tensors of both devices is refused, a generator serves its own device alone, and NumPy gets nothing
that was not moved back. What makes the CPU wait for a GPU is counted: a number read, and, as PyTorch copies, one sent.
Values are the CPU's: what differs from a run there is wrong. Not seen are other threads, compiled code, and the inside
of PyTorch's own functions.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DEVICE, IS_CUDA, SET_DATA = Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.data.__set__
TAKE_BOTH = (Tensor.to, Tensor.copy_, Tensor.__deepcopy__, SET_DATA, torch._has_compatible_shallow_copy_type)
INDEX = (Tensor.__getitem__, Tensor.__setitem__)
MOVE = (Tensor.to, Tensor.cpu)
FROM_HOST = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
WAIT = (
    *(Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__),
    *(Tensor.nonzero, torch.nonzero, Tensor.unique, torch.unique, torch.equal, torch.allclose, torch.masked_select),
)


def place(tensor: Tensor) -> torch.device:
    """Where a tensor pretends to be."""
    return CUDA if getattr(tensor, "on_cuda", False) else CPU


def _mark(tensor: Tensor, device: torch.device) -> Tensor:
    tensor.on_cuda = device.type == "cuda"  # type: ignore[attr-defined]
    return tensor


class Generator(torch.Generator):
    """A generator of the CPU that says where it is told to be."""

    told: torch.device

    def __new__(cls, device: str | torch.device = "cpu") -> "Generator":
        made = super().__new__(cls, "cpu")
        made.told = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return CUDA if self.told.type == "cuda" else CPU


class PretendedCuda(TorchFunctionMode):
    """While entered there is a device `cuda`; `waits` counts what waits for it, by function and line."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if func in (DEVICE, IS_CUDA):
            return place(args[0]) if func == DEVICE else place(args[0]) == CUDA
        asked, args, kwargs = _asked(func, args, dict(kwargs or {}))
        known = CUDA if any(place(tensor) == CUDA for tensor in given) else CPU
        result = CPU if func == Tensor.cpu else asked or known
        self._check(func, args, kwargs, given, known, result)
        out = func(*args, **kwargs)
        if func == SET_DATA:
            _mark(args[0], place(args[1]))
        if func in MOVE and out is args[0] and place(out) != result:  # on a GPU it would be another tensor
            out = out.clone()
        return tree_map_only(Tensor, lambda x: x if any(x is one for one in given) else _mark(x, result), out)

    def _check(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor], known: Any, result: Any) -> None:
        generator = kwargs.get("generator")
        if generator is not None and generator.device != result:
            raise RuntimeError(f"{func.__name__}: the generator is on {generator.device}, its result on {result}")
        if known != CUDA and result != CUDA:
            return
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("NumPy gets nothing from cuda:0; move it to the host first")
        indexed = func in INDEX and place(args[0]) == CUDA  # numbers of rows may come from the host
        on_host = [x for x in given if place(x) == CPU and x.dim()]  # so may a number without dimensions
        strangers = [x for x in on_host if not indexed or any(x is value for value in args[2:])]
        if known == CUDA and strangers and func not in TAKE_BOTH:
            raise RuntimeError(f"{func.__name__}: some are on cuda:0, one of {[*strangers[0].shape]} on the CPU")
        masked = indexed and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))
        moved = func in MOVE and place(args[0]) != result
        taken = args[-1] if func == Tensor.new_tensor else args[0] if args else None
        made = func in FROM_HOST and not (isinstance(taken, Tensor) and place(taken) == result)
        sent = made or (func == Tensor.copy_ and place(args[1]) != result) or (indexed and on_host)
        if func in WAIT or masked or ((moved or sent) and not kwargs.get("non_blocking")):
            self.waits[f"{func.__name__} {_line()}"] += 1

    def __enter__(self) -> "PretendedCuda":
        self.patches = ExitStack()
        copied, grouped, load = nn.Parameter.__deepcopy__, clip_grad._group_tensors_by_device_and_dtype, torch.load

        def copy(parameter: nn.Parameter, memo: dict) -> Tensor:
            return _mark(copied(parameter, memo), place(parameter))

        def group(tensors: list[list[Tensor]]) -> dict:
            return {(place(tensors[0][0]), dtype): found for (_, dtype), found in grouped(tensors).items()}

        def pin(tensor: Tensor) -> Tensor:
            if place(tensor) == CUDA:
                raise RuntimeError("only what is on the CPU can be pinned")
            return tensor

        def read(*args: Any, map_location: torch.device, **kwargs: Any) -> Any:
            found = load(*args, map_location=CPU, **kwargs)
            return tree_map_only(Tensor, lambda x: _mark(x, map_location), found)

        for target, name, pretended in (
            (torch, "Generator", Generator),
            (torch, "load", read),
            (Tensor, "pin_memory", pin),
            (nn.Parameter, "__deepcopy__", copy),
            (clip_grad, "_group_tensors_by_device_and_dtype", group),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "mem_get_info", lambda device=None: (2**36, 2**36)),
        ):
            self.patches.enter_context(patch.object(target, name, pretended))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()


def _asked(func: Any, args: tuple, kwargs: dict) -> tuple[torch.device | None, tuple, dict]:
    """Where the result is asked to be, None if nowhere, and the arguments for the CPU."""
    asked = None
    if kwargs.get("device") is not None:
        asked, kwargs["device"] = torch.device(kwargs["device"]), CPU
    if func == Tensor.to:
        for like in args[1:2]:
            if isinstance(like, str | torch.device):
                asked, args = torch.device(like), (args[0], CPU, *args[2:])
            elif isinstance(like, Tensor):
                asked = place(like)
    return (CUDA if asked and asked.type == "cuda" else asked), args, kwargs


def _line() -> str:
    """The innermost line of the library, or of a test."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ or "torch" in frame.f_code.co_filename.split("/"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
