"""SHA-256: short fingerprints, and hashes of whole files."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(data: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of `data`: enough to identify datasets and weights."""
    return hashlib.sha256(data).hexdigest()[:16]


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
