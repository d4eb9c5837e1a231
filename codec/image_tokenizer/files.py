"""Finds the files of an image tokenizer and reads its shape without torch, which is loaded after all checks.

chameleon   Meta's layout: `vqgan.yaml` beside `vqgan.ckpt` (or .safetensors), also in `original_tokenizers/`;
            or transformers', which has no decoder
emu3 janus  transformers' layout: `config.json` and `*.safetensors`, of the image tokenizer or of the whole
            model; of Emu3 also its authors', BAAI/Emu3-VisionTokenizer
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import pydantic
import yaml

from unitoken.codec.config import ImageTokenizerConfig
from unitoken.codec.image_tokenizer import emu3_names, hub
from unitoken.common.config import first_problem
from unitoken.common.errors import ConfigError
from unitoken.common.hashing import sha256_of_file
from unitoken.dataset.manifest import VisionTokenizer

WEIGHTS_SUFFIXES = (".safetensors", ".ckpt")
"""In the order of preference."""
VQGAN_FOLDERS = (".", "original_tokenizers")
"""Where Meta's files are in a folder; the second is that of facebook/chameleon-7b."""
DECODER = "decoder."
"""What the names of a decoder's tensors begin with."""
OTHER_LAYOUTS = {"multi_modality": "deepseek-community/Janus-Pro-1B", "Emu3": "BAAI/Emu3-Chat-hf"}
"""`model_type` in a model's own repository -> the same model in transformers' layout."""
CONVERTED_FROM, CONVERTED_TO = "converted_from", "converted_to"
"""Keys in the header of a converted file: the fingerprint of the original, and the hash of the tensors."""


def _check_groups(value: int) -> int:
    if value % 32:
        raise ValueError("must be a multiple of 32, the number of groups that are normalised")
    return value


def _check_attention(value: list[int] | None) -> list[int]:
    if value:
        raise ValueError("attention outside the middle block is not supported, it must be []")
    return []


_Groups = Annotated[int, pydantic.AfterValidator(_check_groups)]
_NoAttention = Annotated[list[int] | None, pydantic.AfterValidator(_check_attention)]


class EncoderSizes(pydantic.BaseModel):
    """`ddconfig` of a VQGAN: the sizes of encoder and decoder. Other keys (losses) are for its training."""

    double_z: bool = False
    z_channels: int
    resolution: int
    in_channels: int = 3
    out_ch: int = 3
    ch: _Groups
    ch_mult: list[int]
    num_res_blocks: int
    attn_resolutions: _NoAttention = []
    dropout: float = 0.0


class Parameters(pydantic.BaseModel):
    """`model.params` of a VQGAN's YAML."""

    embed_dim: int
    n_embed: int
    ddconfig: EncoderSizes


class ChameleonSizes(pydantic.BaseModel):
    """Chameleon's configuration in transformers, which leaves out values that are its defaults."""

    embed_dim: int = 256
    codebook_size: int = pydantic.Field(8192, alias="num_embeddings")
    double_latent: bool = False
    latent_channels: int = 256
    resolution: int = 512
    in_channels: int = 3
    base_channels: _Groups = 128
    channel_multiplier: list[int] = [1, 1, 2, 2, 4]
    num_res_blocks: int = 2
    attn_resolutions: _NoAttention = []
    attn_type: Literal["vanilla"] = "vanilla"
    dropout: float = 0.0

    def parameters(self) -> Parameters:
        """Return the same sizes under Meta's names."""
        sizes = EncoderSizes(
            double_z=self.double_latent,
            z_channels=self.latent_channels,
            resolution=self.resolution,
            in_channels=self.in_channels,
            ch=self.base_channels,
            ch_mult=self.channel_multiplier,
            num_res_blocks=self.num_res_blocks,
            dropout=self.dropout,
        )
        return Parameters(embed_dim=self.embed_dim, n_embed=self.codebook_size, ddconfig=sizes)


class Emu3Sizes(pydantic.BaseModel):
    """The part of Emu3's configuration that we need; transformers leaves out values that are its defaults."""

    codebook_size: int = 32768
    base_channels: int = 256
    channel_multiplier: list[int] = [1, 2, 2, 4]


