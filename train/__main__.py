"""What is done with a trained model.

    python -m unitoken.train export runs/stage2 out/model            Hugging Face's layout
    python -m unitoken.train generate out/model --prompt "Draw a cat." --out drawings

Training itself is `composer train.py yamls/stage1.yaml`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from unitoken.streaming_data.config import load_config, one_line_errors

HELP = __doc__.replace("\n\n    ", "\n\n\b\n    ")  # click keeps the lines of a paragraph that begins with \b
app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def main() -> None:
    """A command is named, however many there are."""


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A run's save.folder (its newest checkpoint), or one of its step-*.pt.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; an exported model in its place is replaced.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="The stage's YAML, where the run's folder does not say what it is.")
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp32"], typer.Option("--dtype", help="bf16 as others publish; fp32 keeps the weights to the bit.")
    ] = "bf16",
) -> None:
    """Write a trained model in Hugging Face's layout."""
    with one_line_errors():
        from unitoken.train.config import StageConfig

        stage = load_config(StageConfig, config) if config is not None else None
        from unitoken.train.export import export as write  # torch: seconds

        write(checkpoint, out, dtype, stage)
        print(f"{out}: exported from {checkpoint}")


if __name__ == "__main__":
    app(prog_name="python -m unitoken.train")
