"""The entry point of the command `unitoken`."""

from __future__ import annotations

from unitoken.common.interruption import install_handlers


def start() -> None:
    """Run the command line as a program; signals are handled before anything else is imported."""
    install_handlers("interrupted")
    from unitoken.commands.app import app
    from unitoken.common.cli import run_program

    run_program(app, "unitoken")
