"""YAML files and `a.b=c` overrides -> strict, frozen settings.

    settings = load_config(TokenizeConfig, "yamls/tokenize/chameleon.yaml", ["vision.batch_size=8"])

There are only these two ways in. An unknown key, a wrong type or a missing value is a `ConfigError` that
names the file, the key and what is needed; command lines print it as one line and exit 2 (command_line.py).
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml

from unitoken.common.errors import ConfigError

# Bounds that no real run comes near, so that a slip of the hand is an error at the start: 10**12 epochs, a rate of 1e308.
Name = Annotated[str, pydantic.Field(min_length=1, max_length=4096)]  # of a file, a folder, a hub id
Count = Annotated[int, pydantic.Field(gt=0, le=10**6)]  # processes, steps, pixels, layers
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**63)]


class Config(pydantic.BaseModel):
    """Base of all settings: frozen, and a key it does not know is an error."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def also_text(pattern: str) -> pydantic.WithJsonSchema:
    """For the JSON Schema of a number that may be written as text, too, which a validator turns into the number."""
    number = {"type": "integer", "exclusiveMinimum": 0}
    return pydantic.WithJsonSchema({"anyOf": [number, {"type": "string", "pattern": pattern}]})


_BYTES = {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}


def _bytes(value: Any) -> Any:
    """`500gb`, `1.5 TB`, or a plain number of bytes."""
    if isinstance(value, str) and (match := re.fullmatch(r"([\d.]+) *([kmgt]b)", value.strip().lower())):
        try:
            return int(float(match[1]) * _BYTES[match[2]])
        except ValueError:
            return value
    return value


Bytes = Annotated[
    int,
    pydantic.BeforeValidator(_bytes),
    pydantic.Field(gt=0),
    also_text(r"^[0-9.]+ *[kKmMgGtT][bB]$"),
]

ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `3e-4` as a number (YAML 1.1 reads it as text) and refuses a key given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Before `<<: *other` is unfolded, after which a key that overrides another's would be there twice."""
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


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except RecursionError:
        raise ConfigError(f"{where}: not readable as YAML: nested too deeply") from None
    except (
        Exception
    ) as error:  # besides YAMLError whatever int(), float() and datetime() object to: 2024-99-99, !!int x
        raise ConfigError(f"{where}: not readable as YAML: {' '.join(str(error).split())[:300]}") from None


def _override(settings: dict[str, Any], override: str) -> None:
    shown = " ".join(override.split())
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override '{shown}': expected key=value or key.subkey=value")
    for depth, key in enumerate(keys[:-1]):
        below = settings.get(key)
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ConfigError(
                f"override '{shown}': '{'.'.join(keys[: depth + 1])}' is {below!r}, it has no keys of its own"
            )
        settings[key] = dict(below)
        settings = settings[key]
    settings[keys[-1]] = _parse(value, f"override '{shown}'")


def _nested_model(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The settings class inside `X`, `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        if not isinstance(argument, types.NoneType) and (found := _nested_model(argument)):
            return found
    return None


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of what is different in two `flat` settings; one that only one of them has is None in the other."""
    return [name for name in {**then, **now} if then.get(name) != now.get(name)]


def _valid_keys(model: type[pydantic.BaseModel], location: Sequence[str | int]) -> list[str]:
    current: type[pydantic.BaseModel] = model
    for part in location:
        field = current.model_fields.get(str(part))
        if field is not None and (nested := _nested_model(field.annotation)):
            current = nested
    return list(current.model_fields)


# What others call it.
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


def _meant(key: str, valid: Sequence[str], model: type[pydantic.BaseModel]) -> str | None:
    """The key that is probably meant: what others call so, one of this name elsewhere, or one written much like it."""
    everywhere = _dotted_names(model)
    if (other := _OTHER_NAMES.get(key)) in everywhere:
        last = other.rpartition(".")[2]
        return last if last in valid else other
    if found := next((name for name in everywhere if name.rpartition(".")[2] == key), None):
        return found
    if close := difflib.get_close_matches(key, valid, n=1):
        return close[0]
    last_names = {name.rpartition(".")[2]: name for name in reversed(everywhere)}
    close = difflib.get_close_matches(key, last_names, n=1, cutoff=0.75)
    return last_names[close[0]] if close else None


def _describe(
    error: pydantic.ValidationError, model: type[pydantic.BaseModel], where: str, overrides: Sequence[str]
) -> str:
    """One line for the first thing wrong, and how many more there are."""
    errors = error.errors(include_url=False)
    order = {"extra_forbidden": 0, "missing": 2}  # a misspelt key explains the missing one
    first = min(errors, key=lambda e: order.get(e["type"], 1))
    location = ".".join(str(part) for part in first["loc"])
    unknown = first["type"] == "extra_forbidden"
    given = [f"{one.partition('=')[0]}." for one in overrides]
    # Of `optimzer.lr=1` the unknown key is `optimzer`.
    if first["type"] != "missing" and any(
        f"{location}.".startswith(key) or (unknown and key.startswith(f"{location}.")) for key in given
    ):
        where = "on the command line"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if unknown:
        valid = _valid_keys(model, first["loc"][:-1])
        meant = _meant(str(first["loc"][-1]), valid, model)
        hint = f"; did you mean '{meant}'?" if meant else "."
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
    """Read `path` (YAML, or nothing at all), apply `a.b=c` overrides, check.

    Raises:
        ConfigError: one line that names the file, the key, what was found and what is needed.
    """
    if path is None:
        return parse_config(model, "", "settings", overrides)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot read the configuration: {getattr(error, 'strerror', None) or error}"
        ) from None
    return parse_config(model, text, str(path), overrides)


def parse_config(model: type[ConfigT], text: str, where: str, overrides: Sequence[str] = ()) -> ConfigT:
    """As `load_config`, of a text that was read elsewhere: `where`, for messages. Raises ConfigError."""
    settings = _parse(text, where)
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: expected a mapping of keys, found {type(settings).__name__}")
    for override in overrides:
        _override(settings, override)
    try:
        return model.model_validate(settings)
    except pydantic.ValidationError as error:
        raise ConfigError(_describe(error, model, where, overrides)) from None


def first_problem(error: pydantic.ValidationError) -> str:
    """Return the first thing that is wrong with what came from a file, as "field.subfield: what is wrong"."""
    problem = error.errors()[0]
    words = problem["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, problem['loc']))}: {words}" if problem["loc"] else words
