"""The JSON Schema of a stage's YAML file, for editors.

    unitoken-schema yamls/stage.schema.json         without an argument, print it

A YAML file names its schema in the first line: `# yaml-language-server: $schema=stage.schema.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from unitoken.common.cli import one_line_errors
from unitoken.common.schema import write_schema
from unitoken.train.config import StageConfig

TITLE = "A stage of training"


def main(arguments: list[str] | None = None) -> None:
    """Run the program; `arguments` default to those of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        raise SystemExit(0 if len(arguments) == 1 else 2)
    with one_line_errors():
        write_schema(StageConfig, TITLE, Path(arguments[0]) if arguments else None)


if __name__ == "__main__":
    main()
