"""Check that weights are the bytes that were written: training on a flipped bit raises no error."""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unitoken.common.cli import notify
from unitoken.common.errors import ConfigError, one_line
from unitoken.common.hashing import sha256_of_file
from unitoken.train.checkpoint.sharded_index import NOTIFY_BYTES, find_damage_in_files

if TYPE_CHECKING:
    from torch import Tensor

READ_BYTES = 1 << 24


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with the bytes of a checkpoint, or None; all of them are read.

    A whole-file checkpoint is a zip archive with a CRC-32 of each file in it, which torch does not check.
    """
    if checkpoint.is_dir():
        return find_damage_in_files(checkpoint)
    try:
        size = checkpoint.stat().st_size
        if size > NOTIFY_BYTES:
            notify(f"{checkpoint}: reading {size / 1e9:.0f} GB to check for damage")
        with zipfile.ZipFile(checkpoint) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    while file.read(READ_BYTES):
                        pass
    except Exception as error:  # zipfile raises a dozen kinds for a file that is not a zip archive
        return one_line(error)
    return None


def check_checkpoint(checkpoint: Path) -> None:
    """Raise ConfigError if a checkpoint is damaged."""
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ConfigError(f"{checkpoint}: damaged: {damage}")


def compute_digests(folder: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests for an export's mark.

    Args:
        folder: the folder of the export, complete but for its config.json.
        fields: the content of config.json without the mark.

    Returns:
        The SHA-256 of each file by its path in the folder, and of `fields` by the empty string.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files}
    return digests | {"": _digest_of_fields(fields)}


def _digest_of_fields(fields: Mapping[str, Any]) -> str:
    without_mark = {key: value for key, value in fields.items() if key != "unitoken"}
    return hashlib.sha256(json.dumps(without_mark, sort_keys=True).encode()).hexdigest()


def check_small_files(folder: Path, fields: Mapping[str, Any]) -> None:
    """Raise ConfigError if any file of an exported folder but its tensors was changed.

    Args:
        folder: the exported folder; older exports have no digests and are not checked.
        fields: the content of its config.json.
    """
    expected = _expected_digests(fields)
    if expected and _digest_of_fields(fields) != expected.get(""):
        raise ConfigError(f"{folder / 'config.json'}: it was changed since it was exported")
    for name in expected:
        if name and not name.endswith(".safetensors"):
            _check_digest(folder / name, expected[name])


def check_tensor_file(path: Path) -> None:
    """Raise ConfigError if a safetensors file of an exported folder was changed; others are not checked."""
    for folder in (path.parent, path.parent.parent):  # the tower's files are in a folder of their own
        try:
            fields = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            continue  # the reader of config.json reports a broken file
        expected = _expected_digests(fields).get(path.relative_to(folder).as_posix())
        if expected:
            _check_digest(path, expected)


def _expected_digests(fields: Any) -> dict[str, str]:
    """Return the digests in the mark of a config.json; empty without a mark."""
    mark = fields.get("unitoken") if isinstance(fields, dict) else None
    digests = mark.get("sha256") if isinstance(mark, dict) else None
    if not isinstance(digests, dict):
        return {}
    return {str(name): str(digest) for name, digest in digests.items()}


def _check_digest(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: this file of the export is missing")
    status = path.stat()
    if _cached_digest(path, status.st_mtime_ns, status.st_size) != expected:
        raise ConfigError(f"{path}: it was changed or damaged since it was exported: its SHA-256 differs")


@functools.lru_cache(maxsize=256)
def _cached_digest(path: Path, modified: int, size: int) -> str:  # noqa: ARG001 - they tell versions of a file apart
    return sha256_of_file(path)


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise ConfigError with the name of the first tensor that holds NaN or infinity.

    Args:
        tensors: names and tensors.
        where: the file, for the message.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConfigError(f"{where}: the tensor {name} holds NaN or infinite numbers")
