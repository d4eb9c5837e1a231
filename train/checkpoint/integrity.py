"""Whether the bytes of weights are those that were written: a flipped bit is trained on without a word."""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unitoken.common.errors import ConfigError, one_line
from unitoken.common.hashing import sha256_of_file

if TYPE_CHECKING:
    from torch import Tensor

READ_BYTES = 1 << 24
SAID_BYTES = 1 << 30  # from this size on it takes seconds, and is said


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a `step-*.pt`, or None. All of it is read: a zip has a CRC-32 of each file in it; torch checks none."""
    try:
        if checkpoint.stat().st_size > SAID_BYTES:
            print(
                f"{checkpoint}: reading {checkpoint.stat().st_size / 1e9:.0f} GB to see whether it is whole",
                flush=True,
            )
        with zipfile.ZipFile(checkpoint) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    while file.read(READ_BYTES):
                        pass
    except Exception as error:  # zipfile raises a dozen kinds for what is no zip
        return one_line(error)
    return None


def check_checkpoint(checkpoint: Path) -> None:
    if (found := damage(checkpoint)) is not None:
        raise ConfigError(f"{checkpoint}: damaged: {found}")


def digests(folder: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """For an export's mark: the sha256 of each of its files, and of the fields of its config.json, which holds them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files} | {
        "": _of_fields(fields)
    }


def _of_fields(fields: Mapping[str, Any]) -> str:
    others = {key: value for key, value in fields.items() if key != "unitoken"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def check_small_files(folder: Path, fields: Mapping[str, Any]) -> None:
    """Compare all of an exported folder but its tensors with its mark. Raises ConfigError. Older exports have no digests."""
    expected = _expected(fields)
    if expected and _of_fields(fields) != expected.get(""):
        raise ConfigError(f"{folder / 'config.json'}: it was changed since it was exported")
    for name in expected:
        if name and not name.endswith(".safetensors"):
            _compare(folder / name, expected[name])


def check_tensor_file(path: Path) -> None:
    """Compare a safetensors file with the mark of the folder that it was exported to, if it was. Raises ConfigError."""
    config = path.parent / "config.json"
    try:
        fields = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # of others, or of nobody: whoever needs it says so
    if expected := _expected(fields).get(path.name):
        _compare(path, expected)


def _expected(fields: Any) -> dict[str, str]:
    mark = fields.get("unitoken") if isinstance(fields, dict) else None
    found = mark.get("sha256") if isinstance(mark, dict) else None
    return {str(name): str(digest) for name, digest in found.items()} if isinstance(found, dict) else {}


def _compare(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: it was exported with this file, which is not there")
    status = path.stat()
    if _digest(path, status.st_mtime_ns, status.st_size) != expected:
        raise ConfigError(f"{path}: it was changed or damaged since it was exported: its sha256 is another")


@functools.lru_cache(maxsize=256)
def _digest(path: Path, changed: int, size: int) -> str:  # noqa: ARG001 - what tells a file from an older one of its name
    return sha256_of_file(path)


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raises ConfigError that names the first tensor with a number that is none."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConfigError(f"{where}: the tensor {name} holds NaN or infinite numbers")
