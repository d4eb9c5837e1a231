"""Fixtures that several test files of the tokenizer share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from support.tokenizing import picture, run_here, settings, turns, write_items
from unitoken.tokenize.merge import merge


@pytest.fixture(scope="module")
def dataset_with_rejects(vqgan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten items in chunks of four: every second one lacks its image, item 9 has no turns."""
    folder = tmp_path_factory.mktemp("rejects")
    items: list[dict[str, Any]] = [
        {"conversations": turns("<|image|>", f"n {n}"), "image": f"{n}.png"} for n in range(10)
    ]
    items[9] = {"conversations": []}
    for n in range(1, 10, 2):
        picture(folder / f"{n}.png", n)
    run_here(settings(vqgan), write_items(folder, items), folder / "out")
    merge(str(folder / "out"))
    return folder


@pytest.fixture
def folder(dataset_with_rejects: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_with_rejects, tmp_path / "copy"))
