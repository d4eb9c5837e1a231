"""Finds the files of an image tokenizer and reads its shape without torch, which is loaded after all checks.

chameleon   Meta's layout: `vqgan.yaml` beside `vqgan.ckpt` (or .safetensors)
emu3 janus  transformers': `config.json` and `*.safetensors`, of the image tokenizer or of the whole model
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pydantic
import yaml

from unitoken.codec.config import FOLDERS_BEGIN_WITH, ImageTokenizerConfig, how_to_get
from unitoken.common.config import first_problem
from unitoken.common.errors import ConfigError, one_line
from unitoken.common.hashing import sha256_of_file
from unitoken.dataset.manifest import VisionTokenizer

WEIGHTS_SUFFIXES = (".safetensors", ".ckpt")
"""In the order of preference."""
TENSOR_PREFIXES = ("", "vqmodel.", "model.vqmodel.")
"""What the names of the image tokenizer's tensors begin with in transformers' files."""
CODEBOOK = "quantize.embedding.weight"
CONVERTED_FROM, CONVERTED_TO = "converted_from", "converted_to"
"""Keys in the header of a converted file: the fingerprint of the original, and the hash of the tensors."""


class EncoderSizes(pydantic.BaseModel):
    """`ddconfig` of a VQGAN: the sizes of encoder and decoder. Other keys (losses) are for its training."""

    double_z: bool = False
    z_channels: int
    resolution: int
    in_channels: int = 3
    out_ch: int = 3
    ch: int
    ch_mult: list[int]
    num_res_blocks: int
    attn_resolutions: list[int] = []
    dropout: float = 0.0

    @pydantic.field_validator("ch")
    @classmethod
    def _groups(cls, value: int) -> int:
        if value % 32:
            raise ValueError("must be a multiple of 32, the number of groups that are normalised")
        return value

    @pydantic.field_validator("attn_resolutions")
    @classmethod
    def _attention(cls, value: list[int]) -> list[int]:
        if value:
            raise ValueError("attention outside the middle block is not supported, it must be []")
        return value


class Parameters(pydantic.BaseModel):
    """`model.params` of a VQGAN's YAML."""

    embed_dim: int
    n_embed: int
    ddconfig: EncoderSizes


class Emu3Sizes(pydantic.BaseModel):
    """The part of Emu3's configuration that we need; transformers leaves out values that are its defaults."""

    codebook_size: int = 32768
    channel_multiplier: list[int] = [1, 2, 2, 4]


class JanusSizes(pydantic.BaseModel):
    """The part of Janus' configuration that we need; transformers leaves out values that are its defaults."""

    codebook_size: int = pydantic.Field(16384, alias="num_embeddings")
    channel_multiplier: list[int] = [1, 1, 2, 2, 4]


@dataclass(frozen=True)
class Weights:
    """An image tokenizer's files and its shape; the tensors are not read yet."""

    file: Path
    """The file with the tensors (chameleon), or the folder (emu3, janus)."""
    shape: Parameters | Mapping[str, Any]
    """The network's sizes."""
    tensors: Mapping[str, tuple[Path, str]]
    """The file of each tensor and its name there; empty for chameleon, where all tensors are in `file`."""
    codebook_size: int
    downsampling: int
    """Pixels per latent, in each direction."""
    fingerprint: str

    def describe(self, config: ImageTokenizerConfig) -> VisionTokenizer:
        """Return the entry for a dataset's manifest."""
        return VisionTokenizer(
            kind=config.kind,
            weights=self.fingerprint,
            codebook_size=self.codebook_size,
            downsampling=self.downsampling,
            precision=config.precision,
        )


def find_image_tokenizer(config: ImageTokenizerConfig) -> Weights:
    """Find an image tokenizer: a folder, a hub id, or (chameleon) a weights file with its .yaml beside it.

    Raises:
        ConfigError: a file is missing, cannot be read, or is of another kind.
    """
    path = Path(config.weights)
    if config.kind == "chameleon":
        patterns = ["vqgan.*"]
    else:
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    if not path.exists():
        path = _from_hub(config.weights, patterns)
    if config.kind == "chameleon":
        return _find_chameleon(config.weights, path)
    return _find_transformers(config, path)


