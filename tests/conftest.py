"""Fixtures that every test file may use."""

import multiprocessing
import os
from pathlib import Path

# Before torch is imported: tests run on CPUs, also where there are GPUs, so that they test the same everywhere.
# CUDA_VISIBLE_DEVICES=0 pytest -m gpu runs those that are for GPUs.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest

from support.paths import GOLDEN


def pytest_sessionfinish() -> None:
    """A process that a failed test left hanging: at its exit the interpreter would wait for it for ever.

    Daemons it ends itself; killed here, a loader's worker would be an error in the middle of whatever comes next.
    """
    for child in multiprocessing.active_children():
        if not child.daemon:
            child.kill()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The part of the outputs recorded from the reference that the suite needs (assets/ and dev/)."""
    return GOLDEN


@pytest.fixture(scope="session")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny image tokenizer: random weights, 64 codes, 4 pixels a latent."""
    from support.tokenizing import tiny_vqgan

    return tiny_vqgan(tmp_path_factory.mktemp("weights") / "vqgan")
