"""Finds the files of an image tokenizer and reads what shape it has, without torch: settings are checked before that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydantic
import yaml

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.manifest import VisionTokenizer, sha256_file
from unitoken.tokenize.config import VisionConfig

SUFFIXES = (".safetensors", ".ckpt")  # in the order of preference


class Encoder(pydantic.BaseModel):
    """`ddconfig` of a VQGAN: encoder and decoder. What else the file says (losses) is for its training."""

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
    embed_dim: int
    n_embed: int
    ddconfig: Encoder

    @property
    def downsampling(self) -> int:
        """Pixels a latent, each way."""
        return 1 << (len(self.ddconfig.ch_mult) - 1)


@dataclass(frozen=True)
class Weights:
    file: Path
    parameters: Parameters
    fingerprint: str

    def describe(self, config: VisionConfig) -> VisionTokenizer:
        return VisionTokenizer(
            kind=config.kind,
            weights=self.fingerprint,
            codebook_size=self.parameters.n_embed,
            downsampling=self.parameters.downsampling,
            precision=config.precision,
        )


def find_weights(name: str) -> Weights:
    """`name` is a folder, a weights file with its .yaml beside it, or a hub id. Meta's layout: `vqgan.yaml`, `vqgan.ckpt`."""
    path = Path(name)
    if not path.exists():
        path = _from_hub(name)
    if path.is_dir():
        files = [file for suffix in SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
        vqgan = [file for file in files if file.stem == "vqgan"] or files
        if not vqgan:
            raise ConfigError(
                f"vision.weights: {name}: no {' or '.join('*' + s for s in SUFFIXES)} in it; it needs vqgan.yaml and vqgan.ckpt"
            )
        path = vqgan[0]
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"vision.weights: {name}: expected a file that ends in {' or '.join(SUFFIXES)}")
    return Weights(path, read_parameters(path.with_suffix(".yaml")), sha256_file(path)[:16])


def _from_hub(name: str) -> Path:
    if Path(name).is_absolute() or name.count("/") != 1 or name.startswith((".", "~")):
        raise ConfigError(f"vision.weights: {name}: no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["vqgan.*"]))
    except Exception as error:  # the hub's, the network's and its cache's errors share no base
        reason = " ".join(str(error).split())
        raise ConfigError(f"vision.weights: {name}: no such folder here, and the hub says: {reason[:200]}") from None


def read_parameters(path: Path) -> Parameters:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Parameters.model_validate(content["model"]["params"])
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the shape of the image tokenizer: {error.strerror}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: model.params.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        raise ConfigError(f"{path}: expected a VQGAN's YAML with model.params.ddconfig") from None
