"""Adapters of a user's own: functions that the settings name as `path/to/file.py:function`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from unitoken.common.errors import ConfigError, one_line
from unitoken.common.hashing import fingerprint


def load_user_adapter(name: str, known: Iterable[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Import the function that `name` stands for.

    Args:
        name: `path/to/file.py:function`.
        known: the adapters that have a plain name, for the error's message.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be imported.
    """
    path, function = _path_and_function(name, known)
    _read(path)
    spec = importlib.util.spec_from_file_location(f"adapter_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may fail in any way
        reason = one_line(error, 200)
        raise ConfigError(f"adapter: {path}: {type(error).__name__}: {reason}") from None
    adapter = getattr(module, function, None)
    if not callable(adapter):
        raise ConfigError(f"adapter: {path}: has no function '{function}'")
    return adapter  # type: ignore[no-any-return]


def user_adapter_fingerprint(name: str, known: Iterable[str]) -> str:
    """Return the function's name and a hash of its file, wherever that is.

    Raises:
        ConfigError: there is no such file.
    """
    path, function = _path_and_function(name, known)
    return f"{function} {fingerprint(_read(path))}"


def _path_and_function(name: str, known: Iterable[str]) -> tuple[Path, str]:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        raise ConfigError(
            f"adapter: expected one of {', '.join(known)}, or path/to/file.py:function, found '{name}'"
        )
    return Path(path), function


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"adapter: {path}: cannot be read: {error.strerror}") from None
