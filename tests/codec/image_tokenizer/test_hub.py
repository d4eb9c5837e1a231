"""An image tokenizer on the hub: of a whole model, only the files that hold it are downloaded."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest

from support.tokenizing import encoder_alone, tiny_transformers, vision_config, whole_model
from unitoken.codec.image_tokenizer.files import find_image_tokenizer
from unitoken.common.errors import ConfigError

WHOLE = ["config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]


def serve(monkeypatch: pytest.MonkeyPatch, repository: Path, cache: Path) -> None:
    """Replace the hub by a folder; `cache` gets what is downloaded from it."""

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        for path in sorted(repository.rglob("*")):
            file = str(path.relative_to(repository))
            if path.is_file() and any(fnmatch(file, pattern) for pattern in allow_patterns):
                (cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / file)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


def downloaded(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["chameleon", "emu3", "janus"])
def test_of_a_whole_model_only_the_needed_files_are_downloaded(
    vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    alone = tmp_path / "alone"
    alone = encoder_alone(vqgan, alone) if kind == "chameleon" else tiny_transformers(alone, kind)
    serve(monkeypatch, whole_model(alone, tmp_path / "whole", kind), tmp_path / "cache")
    found = find_image_tokenizer(vision_config("owner/name", kind=kind))
    assert downloaded(tmp_path / "cache") == WHOLE
    assert found.fingerprint == find_image_tokenizer(vision_config(alone, kind=kind)).fingerprint


def test_a_model_in_one_file_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, tiny_transformers(tmp_path / "janus", "janus"), tmp_path / "cache")
    assert find_image_tokenizer(vision_config("owner/name", kind="janus")).codebook_size == 64
    assert downloaded(tmp_path / "cache") == ["config.json", "model.safetensors"]


def test_metas_files_on_the_hub_are_all_that_is_downloaded(
    vqgan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_model(encoder_alone(vqgan, tmp_path / "alone"), tmp_path / "whole", "chameleon")
    shutil.copytree(vqgan, whole / "original_tokenizers")
    serve(monkeypatch, whole, tmp_path / "cache")
    found = find_image_tokenizer(vision_config("owner/name"))
    assert found.has_decoder
    assert found.fingerprint == find_image_tokenizer(vision_config(vqgan)).fingerprint
    assert downloaded(tmp_path / "cache") == [
        "original_tokenizers/vqgan.safetensors",
        "original_tokenizers/vqgan.yaml",
    ]


def test_another_layout_is_refused_before_its_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_model(tiny_transformers(tmp_path / "a", "janus"), tmp_path / "whole", "multi_modality")
    serve(monkeypatch, whole, tmp_path / "cache")
    with pytest.raises(ConfigError, match="name deepseek-community/Janus-Pro-1B"):
        find_image_tokenizer(vision_config("owner/name", kind="janus"))
    assert downloaded(tmp_path / "cache") == ["config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("kind", "needed"), [("chameleon", "needs vqgan.yaml"), ("janus", "needs config.json")]
)
def test_an_empty_repository_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, needed: str
) -> None:
    (tmp_path / "empty").mkdir()
    serve(monkeypatch, tmp_path / "empty", tmp_path / "cache")
    with pytest.raises(ConfigError, match=needed):
        find_image_tokenizer(vision_config("owner/name", kind=kind))


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        '{"weight_map": {"lm_head.weight": "a"}}',
        '{"weight_map": 3}',
        '{"weight_map": {"quantize.embedding.weight": 3}}',
    ],
)
def test_an_index_that_is_none_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps({"model_type": "janus"}))
    (tmp_path / "hub" / "model.safetensors.index.json").write_text(index)
    serve(monkeypatch, tmp_path / "hub", tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"not readable as an index|names no tensor") as error:
        find_image_tokenizer(vision_config("owner/name", kind="janus"))
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Cannot reach the hub\nand here is how to debug it")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        ConfigError, match="owner/name: no such folder here, and the hub says: Cannot reach"
    ) as error:
        find_image_tokenizer(vision_config("owner/name"))
    assert "\n" not in str(error.value)
