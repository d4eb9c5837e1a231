"""Errors that end a command with one line, the exit statuses, and which errors are transient."""

from __future__ import annotations

import errno

from unitoken.common.urls import without_secrets

EXIT_FAILURE = 1  # a disk, a store, a shard or memory failed, or a check found a problem
EXIT_USAGE = 2  # a user's mistake: settings, arguments, paths


class ConfigError(ValueError):
    """A user's mistake outside the data: settings, paths, folders that do not match.

    The message is one line; user names, passwords and queries are removed from its URLs.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class DataError(RuntimeError):
    """Data that is missing, unreachable or corrupt. The message is as in `ConfigError`."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class Transient(Exception):  # noqa: N818 - a mixin that marks errors, never raised itself
    """Marks an error that may go away without any change: a server that does not answer, a full disk."""


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
    """Return whether the same command may succeed later without any change to its settings."""
    if isinstance(error, (Transient, TimeoutError, ConnectionError)):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT


def exit_status_of_signal(number: int) -> int:
    """Return the exit status of a process that ends because of a signal, as shells report it."""
    return 128 + number


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Return an error's message in one line, or the name of its type if the message is empty.

    Args:
        error: any error, also one of a library whose message has several lines.
        limit: the maximum number of characters to return; None keeps them all.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__
