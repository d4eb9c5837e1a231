"""The state of a training loop as JSON, and back: what is not plain is a mapping with one key that names it.

    (1, 2)       {"$tuple": [1, 2]}              a tensor   {"$tensor": [dtype, shape, base64]}
    {1: "a"}     {"$items": [[1, "a"]]}          an array   {"$array": [dtype, shape, base64]}
    timedelta    {"$time": [days, seconds, microseconds]}

Only values of these types are made of what is read: no code can run.
"""

from __future__ import annotations

import base64
import datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unitoken.train.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, bytes_of


def to_plain(value: Any) -> Any:
    """Return a value as what JSON can hold.

    Raises:
        TypeError: the value, or one in it, is of another type than those that a run's state has.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)  # of torch's versions, which are a kind of str
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [to_plain(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: to_plain(item) for key, item in value.items()}
        return {"$items": [[to_plain(key), to_plain(item)] for key, item in value.items()]}
    if isinstance(value, datetime.timedelta):
        return {"$time": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, Tensor):
        content = bytes_of(value.detach().cpu().contiguous())
        return {"$tensor": [DTYPE_NAMES[value.dtype], list(value.shape), _text(content)]}
    if isinstance(value, np.ndarray):
        return {"$array": [value.dtype.str, list(value.shape), _text(np.ascontiguousarray(value).tobytes())]}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a checkpoint can not hold a {type(value).__name__}")


def from_plain(value: Any) -> Any:
    """Return what `to_plain` was given. Raises ValueError if this is not what it returned."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = next(iter(value), "")
    if not kind.startswith("$"):
        return {key: from_plain(item) for key, item in value.items()}
    content = value[kind]
    try:
        if kind == "$tuple":
            return tuple(from_plain(item) for item in content)
        if kind == "$items":
            return {from_plain(key): from_plain(item) for key, item in content}
        if kind == "$time":
            days, seconds, microseconds = content
            return datetime.timedelta(days, seconds, microseconds)
        dtype, shape, text = content
        data = bytearray(base64.b64decode(text, validate=True))
        if kind == "$tensor":
            return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)
        if kind == "$array":
            return np.frombuffer(data, dtype=_number_type(dtype)).reshape(shape)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{kind} of another form: {error}") from None
    raise ValueError(f"unknown kind of value: {kind}")


def _text(content: bytes | memoryview) -> str:
    return base64.b64encode(content).decode("ascii")


def _number_type(name: str) -> np.dtype[Any]:
    """Return numpy's type of a name; only numbers, as other types hold references to objects."""
    dtype = np.dtype(str(name))
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of {name}")
    return dtype
