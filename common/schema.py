"""JSON Schemas of the settings: editors complete and explain the keys of a YAML file and mark mistakes.

A schema does not hold the rules between several settings; only the program checks those.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic.json_schema import GenerateJsonSchema

from unitoken.common.config import Config
from unitoken.common.errors import ConfigError
from unitoken.common.files import write_aside


def dump_schema(model: type[Config], title: str) -> str:
    """Return the JSON Schema of a settings file as text; the fields' docstrings are its descriptions."""
    schema = {"$schema": GenerateJsonSchema.schema_dialect, **model.model_json_schema(), "title": title}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def write_schema(model: type[Config], title: str, out: Path | None) -> None:
    """Write the JSON Schema of a settings file to `out`, or print it if `out` is None.

    Raises:
        ConfigError: the file cannot be written.
    """
    if out is None:
        print(dump_schema(model, title), end="")
        return
    try:
        write_aside(out, dump_schema(model, title).encode())
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
