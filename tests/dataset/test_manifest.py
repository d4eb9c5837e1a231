"""The manifest of a dataset folder, and the errors about folders that are not datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import Manifest, load_manifest, load_vocabulary
from unitoken.dataset.vocabulary import Vocabulary

VOCABULARY = Vocabulary.from_tokens({f"t{n}": n for n in range(5)}, codebook_size=4)


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "vocabulary": VOCABULARY.fingerprint,
        "vision": {
            "kind": "chameleon",
            "weights": "0" * 16,
            "codebook_size": 4,
            "downsampling": 16,
            "precision": "fp32",
        },
        "target_size": 512,
        "crop": "square",
        "compat": None,
        "items": 3,
        "samples": 2,
        "rejected": 1,
        "tokens": 9,
        "target_tokens": 4,
        "images": 0,
        "chunks": 1,
        "chunk_size": 10,
        "source": "0" * 16,
        "files": {},
    }
    return Manifest.model_validate(fields | changes)


def test_a_saved_manifest_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest().dump())
    assert load_manifest(tmp_path) == manifest()


def test_counts_must_reconcile() -> None:
    with pytest.raises(ValueError, match="4 items are not 2 samples \\+ 1 rejected"):
        manifest(items=4)


def test_the_vocabulary_must_match_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest().dump())
    VOCABULARY.save(tmp_path / "vocabulary.json")
    assert load_vocabulary(tmp_path) == VOCABULARY
    Vocabulary.from_tokens({"x": 0}, 4).save(tmp_path / "vocabulary.json")
    with pytest.raises(
        ConfigError, match=r"its fingerprint is [0-9a-f]{16}, manifest.json names [0-9a-f]{16}"
    ):
        load_vocabulary(tmp_path)


def test_a_folder_that_is_not_a_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: not a dataset folder: no such folder"):
        load_manifest(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"not a dataset folder: it has no manifest.json$"):
        load_manifest(tmp_path)
    (tmp_path / "chunk-000000").mkdir()
    (tmp_path / "chunk-000000" / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"finish it with `unitoken merge`"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"version": 2}, "expected 'unitoken-dataset' version 1, found 'unitoken-dataset' version 2"),
        ({"format": "x"}, "found 'x' version 1"),
        ({"samples": "many"}, "manifest.json: samples: Input should be a valid integer"),
        ({"samples": 1}, "3 items are not 1 samples"),
        ({"extra": 1}, "manifest.json: extra: Extra inputs"),
    ],
)
def test_a_manifest_with_wrong_fields_is_an_error(
    tmp_path: Path, change: dict[str, object], needed: str
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest().model_dump() | change))
    with pytest.raises(ConfigError, match=needed):
        load_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "3", "\x00"])
def test_a_broken_manifest_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"manifest.json: "):
        load_manifest(tmp_path)