def _from_hub(name: str, patterns: list[str]) -> Path:
    if name.count("/") != 1 or name.startswith(FOLDERS_BEGIN_WITH):
        raise ConfigError(f"vision.weights: {name}: no such file or folder{how_to_get(name)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # errors of the hub, the network and the cache have no common base
        raise ConfigError(
            f"vision.weights: {name}: no such folder here, and the hub says: {one_line(error, 200)}"
        ) from None


# --- Meta's layout ------------------------------------------------------------------------------------------


def _find_chameleon(name: str, path: Path) -> Weights:
    if path.is_dir():
        files = [file for suffix in WEIGHTS_SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
        vqgan = [file for file in files if file.stem == "vqgan"] or files
        if not vqgan or (path / "config.json").exists():
            found = "transformers' config.json" if (path / "config.json").exists() else "none of them"
            raise ConfigError(
                f"vision.weights: {name}: kind chameleon needs vqgan.yaml and vqgan.ckpt "
                f"or vqgan.safetensors in it, found {found}"
            )
        path = vqgan[0]
    if path.suffix not in WEIGHTS_SUFFIXES:
        endings = " or ".join(WEIGHTS_SUFFIXES)
        raise ConfigError(f"vision.weights: {name}: expected a file that ends in {endings}")
    parameters = read_parameters(path.with_suffix(".yaml"))
    downsampling = 1 << (len(parameters.ddconfig.ch_mult) - 1)
    return Weights(path, parameters, {}, parameters.n_embed, downsampling, _file_fingerprint(path))


def _file_fingerprint(path: Path) -> str:
    """Return the fingerprint of a file, or of its original if it was converted and has not changed since."""
    if path.suffix == ".safetensors":
        try:
            with open(path, "rb") as stream:
                metadata = read_safetensors_header(stream)[0].get("__metadata__", {})
            if CONVERTED_FROM in metadata and metadata.get(CONVERTED_TO) == data_sha256(path):
                return str(metadata[CONVERTED_FROM])
        except (OSError, ValueError, AttributeError):
            pass  # not a safetensors file: the error comes when it is read
    return sha256_of_file(path)[:16]


def read_safetensors_header(stream: BinaryIO) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file: eight bytes for its length, then JSON.

    This is not `safetensors.safe_open` because fingerprints are over the tensors' bytes. safe_open tells no
    offsets, and without torch it returns no tensors in bfloat16, which numpy lacks.

    Returns:
        The header, and the offset at which the tensors begin.

    Raises:
        ValueError: this is not a safetensors file.
    """
    size = int.from_bytes(stream.read(8), "little")
    if size > os.fstat(stream.fileno()).st_size:
        raise ValueError("its header is longer than the file")
    header = json.loads(stream.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, 8 + size


def data_sha256(path: Path) -> str:
    """Return the SHA-256 of a safetensors file's tensors, without its header."""
    with open(path, "rb") as stream:
        stream.seek(read_safetensors_header(stream)[1])
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_parameters(path: Path) -> Parameters:
    """Read the shape of a VQGAN from Meta's YAML.

    Raises:
        ConfigError: there is no such file, or it is not a VQGAN's.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Parameters.model_validate(content["model"]["params"])
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the shape of the image tokenizer: {error.strerror}") from None
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: model.params.{first_problem(error)}") from None
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise ConfigError(f"{path}: expected a VQGAN's YAML with model.params.ddconfig") from None


# --- transformers' layout -----------------------------------------------------------------------------------


def _find_transformers(config: ImageTokenizerConfig, folder: Path) -> Weights:
    shape = _read_shape(config.kind, folder)
    try:
        sizes = (Emu3Sizes if config.kind == "emu3" else JanusSizes).model_validate(shape)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{folder / 'config.json'}: {first_problem(error)}") from None
    spans = _tensor_spans(folder)
    prefix = next((prefix for prefix in reversed(TENSOR_PREFIXES) if prefix + CODEBOOK in spans), None)
    if prefix is None:
        names = " or ".join(prefix + CODEBOOK for prefix in TENSOR_PREFIXES)
        raise ConfigError(f"vision.weights: {folder}: no tensor {names} in it")
    ours = {name.removeprefix(prefix): span for name, span in spans.items() if name.startswith(prefix)}
    return Weights(
        file=folder,
        shape=shape,
        tensors={name: (span.file, prefix + name) for name, span in ours.items()},
        codebook_size=sizes.codebook_size,
        downsampling=1 << (len(sizes.channel_multiplier) - 1),
        fingerprint=_fingerprint(ours),
    )


def _read_shape(kind: str, folder: Path) -> Mapping[str, Any]:
    """Read the image tokenizer's part of `config.json`."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"vision.weights: {folder}: kind {kind} needs config.json in it: {error.strerror}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type not in (kind, f"{kind}_vqgan"):
        raise ConfigError(
            f"{path}: kind {kind} needs model_type {kind!r} or '{kind}_vqgan', found {model_type!r}"
        )
    shape = content.get("vq_config", {}) if model_type == kind else content
    if not isinstance(shape, dict):
        raise ConfigError(f"{path}: vq_config: expected an object, found {type(shape).__name__}")
    return shape


@dataclass(frozen=True)
class _TensorSpan:
    """The bytes of a tensor in a safetensors file."""

    file: Path
    start: int
    end: int
    described: str
    """Element type and shape."""


def _tensor_spans(folder: Path) -> dict[str, _TensorSpan]:
    """Find all tensors in the safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"vision.weights: {folder}: no *.safetensors in it")
    spans: dict[str, _TensorSpan] = {}
    for file in files:
        try:
            with open(file, "rb") as stream:
                header, begin = read_safetensors_header(stream)
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = (begin + offset for offset in entry["data_offsets"])
                    spans[name] = _TensorSpan(file, start, end, f"{entry['dtype']} {entry['shape']}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"vision.weights: {file}: cannot be read as safetensors: {error}") from None
    return spans


def _fingerprint(spans: Mapping[str, _TensorSpan]) -> str:
    """Hash the image tokenizer's tensors alone, names and bytes.

    So the fingerprint is the same for a whole model, of which they are one hundredth, and for a folder of
    their own.
    """
    digest = hashlib.sha256()
    for name, span in sorted(spans.items()):
        digest.update(f"{name} {span.described}\n".encode())
        with open(span.file, "rb") as stream:
            stream.seek(span.start)
            digest.update(stream.read(span.end - span.start))
    return digest.hexdigest()[:16]
