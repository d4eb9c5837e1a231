"""Settings -> a JSON Schema, so that editors complete the keys of a YAML file, show what they mean and mark mistakes.

Rules between several settings are not in it; only the program checks them.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic.json_schema import GenerateJsonSchema

from unitoken.common.config import Config
from unitoken.common.errors import ConfigError
from unitoken.common.files import write_aside


def dump_schema(model: type[Config], title: str) -> str:
    """Return the JSON Schema of a settings file, as text; the fields' docstrings are its descriptions."""
    schema = {"$schema": GenerateJsonSchema.schema_dialect, **model.model_json_schema(), "title": title}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def write_schema(model: type[Config], title: str, out: Path | None) -> None:
    """To a file, or to the standard output. Raises ConfigError."""
    if out is None:
        print(dump_schema(model, title), end="")
        return
    try:
        write_aside(out, dump_schema(model, title).encode())
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
