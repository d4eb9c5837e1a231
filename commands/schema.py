"""`unitoken schema`: the JSON Schemas that let editors complete and check the YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from unitoken.common.cli import one_line_errors


def schema(
    settings: Annotated[Literal["stage", "tokenize", "suite"], typer.Argument(help="Which YAML files.")],
    out: Annotated[
        Path | None, typer.Argument(help="The file to write; without it the schema is printed.")
    ] = None,
) -> None:
    """Write the JSON Schema of a YAML file, for editors.

    A YAML file names its schema in its first line: `# yaml-language-server: $schema=stage.schema.json`.
    """
    with one_line_errors():
        from unitoken.common.schema import write_schema

        if settings == "stage":
            from unitoken.train.config import StageConfig

            write_schema(StageConfig, "A stage of training", out)
        elif settings == "suite":
            from unitoken.train.evaluation.config import Suite

            write_schema(Suite, "A suite of tasks to evaluate a model on", out)
        else:
            from unitoken.tokenize.config import TokenizeConfig

            write_schema(TokenizeConfig, "A tokenization", out)
