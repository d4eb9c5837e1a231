"""Settings -> a JSON Schema, so that editors complete the keys of a YAML file, show what they mean and mark mistakes.

Descriptions are the comments beside the settings in the source. What settings say of each other only the program checks.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import textwrap
import tokenize
from pathlib import Path

import pydantic
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from unitoken.common.config import Config
from unitoken.common.errors import ConfigError
from unitoken.common.files import write_aside


class _WithComments(GenerateJsonSchema):
    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        generated = super().model_schema(schema)
        for field, comment in comments_of(schema["cls"]).items():
            generated["properties"][field]["description"] = comment
        return generated


def comments_of(model: type[pydantic.BaseModel]) -> dict[str, str]:
    """Field -> its comment: lines above it that begin with #, and what stands behind it."""
    source = textwrap.dedent(inspect.getsource(model))
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    comments = {token.start[0]: token.string.removeprefix("#").strip() for token in tokens}
    found = {}
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            first, last = statement.lineno, statement.end_lineno or statement.lineno
            while first - 1 in comments and lines[first - 2].lstrip().startswith("#"):
                first -= 1
            words = " ".join(comments[line] for line in range(first, last + 1) if line in comments)
            if words:
                found[statement.target.id] = words
    return found


def dump_schema(model: type[Config], title: str) -> str:
    schema = model.model_json_schema(schema_generator=_WithComments)
    return (
        json.dumps(
            {"$schema": _WithComments.schema_dialect, **schema, "title": title}, indent=1, ensure_ascii=False
        )
        + "\n"
    )


def write_schema(model: type[Config], title: str, out: Path | None) -> None:
    """To a file, or to the standard output. Raises ConfigError."""
    if out is None:
        print(dump_schema(model, title), end="")
        return
    try:
        write_aside(out, dump_schema(model, title).encode())
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
