"""Errors that end a command with one line, and which of them may pass by themselves."""

from __future__ import annotations

import errno

from unitoken.common.urls import without_secrets


class ConfigError(ValueError):
    """A user's mistake outside the data: settings, paths, folders that do not fit. One line, without a URL's secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class DataError(RuntimeError):
    """Data that is missing, unreachable or corrupt. One line, without a URL's secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class Transient(Exception):  # noqa: N818 - a mark of errors, none of its own
    """It may pass: a server that does not answer, a disk that is full."""


_TRANSIENT = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
}


def is_transient(error: Exception) -> bool:
    """Whether the same again may succeed without anything being mended in what was asked for."""
    if isinstance(error, (Transient, TimeoutError, ConnectionError)):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Return the words of an error in one line, or the name of its kind where it has none.

    Args:
        error: any error, also one of a library whose message has several lines.
        limit: the most characters to return; None keeps them all.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__