class JanusSizes(pydantic.BaseModel):
    """The part of Janus' configuration that we need; transformers leaves out values that are its defaults."""

    codebook_size: int = pydantic.Field(16384, alias="num_embeddings")
    channel_multiplier: list[int] = [1, 1, 2, 2, 4]


SIZES: Mapping[str, type[ChameleonSizes | Emu3Sizes | JanusSizes]] = {
    "chameleon": ChameleonSizes,
    "emu3": Emu3Sizes,
    "janus": JanusSizes,
}
"""How transformers' configuration of each kind is read."""


@dataclass(frozen=True)
class Weights:
    """An image tokenizer's files and its shape; the tensors are not read yet."""

    file: Path
    """The file with the tensors (Meta's layout), or the folder (transformers')."""
    shape: Parameters | Mapping[str, Any]
    """The network's sizes: Parameters for chameleon."""
    tensors: Mapping[str, tuple[Path, str]]
    """The file of each tensor and its name there; empty for Meta's layout, where all are in `file`."""
    codebook_size: int
    downsampling: int
    """Pixels per latent, in each direction."""
    fingerprint: str
    has_decoder: bool = True
    """Whether codes can be decoded to pictures; transformers' Chameleon can only encode."""

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
    if not path.exists():
        path = _download(config)
    if config.kind == "chameleon":
        found = path if path.is_file() else _vqgan_file(path)
        if found is not None:
            return _find_vqgan(config.weights, found)
        if not (path / hub.CONFIG).is_file():
            raise ConfigError(
                f"vision.weights: {config.weights}: kind chameleon needs vqgan.yaml and vqgan.ckpt "
                "or vqgan.safetensors in it, or transformers' config.json, found none of them"
            )
    return _find_transformers(config, path)


def check_decoder(weights: Weights, name: str, key: str) -> None:
    """Raise ConfigError if an image tokenizer can not decode codes to pictures.

    Args:
        weights: the image tokenizer.
        name: its folder or hub id.
        key: the setting that names it.
    """
    if not weights.has_decoder:
        raise ConfigError(
            f"{key}: {name} has transformers' encoder of Chameleon and no decoder, so nothing can be drawn: "
            "name a folder with Meta's vqgan.yaml and vqgan.ckpt or vqgan.safetensors"
        )


def _download(config: ImageTokenizerConfig) -> Path:
    """Download an image tokenizer; of a whole model, only the files that hold it.

    Raises:
        ConfigError: no hub id, the hub does not give it, or it is of another kind.
    """
    if config.kind == "chameleon":
        path = hub.download(config.weights, ["vqgan.*", f"{VQGAN_FOLDERS[1]}/vqgan.*"])
        if _vqgan_file(path) is not None:
            return path
    path = hub.download(config.weights, [hub.CONFIG, hub.INDEX])
    if not (path / hub.CONFIG).is_file():
        return path
    _read_config(config.kind, path)  # another kind is refused before gigabytes are downloaded
    return hub.download(config.weights, hub.files_to_download(path / hub.INDEX))


# --- Meta's layout ------------------------------------------------------------------------------------------


def _vqgan_file(folder: Path) -> Path | None:
    """Return the file with the tensors of a folder in Meta's layout, or None if there is none.

    A folder without config.json may hold them under any name.
    """
    places = [folder / place for place in VQGAN_FOLDERS]
    files = [place / f"vqgan{suffix}" for place in places for suffix in WEIGHTS_SUFFIXES]
    if not (folder / hub.CONFIG).exists():
        files += [file for suffix in WEIGHTS_SUFFIXES for file in sorted(folder.glob(f"*{suffix}"))]
    return next((file for file in files if file.is_file()), None)


