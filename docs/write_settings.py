"""Write docs/settings-*.md: every key of the YAML files with its values, default and meaning.

    python docs/write_settings.py

The classes of the settings are the source: their types, bounds, defaults and docstrings. A test finds pages
that were not written again after a change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unitoken.common.config import Config
from unitoken.tokenize.config import TokenizeConfig
from unitoken.train.config import StageConfig
from unitoken.train.evaluation.config import Suite

DOCS = Path(__file__).parent
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
LARGE = 10**6  # upper bounds from here on only keep numbers within what a computer can hold
PATTERNS = {"ep$": "`1ep`, `1000ba` or `1000000tok`", "(ep|ba|tok)$": "`0.01ep`, `100ba` or `1000000tok`"}

Schema = Mapping[str, Any]

PAGES: dict[str, tuple[type[Config], str, str]] = {
    "settings-stage.md": (
        StageConfig,
        "Settings of a stage",
        "The keys of a YAML file for `unitoken train`. Each can be set on the command line, too: "
        "`optimizer.lr=1e-4`, `'data.streams={cats: {local: data/cats}}'`. [Train](train.md) shows how they "
        "are used.",
    ),
    "settings-tokenize.md": (
        TokenizeConfig,
        "Settings of a tokenization",
        "The keys of a YAML file for `unitoken tokenize --config`, also as `key=value` on the command line. "
        "[Your own data](tokenize.md) shows how they are used.",
    ),
    "settings-suite.md": (
        Suite,
        "Settings of a suite",
        "The keys of a YAML file for `unitoken evaluate --suite`. [Evaluation](evaluation.md) shows how they "
        "are used.",
    ),
}


def settings_page(model: type[Config], title: str, about: str) -> str:
    """Return a page about the settings of a YAML file, in Markdown."""
    schema = model.model_json_schema()
    sections = "\n".join(_sections(schema, schema["$defs"], ""))
    return f"# {title}\n\n{about} A key without a default has to be given.\n\n{sections}"


def _sections(schema: Schema, classes: Schema, prefix: str) -> Iterator[str]:
    """Yield a table of a class' keys, and then those of the classes inside it."""
    required = schema.get("required", [])
    inner: list[tuple[str, Schema]] = []
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    for key, field in schema["properties"].items():
        found = list(_inner(field, classes))
        inner += [(f"{prefix}{key}{suffix}", found_schema) for suffix, found_schema in found]
        default = "" if key in required else _default(field.get("default"))
        # pydantic leaves out a description that is the class' own
        described = [each["description"] for each in (field, *dict(found).values()) if "description" in each]
        meaning = " ".join(described[0].split()) if described else ""
        yield f"| `{key}` | {_values(field, classes)} | {default} | {_cell(meaning)} |"
    yield ""
    for name, found_schema in inner:
        about = " ".join(found_schema.get("description", "").split())
        yield f"## `{name}`\n\n{about}\n"
        yield from _sections(found_schema, classes, f"{name}.")


def _inner(field: Schema, classes: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield the classes in a field, and what stands between them and its name."""
    for variant in field.get("anyOf", [field]):
        if "$ref" in variant:
            yield "", _class(variant, classes)
        for values, suffix in ((_named_values(variant), ".NAME"), (variant.get("items", {}), "[]")):
            if "$ref" in values:
                yield suffix, _class(values, classes)


def _named_values(variant: Schema) -> Schema:
    """Return the schema of what stands under names of the user's choice."""
    patterns = variant.get("patternProperties")
    found = next(iter(patterns.values())) if patterns else variant.get("additionalProperties")
    return found if isinstance(found, dict) else {}


def _class(reference: Schema, classes: Schema) -> Schema:
    found: Schema = classes[reference["$ref"].rpartition("/")[2]]
    return found


def _values(field: Schema, classes: Schema) -> str:
    """Return what a key may hold, as a cell."""
    variants = field.get("anyOf") or field.get("oneOf") or [field]
    texts = [_value(variant, classes) for variant in variants if variant.get("type") != "null"]
    nullable = any(variant.get("type") == "null" for variant in variants)
    return _cell(" or ".join(dict.fromkeys(texts + (["null"] if nullable else []))))


def _value(variant: Schema, classes: Schema) -> str:
    if "$ref" in variant:
        return (
            "keys" if "properties" in _class(variant, classes) else _value(_class(variant, classes), classes)
        )
    if "enum" in variant:
        return ", ".join(f"`{value}`" for value in variant["enum"])
    if "const" in variant:
        return f"`{variant['const']}`"
    kind = variant.get("type")
    if kind in ("integer", "number"):
        return _number(variant)
    if kind == "array":
        items = variant.get("prefixItems")
        if items:
            return f"[{', '.join(_value(item, classes) for item in items)}]"
        return f"list of {_value(variant.get('items', {}), classes)}"
    if kind == "object":
        return f"NAME: {_value(_named_values(variant), classes)}"
    if kind == "string":
        pattern = variant.get("pattern", "")
        return next((text for end, text in PATTERNS.items() if pattern.endswith(end)), "text")
    return {"boolean": "`true`, `false`"}.get(str(kind), "text")


def _number(variant: Schema) -> str:
    """Return a kind of number with its bounds; those that nobody reaches are left out."""
    bounds = [
        f"{words} {variant[name]:g}"
        for name, words in BOUNDS.items()
        if name in variant and abs(variant[name]) < LARGE
    ]
    return " ".join(["whole number" if variant["type"] == "integer" else "number", ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, dict):  # a class whose keys have defaults
        return "" if value else "`{}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write the pages."""
    for name, (model, title, about) in PAGES.items():
        (DOCS / name).write_text(settings_page(model, title, about), encoding="utf-8")


if __name__ == "__main__":
    main()
