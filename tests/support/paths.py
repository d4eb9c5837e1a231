"""The folders of the repository and of the tests' files."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
DATA = TESTS / "data"
GOLDEN = DATA / "golden"