def _find_vqgan(name: str, path: Path) -> Weights:
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
    fields = _read_config(config.kind, folder)
    shape = _shape_of(config.kind, fields, folder)
    try:
        sizes = SIZES[config.kind].model_validate(shape)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{folder / hub.CONFIG}: {first_problem(error)}") from None
    spans = _image_tokenizer_spans(folder)
    if fields["model_type"] == emu3_names.MODEL_TYPE:
        assert isinstance(sizes, Emu3Sizes)
        # The size of the attention, which is not in its authors' config.json.
        shape["hidden_size"] = sizes.base_channels * sizes.channel_multiplier[-1]
        spans = _renamed_emu3(spans)
    hashed = _fingerprint(spans)
    return Weights(
        file=folder,
        shape=sizes.parameters() if isinstance(sizes, ChameleonSizes) else shape,
        tensors={name: (span.file, span.name) for name, span in spans.items()},
        codebook_size=sizes.codebook_size,
        downsampling=1 << (len(sizes.channel_multiplier) - 1),
        fingerprint=_exported_fingerprint(fields, hashed) or hashed,
        has_decoder=config.kind != "chameleon",
    )


def _read_config(kind: str, folder: Path) -> dict[str, Any]:
    """Read the `config.json` of an image tokenizer or a whole model of this kind. Raises ConfigError."""
    path = folder / hub.CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"vision.weights: {folder}: kind {kind} needs config.json in it: {error.strerror}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type in (kind, f"{kind}_vqgan") or (kind, model_type) == ("emu3", emu3_names.MODEL_TYPE):
        return dict(content)
    problem = f"{path}: kind {kind} needs model_type {kind!r} or '{kind}_vqgan', found {model_type!r}"
    if model_type in OTHER_LAYOUTS:
        problem += f", whose layout is its authors' own: name {OTHER_LAYOUTS[model_type]}, in transformers'"
    raise ConfigError(problem)


def _shape_of(kind: str, fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the image tokenizer's part of `config.json`, under transformers' names."""
    if fields["model_type"] == emu3_names.MODEL_TYPE:
        return emu3_names.transformers_sizes(fields)
    shape = fields.get("vq_config", {}) if fields["model_type"] == kind else fields
    if not isinstance(shape, dict):
        raise ConfigError(
            f"{folder / hub.CONFIG}: vq_config: expected an object, found {type(shape).__name__}"
        )
    return shape


def _renamed_emu3(spans: Mapping[str, _TensorSpan]) -> dict[str, _TensorSpan]:
    """Give tensors of Emu3's authors the names and shapes of transformers, so that the fingerprint is one."""
    renamed = {emu3_names.transformers_name(name): span for name, span in spans.items()}
    return {
        name: dataclasses.replace(span, shape=emu3_names.transformers_shape(name, span.shape))
        for name, span in renamed.items()
    }


def hash_tensors(folder: Path) -> str:
    """Return the hash of the image tokenizer's tensors in a folder of transformers' layout.

    Raises:
        ConfigError: there is no image tokenizer in it.
    """
    return _fingerprint(_image_tokenizer_spans(folder))


def _exported_fingerprint(fields: Mapping[str, Any], hashed: str) -> str | None:
    """Return the fingerprint that our own export notes: that of the weights which it was made from.

    Args:
        fields: config.json.
        hashed: the hash of the tensors, which have not changed since if it is the noted one.
    """
    mark = fields.get("unitoken")
    noted = mark.get("image_tokenizer") if isinstance(mark, dict) else None
    if not isinstance(noted, dict) or noted.get("tensors") != hashed:
        return None
    return str(noted["fingerprint"]) if "fingerprint" in noted else None


@dataclass(frozen=True)
class _TensorSpan:
    """The bytes of a tensor in a safetensors file."""

    file: Path
    name: str
    start: int
    end: int
    dtype: str
    shape: list[int]


def _image_tokenizer_spans(folder: Path) -> dict[str, _TensorSpan]:
    """Find the image tokenizer's tensors, by their names without prefix."""
    spans = _tensor_spans(folder)
    prefix = hub.tensor_prefix(spans)
    if prefix is None:
        names = " or ".join(prefix + hub.CODEBOOK for prefix in hub.TENSOR_PREFIXES)
        raise ConfigError(f"vision.weights: {folder}: no tensor {names} in it")
    return {name.removeprefix(prefix): span for name, span in spans.items() if name.startswith(prefix)}


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
                    spans[name] = _TensorSpan(file, name, start, end, entry["dtype"], entry["shape"])
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
        digest.update(f"{name} {span.dtype} {span.shape}\n".encode())
        with open(span.file, "rb") as stream:
            stream.seek(span.start)
            digest.update(stream.read(span.end - span.start))
    return digest.hexdigest()[:16]
