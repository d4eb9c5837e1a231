"""Functions of a user's own, which settings name as `path/to/file.py:function`."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from unitoken.common.errors import ConfigError, one_line
from unitoken.common.hashing import fingerprint
from unitoken.common.missing_paths import where_looked


def load_user_function(name: str, setting: str, known: Iterable[str] = ()) -> Callable[..., Any]:
    """Import the function that `name` stands for.

    Args:
        name: `path/to/file.py:function`.
        setting: the setting that names it, for the error's message.
        known: what the setting may be instead, for the error's message.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be imported.
    """
    path, function = _path_and_function(name, setting, known)
    _read(path, setting)
    spec = importlib.util.spec_from_file_location(f"{setting}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may fail in any way
        reason = one_line(error, 200)
        raise ConfigError(f"{setting}: {path}: {type(error).__name__}: {reason}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{setting}: {path}: has no function '{function}'")
    return found  # type: ignore[no-any-return]


def user_function_fingerprint(name: str, setting: str, known: Iterable[str] = ()) -> str:
    """Return the function's name and a hash of its file, wherever that is.

    Raises:
        ConfigError: there is no such file.
    """
    path, function = _path_and_function(name, setting, known)
    return f"{function} {fingerprint(_read(path, setting))}"


def _path_and_function(name: str, setting: str, known: Iterable[str]) -> tuple[Path, str]:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        others = ", ".join(known)
        expected = f"one of {others}, or path/to/file.py:function" if others else "path/to/file.py:function"
        close = difflib.get_close_matches(name, list(known), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"{setting}: expected {expected}, found '{name}'{hint}")
    return Path(path), function


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        hint = where_looked(path)
        raise ConfigError(f"{setting}: {path}: cannot be read: {error.strerror}{hint}") from None
