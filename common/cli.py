"""How a command ends that can not do what it was asked to: one line on stderr, and a status."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from unitoken.common.errors import ConfigError, DataError, is_transient, one_line
from unitoken.common.files import own_temporary_folder
from unitoken.common.interruption import end_on_signals, keep_status

if TYPE_CHECKING:
    import typer


def printable(text: str) -> str:
    """For a terminal: a file's name may hold line breaks and what colours or clears the screen."""
    return "".join(one if one.isprintable() else "?" for one in text)


def report(text: str) -> None:
    """Print a result on stdout, at once, also where that is a file or a pipe."""
    print(text, flush=True)


def notify(text: str) -> None:
    """Print on stderr what goes with a result: how far a program is, what it repaired."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    notify(f"warning: {text}")


@contextlib.contextmanager
def one_line_errors(goes_on: str = "") -> Iterator[None]:
    """A mistake of the user's (`ConfigError`) ends with status 2; a disk, a store, a shard or memory that fails with 1.

    Args:
        goes_on: said where the failure may pass, and after a signal, as `the same command goes on from here`. Not of what
            lasts: a wrong secret.
    """
    if goes_on:
        end_on_signals(f"interrupted; {goes_on}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a path that is not UTF-8, a terminal that knows ASCII alone
    try:
        yield
    except ConfigError as error:
        status, words = 2, str(error)
    except (OSError, MemoryError, DataError) as error:
        status, words = 1, _with_hint(error, goes_on)
    else:
        return
    keep_status(status)
    notify(f"error: {printable(words)}")
    raise SystemExit(status)


def command_app(description: str | None, add_completion: bool = False) -> typer.Typer:
    """Make the Typer application of a program from its module's docstring, which says how to run it.

    Options are written with dashes; with underscores, as the reference writes them, they are understood too.
    """
    import typer  # 0.08 s, and training does without it

    # click keeps the lines of a paragraph that begins with \b.
    return typer.Typer(
        help=(description or "").replace("\n\n    ", "\n\n\b\n    "),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        add_completion=add_completion,
        context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
    )


def run_program(app: typer.Typer, name: str) -> None:
    """Run a Typer application as a whole program, with a temporary folder of its own.

    Args:
        app: the application.
        name: how the program is started, for its help.
    """
    with one_line_errors():
        own_temporary_folder()
    app(prog_name=name)


def _with_hint(error: Exception, goes_on: str) -> str:
    words = "out of memory" if isinstance(error, MemoryError) and not str(error) else one_line(error)
    return f"{words}; {goes_on}" if goes_on and is_transient(error) else words
