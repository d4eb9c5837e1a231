"""Fixtures that every test file may use."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """The part of the outputs recorded from the reference that the suite needs (assets/ and dev/)."""
    return Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="session")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny image tokenizer: random weights, 64 codes, 4 pixels a latent."""
    from tokenizing import tiny_vqgan

    return tiny_vqgan(tmp_path_factory.mktemp("weights") / "vqgan")
