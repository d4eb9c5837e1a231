"""Fixtures that every test file may use."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """The part of the outputs recorded from the reference that the suite needs (assets/ and dev/)."""
    return Path(__file__).parent / "data" / "golden"
