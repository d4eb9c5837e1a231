"""Strict, frozen settings from a YAML file and `a.b=c` overrides.

    settings = load_config(TokenizeConfig, "yamls/tokenize/chameleon.yaml", ["vision.batch_size=8"])

Settings have no other source. An unknown key, a wrong type or a missing value is a `ConfigError` that names
the file, the key and what is expected; commands print it as one line and exit with status 2 (cli.py).
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml

from unitoken.common.errors import ConfigError, one_line
from unitoken.common.missing_paths import where_looked

# The bounds are far above any real run, so that a typo is an error at the start: 10**12 epochs, a rate of
# 1e308.
Name = Annotated[str, pydantic.Field(min_length=1, max_length=4096)]  # of a file, a folder, a hub id
Count = Annotated[int, pydantic.Field(gt=0, le=10**6)]  # of processes, steps, pixels, layers
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**63)]


class Config(pydantic.BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def number_or_text(pattern: str) -> pydantic.WithJsonSchema:
    """Describe, for the JSON Schema, a positive integer that may also be written as text.

    Args:
        pattern: regular expression of the text, which a validator of the field converts to the number.
    """
    number = {"type": "integer", "exclusiveMinimum": 0}
    return pydantic.WithJsonSchema({"anyOf": [number, {"type": "string", "pattern": pattern}]})


_BYTES_OF_UNIT = {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}


def _parse_bytes(value: Any) -> Any:
    """Convert `500gb` or `1.5 TB` to a number of bytes; leave anything else for pydantic to check."""
    if isinstance(value, str) and (match := re.fullmatch(r"([\d.]+) *([kmgt]b)", value.strip().lower())):
        try:
            return int(float(match[1]) * _BYTES_OF_UNIT[match[2]])
        except ValueError:
            return value
    return value


Bytes = Annotated[
    int,
    pydantic.BeforeValidator(_parse_bytes),
    pydantic.Field(gt=0),
    number_or_text(r"^[0-9.]+ *[kKmMgGtT][bB]$"),
]

ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-4` as a number (text in YAML 1.1) and rejects duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Reject duplicates before `<<: *other` is merged in, as overriding a merged key is allowed."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key.value}' is given twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except RecursionError:
        raise ConfigError(f"{where}: not readable as YAML: nested too deeply") from None
    except Exception as error:  # `2024-99-99` and `!!int x` raise errors of datetime() and int()
        raise ConfigError(f"{where}: not readable as YAML: {one_line(error, 300)}") from None


def _apply_override(settings: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in nested settings; copies mappings on the way, as YAML anchors may share them."""
    shown = " ".join(override.split())
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override '{shown}': expected key=value or key.subkey=value")
    for depth, key in enumerate(keys[:-1]):
        child = settings.get(key)
        if child is None:
            child = {}
        if not isinstance(child, dict):
            parent = ".".join(keys[: depth + 1])
            raise ConfigError(f"override '{shown}': '{parent}' is {child!r}, it has no keys of its own")
        settings[key] = dict(child)
        settings = settings[key]
    settings[keys[-1]] = _parse_yaml(value, f"override '{shown}'")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one mapping by dotted name: {"a": {"b": 1}} -> {"a.b": 1}."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            result.update(flatten(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def changed_names(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the names whose values differ in two mappings; a missing name counts as None."""
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def describe_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], names: Iterable[str] | None = None
) -> str:
    """Return what differs between two settings as text, `seed: 0, now 1; data.window: 8, now nothing`.

    Args:
        old: nested settings, for example those that a checkpoint or a dataset folder was made with.
        new: nested settings to compare with `old`, usually those of the current command.
        names: dotted names to compare; None compares all.

    Returns:
        An empty string if nothing differs.
    """
    before, now = flatten(old), flatten(new)
    selected = None if names is None else set(names)
    return "; ".join(
        f"{name}: {before.get(name, 'nothing')}, now {now.get(name, 'nothing')}"
        for name in changed_names(before, now)
        if selected is None or name in selected
    )


