"""What goes between a policy's server and its clients: msgpack maps, arrays as their raw bytes beside type and shape.

    {"kind": "predict", "obs": {"arm": {"dtype": "float32", "shape": [1, 7], "data": ...}}, ...}     client
    {"kind": "action", "action": {"dtype": "float32", "shape": [1, 7], "data": ...}}                 server

Reading a message makes nothing but plain values: no object of another kind is ever built, nothing is unpickled, an
array is a view of bytes whose number has been compared with its shape. This module needs msgpack and numpy only.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeGuard

import numpy as np

from diffpolicy.errors import ControlError, MissingExtraError

PROTOCOL = 1
DTYPES = {"float32": np.dtype("<f4"), "uint8": np.dtype("u1")}
MAX_ITEMS = 64
"""Entries of a map or a list: a list is allocated at the length that it claims."""


def msgpack() -> Any:
    """Return the package.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import msgpack as package
    except ImportError as error:
        raise MissingExtraError(f"{error}; pip install 'diffpolicy[serve]' for servers and clients") from error
    return package


def pack(message: Mapping[str, Any]) -> bytes:
    """Write a message; arrays may stand anywhere in it."""
    return msgpack().packb(message, default=_array)


def _array(value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a message cannot hold {type(value).__name__}")
    name = "uint8" if value.dtype == np.uint8 else "float32"
    array = np.ascontiguousarray(value, dtype=DTYPES[name])
    return {"dtype": name, "shape": list(value.shape), "data": array.tobytes()}


def unpack(data: bytes | str) -> dict[str, Any]:
    """Read a message; its arrays are read by `array`.

    Raises:
        ControlError: if it is not a msgpack map with a `kind`.
    """
    if isinstance(data, str):
        raise ControlError("the message is text; wanted bytes of msgpack: use diffpolicy's client")
    try:
        message = msgpack().unpackb(data, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS, ext_hook=_no_extension)
    except Exception as error:  # it raises many kinds, and what comes is a stranger's
        raise ControlError(
            f"the message is not msgpack ({type(error).__name__}); nothing else is read: use diffpolicy's client"
        ) from error
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ControlError("the message is not a map with a kind; use diffpolicy's client")
    return message


def _no_extension(code: int, data: bytes) -> None:
    raise ValueError("extension")


def array(value: Any, name: str, shape: Sequence[int | None]) -> np.ndarray:
    """Read an array of a message, as a view that cannot be written.

    Args:
        value: what stands in the message.
        name: what to call it in an error.
        shape: wanted; None where any size will do.

    Raises:
        ControlError: if type, shape or number of bytes are others, or a number is not finite.
    """
    described = value if isinstance(value, dict) else {}
    dtype, found, data = (described.get(key) for key in ("dtype", "shape", "data"))
    if not isinstance(dtype, str) or dtype not in DTYPES or not _is_shape(found) or not isinstance(data, bytes):
        raise ControlError(f"{name} is no array; wanted its dtype ({' or '.join(DTYPES)}), its shape and its bytes")
    if len(found) != len(shape) or any(w not in (None, f) for f, w in zip(found, shape, strict=True)):
        raise ControlError(f"{name} has the shape {tuple(found)}; wanted {_readable(shape)}")
    if prod(found) * DTYPES[dtype].itemsize != len(data):
        raise ControlError(f"{name} has {len(data)} bytes; its shape {tuple(found)} of {dtype} wants another number")
    result = np.frombuffer(data, DTYPES[dtype]).reshape(found)
    if not np.isfinite(result).all():
        raise ControlError(f"{name} holds a number that is not finite; check the sensor or environment")
    return result


def _is_shape(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**31 for size in value)


def _readable(shape: Sequence[int | None]) -> str:
    return (
        "(" + ", ".join("N" if size is None else str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"
    )
