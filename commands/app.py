"""From conversations with images to a trained model that reads and draws.

    unitoken init my && cd my
    unitoken tokenize --in-filename items.json --out-dir data/cats
    unitoken plan yamls/stage1.yaml
    unitoken train yamls/stage1.yaml -n 8
    unitoken generate runs/stage1 --prompt "Draw a cat." --out drawings
    unitoken chat runs/stage1

`unitoken COMMAND --help` shows the options of a command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from unitoken.commands.init import init
from unitoken.commands.schema import schema
from unitoken.commands.train import train
from unitoken.commands.weights import weights
from unitoken.common.cli import command_app, report
from unitoken.streaming_data import __main__ as mixtures
from unitoken.tokenize import __main__ as datasets
from unitoken.train import __main__ as models

app = command_app(__doc__, add_completion=True)

# In the order of the data's road.
COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "weights": weights,
    "tokenize": datasets.run,
    "merge": datasets.merge,
    "verify": datasets.verify,
    "preview": datasets.preview,
    "rejects": datasets.rejects,
    "migrate": datasets.migrate,
    "convert-vqgan": datasets.convert_vqgan,
    "plan": mixtures.plan,
    "simulate": mixtures.simulate,
    "convert-config": mixtures.convert_config,
    "export-webdataset": mixtures.export_webdataset,
    "plan-memory": models.plan_memory,
    "check": models.check,
    "train": train,
    "report": models.report_runs,
    "generate": models.generate,
    "chat": models.chat,
    "evaluate": models.evaluate,
    "export": models.export,
    "schema": schema,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        report(f"unitoken-streaming {version('unitoken-streaming')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""