def _nested_model(annotation: Any) -> type[pydantic.BaseModel] | None:
    """Return the settings class inside `X`, `X | None` or `dict[str, X]`, or None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        if model := _nested_model(argument):
            return model
    return None


def _valid_keys(model: type[pydantic.BaseModel], location: Sequence[str | int]) -> list[str]:
    """Return the keys that are allowed at a location inside a model."""
    current: type[pydantic.BaseModel] = model
    for part in location:
        field = current.model_fields.get(str(part))
        if field is not None and (nested := _nested_model(field.annotation)):
            current = nested
    return list(current.model_fields)


# What other frameworks call our settings.
_OTHER_NAMES = {
    **dict.fromkeys(("learning_rate", "base_lr", "max_lr"), "optimizer.lr"),
    **dict.fromkeys(("batch_size", "global_batch_size", "train_batch_size"), "data.global_batch"),
    **dict.fromkeys(
        ("micro_batch_size", "per_device_train_batch_size", "device_train_microbatch_size"), "microbatch"
    ),
    **dict.fromkeys(
        ("max_steps", "num_epochs", "epochs", "num_train_epochs", "train_steps", "max_iters"), "max_duration"
    ),
    **dict.fromkeys(
        ("seq_length", "seq_len", "max_seq_len", "max_length", "block_size", "sequence_length"),
        "data.packed_length",
    ),
    **dict.fromkeys(("output_dir", "save_dir", "save_folder", "checkpoint_dir"), "save.folder"),
    **dict.fromkeys(("warmup_steps", "warmup_ratio", "lr_warmup"), "optimizer.warmup"),
    **dict.fromkeys(("gradient_clipping", "max_grad_norm", "grad_clip"), "optimizer.clip_norm"),
    **dict.fromkeys(("num_workers", "dataloader_num_workers"), "data.workers"),
    **dict.fromkeys(("weight", "weights", "sampling_weight", "ratio"), "data.streams.proportion"),
}


def _dotted_names(model: type[pydantic.BaseModel], prefix: str = "") -> list[str]:
    names = []
    for key, field in model.model_fields.items():
        names.append(f"{prefix}{key}")
        if (nested := _nested_model(field.annotation)) and prefix.count(".") < 3:
            names += _dotted_names(nested, f"{prefix}{key}.")
    return names


def _last_part(dotted_name: str) -> str:
    return dotted_name.rpartition(".")[2]


def _suggest_key(key: str, valid: Sequence[str], model: type[pydantic.BaseModel]) -> str | None:
    """Suggest a key for an unknown one.

    In this order: the key that other frameworks call so, a key of this name elsewhere in the settings, a
    valid key with a similar name, a key elsewhere with a very similar name.
    """
    everywhere = _dotted_names(model)
    other = _OTHER_NAMES.get(key)
    if other in everywhere:
        return _last_part(other) if _last_part(other) in valid else other
    for name in everywhere:
        if _last_part(name) == key:
            return name
    if close := difflib.get_close_matches(key, valid, n=1):
        return close[0]
    by_last_part = {_last_part(name): name for name in reversed(everywhere)}
    close = difflib.get_close_matches(key, by_last_part, n=1, cutoff=0.75)
    return by_last_part[close[0]] if close else None


def _is_overridden(location: str, error_type: str, overrides: Sequence[str]) -> bool:
    """Return whether the value at `location` came from the command line and not from the file."""
    if error_type == "missing":
        return False
    for override in overrides:
        key = f"{override.partition('=')[0]}."
        if f"{location}.".startswith(key):
            return True
        # Of `optimzer.lr=1` the unknown key is `optimzer`.
        if error_type == "extra_forbidden" and key.startswith(f"{location}."):
            return True
    return False


def _describe(
    error: pydantic.ValidationError, model: type[pydantic.BaseModel], where: str, overrides: Sequence[str]
) -> str:
    """Return one line about the most telling problem, with the number of further problems."""
    problems = error.errors(include_url=False)
    order = {"extra_forbidden": 0, "missing": 2}  # a misspelt key explains a missing one
    first = min(problems, key=lambda problem: order.get(problem["type"], 1))
    location = ".".join(str(part) for part in first["loc"])
    if _is_overridden(location, first["type"], overrides):
        where = "on the command line"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(model, first["loc"][:-1])
        suggestion = _suggest_key(str(first["loc"][-1]), valid, model)
        hint = f"; did you mean '{suggestion}'?" if suggestion else "."
        if ":" in location:
            hint = ": YAML needs a space after the colon."
        return f"{where}: unknown key '{location}'{hint} Valid keys: {', '.join(valid)}{more}"
    if first["type"] == "missing":
        return f"{where}: the key '{location}' is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    found = "" if isinstance(first["input"], dict | list) else f", found {first['input']!r}"
    if first["type"] == "model_type":
        message = "expected keys and values"
        if isinstance(first["input"], str) and ":" in first["input"]:
            found += ": YAML needs a space after the colon"
    return f"{where}: {'`' + location + '`: ' if location else ''}{message}{found}{more}"


def load_config(model: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read settings from a YAML file, apply overrides, and validate.

    Args:
        model: the class of the settings.
        path: the YAML file; None starts from the defaults.
        overrides: `a.b=c`, with `c` in YAML; later ones win.

    Raises:
        ConfigError: one line that names the file, the key, what was found and what is expected.
    """
    if path is None:
        return parse_config(model, "", "settings", overrides)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = where_looked(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{path}: cannot read the configuration: {reason}{hint}") from None
    return parse_config(model, text, str(path), overrides)


def parse_config(model: type[ConfigT], text: str, where: str, overrides: Sequence[str] = ()) -> ConfigT:
    """Parse settings from YAML text, as `load_config` does from a file.

    Args:
        model: the class of the settings.
        text: the YAML.
        where: the origin of the text, for messages.
        overrides: `a.b=c`, as in `load_config`.

    Raises:
        ConfigError: as `load_config`.
    """
    settings = _parse_yaml(text, where)
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, found {type(settings).__name__}")
    for override in overrides:
        _apply_override(settings, override)
    try:
        return model.model_validate(settings)
    except pydantic.ValidationError as error:
        raise ConfigError(_describe(error, model, where, overrides)) from None


def first_problem(error: pydantic.ValidationError) -> str:
    """Return the first problem of a file that was validated, as `field.subfield: message`."""
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, problem['loc']))}: {message}" if problem["loc"] else message
