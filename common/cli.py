"""The frame of every command: what it prints, and how it ends with one line of error and an exit status."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from unitoken.common.errors import (
    EXIT_FAILURE,
    EXIT_USAGE,
    ConfigError,
    DataError,
    is_transient,
    one_line,
)
from unitoken.common.files import own_temporary_folder
from unitoken.common.interruption import end_on_signals, keep_status

if TYPE_CHECKING:
    import typer

DISTRIBUTION = "unitoken-streaming"


def printable(text: str) -> str:
    """Replace control characters by `?`: a file name may hold line breaks or terminal escape sequences."""
    return "".join(character if character.isprintable() else "?" for character in text)


def short_count(count: int) -> str:
    """Return a number in at most six characters: 12,345 or 12.3M."""
    if count < 100_000:
        return f"{count:,}"
    for scale, letter in ((1e6, "M"), (1e9, "G")):
        if count < 999.5 * scale:
            return f"{count / scale:.3g}{letter}"
    return f"{count / 1e12:.3g}T"


def report(text: str) -> None:
    """Print a result on stdout, unbuffered even if stdout is a file or a pipe."""
    print(text, flush=True)


def notify(text: str) -> None:
    """Print progress or a remark about the run on stderr, so that stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    notify(f"warning: {text}")


@contextlib.contextmanager
def one_line_errors(resume_hint: str = "") -> Iterator[None]:
    """End the command with one line on stderr and an exit status if the block raises an expected error.

    A user's mistake (`ConfigError`) exits with EXIT_USAGE; a failing disk, store, shard or allocation with
    EXIT_FAILURE. All other errors are bugs and keep their traceback.

    Args:
        resume_hint: for example "the same command goes on from here". Appended to the message of a
            transient error and of a signal; not to permanent errors such as a wrong password.
    """
    if resume_hint:
        end_on_signals(f"interrupted; {resume_hint}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A path may not be UTF-8, and a terminal may only know ASCII.
            stream.reconfigure(errors="replace")
    try:
        yield
    except ConfigError as error:
        status, message = EXIT_USAGE, str(error)
    except (OSError, MemoryError, DataError) as error:
        status, message = EXIT_FAILURE, _with_hint(error, resume_hint)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "unitoken":
            raise
        status, message = EXIT_USAGE, missing_package(error.name)
    else:
        return
    keep_status(status)
    notify(f"error: {printable(message)}")
    raise SystemExit(status)


def missing_package(module: str) -> str:
    """Return what to do about a package that is not installed, in one line."""
    from importlib import metadata

    package, extra = module.split(".")[0], ""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for requirement in metadata.requires(DISTRIBUTION) or []:
            if re.split(r"[^\w-]", requirement)[0].replace("-", "_") == package:
                found = re.search(r'extra == "([\w-]+)"', requirement)
                extra = f"[{found[1]}]" if found else ""
                break
    return (
        f"the package {package} is not installed in {sys.prefix}: pip install '{DISTRIBUTION}{extra}', or "
        "use the environment in which it is (source .venv/bin/activate)"
    )


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


def _with_hint(error: Exception, resume_hint: str) -> str:
    message = "out of memory" if isinstance(error, MemoryError) and not str(error) else one_line(error)
    return f"{message}; {resume_hint}" if resume_hint and is_transient(error) else message
