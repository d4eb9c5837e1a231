"""The JSON Schemas of YAML files: up to date, named by every file, and consistent with the loader."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from support.paths import ROOT
from unitoken.common.config import Config, load_config
from unitoken.common.errors import ConfigError
from unitoken.common.schema import dump_schema
from unitoken.tokenize.config import TokenizeConfig
from unitoken.train.config import StageConfig

YAMLS = ROOT / "yamls"
TOKENIZATIONS = sorted(YAMLS.glob("tokenize/*.yaml"))
STAGES = sorted([*YAMLS.glob("*.yaml"), *YAMLS.glob("demo/*.yaml")])
SIZES = "{vocab_size: 10, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1}"
FIRST_LINE = "# yaml-language-server: $schema="


def loaded(path: Path) -> Any:
    """Return the content of a YAML file as the program reads it."""
    seen: list[Any] = []

    class Anything(Config):
        @classmethod
        def model_validate(cls, obj: Any, **_: Any) -> Any:
            seen.append(obj)

    load_config(Anything, path)
    return seen[0]


def schema() -> Draft202012Validator:
    return Draft202012Validator(json.loads((YAMLS / "stage.schema.json").read_text()))


def test_the_schemas_in_the_repository_are_up_to_date() -> None:
    """If it fails, run `unitoken schema stage yamls/stage.schema.json`, and the same for tokenize."""
    assert (YAMLS / "stage.schema.json").read_text() == dump_schema(StageConfig, "A stage of training")
    assert (YAMLS / "tokenize" / "tokenize.schema.json").read_text() == dump_schema(
        TokenizeConfig, "A tokenization"
    )


@pytest.mark.parametrize("path", STAGES + TOKENIZATIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_file_names_its_schema_and_fits_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(FIRST_LINE)
    target = (path.parent / first.removeprefix(FIRST_LINE)).resolve()
    assert target == YAMLS / (
        "tokenize/tokenize.schema.json" if path in TOKENIZATIONS else "stage.schema.json"
    )
    validator = Draft202012Validator(json.loads(target.read_text()))
    validator.check_schema(validator.schema)
    assert [error.message for error in validator.iter_errors(loaded(path))] == []


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ("data: {global_batch: 524288tok}", True),
        ("data: {global_batch: 64}", True),
        ("data: {global_batch: many}", False),
        ("data: {cache_limit: 500gb}", True),
        ("data: {cache_limit: 1.5 TB}", True),
        ("data: {cache_limit: 0}", False),
        ("optimizer: {lr: 3e-4}", True),
        ("optimizer: {lr: 1}", True),
        ("optimizer: {lr: 0}", False),
        ("optimizer: {betas: [0.9]}", False),
        ("optimizer: {learning_rate: 1}", False),
        ("optimiser: {lr: 1}", False),
        ("max_duration: 1000000tok", True),
        ("max_duration: 3", False),
        ("activation_checkpointing: 2", True),
        ("activation_checkpointing: selective", True),
        ("activation_checkpointing: auto", True),
        ("activation_checkpointing: some", False),
        ("model: {vision: null}", True),
        (f"model: {{decoder: {SIZES}}}", True),
        ("model: {decoder: {hidden_size: 8}}", False),
        ("init_from: null", True),
        ("trainable: []", False),
        ("data: {streams: {a: {local: x, kinds: [text]}}}", True),
        ("data: {streams: {a: {local: x, kinds: [texts]}}}", False),
        ("{compat: unitoken, data: {continuous: all}}", True),
    ],
)
def test_the_schema_accepts_what_the_loader_accepts(change: str, fits: bool, tmp_path: Path) -> None:
    settings = yaml.safe_load((YAMLS / "stage1.yaml").read_text())
    # safe_load reads 1e-5 as text.
    settings["model"]["z_loss"] = settings["optimizer"]["lr"] = settings["optimizer"]["eps"] = 1e-5
    settings["optimizer"]["lr_scales"] = {"vit": 1e-2}
    (tmp_path / "change.yaml").write_text(change)
    for key, value in loaded(tmp_path / "change.yaml").items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) and key in settings else value
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(settings))
    settings = loaded(tmp_path / "stage.yaml")
    assert list(schema().iter_errors(settings)) is not fits
    try:
        load_config(StageConfig, tmp_path / "stage.yaml")
        accepted = True
    except ConfigError:
        accepted = False
    assert accepted is fits


def test_the_schema_describes_the_settings() -> None:
    """Editors show a field's docstring."""
    schema = json.loads((YAMLS / "stage.schema.json").read_text())
    described = schema["properties"]["activation_checkpointing"]["description"]
    assert described == StageConfig.model_fields["activation_checkpointing"].description
    assert described.endswith("(`auto`; nothing on a CPU).")
    assert schema["$defs"]["ModelConfig"]["properties"]["vision"]["description"].startswith("The same")
