"""Fixtures that every test file may use."""

import multiprocessing
import os
from pathlib import Path

# Set before torch is imported. Tests run on CPUs even where there are GPUs, so that they test the same
# everywhere. CUDA_VISIBLE_DEVICES=0 pytest -m gpu runs the tests for GPUs.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest

from support.paths import GOLDEN


def pytest_sessionfinish() -> None:
    """Kill processes that a failed test left hanging, as the interpreter would wait for them at its exit.

    It ends daemons itself; if a loader's worker were killed here, an error would be raised somewhere else.
    """
    for child in multiprocessing.active_children():
        if not child.daemon:
            child.kill()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The outputs recorded from the reference that the tests need (assets/ and dev/)."""
    return GOLDEN


@pytest.fixture(scope="session")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny image tokenizer: random weights, 64 codes, 4 pixels a latent."""
    from support.tokenizing import tiny_vqgan

    return tiny_vqgan(tmp_path_factory.mktemp("weights") / "vqgan")
