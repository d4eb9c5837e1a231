"""What a training stage is made of, and the checks that need neither torch nor Composer.

config = load_config(StageConfig, "yamls/stage1.yaml", ["optimizer.lr=5e-4"])
checked = check(config, world_size=8)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import Field

from unitoken.streaming_data.config import Config, ConfigError, ConfigT
from unitoken.streaming_data.mixture import DataConfig, check_mixture
from unitoken.streaming_data.vocabulary import Vocabulary

LATEST = "latest"  # in a run's folder: a link to its newest checkpoint

Positive = Annotated[int, Field(gt=0)]
Duration = Annotated[str, Field(pattern=r"^[1-9][0-9]*(ep|ba)$")]


class DecoderConfig(Config):
    """A Chameleon decoder; the names are those of the checkpoints' config.json."""

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None  # None: as many as attention heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    swin_norm: bool = False  # True in the 34B model
    qk_norm: Literal["shared", "per_head"] = "shared"  # one gain for all heads (UniToken, Lumina-mGPT) or one a head (transformers)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @pydantic.model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size {self.hidden_size} is not an even number times {self.num_attention_heads} heads")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(f"{self.num_attention_heads} attention heads can not share {self.kv_heads} key-value heads")
        return self


class VisionConfig(Config):
    """A SigLIP vision tower; names and defaults are those of the checkpoints' config.json."""

    hidden_size: Positive = 768
    intermediate_size: Positive = 3072
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    image_size: Positive = 224
    patch_size: Positive = 16
    layer_norm_eps: float = 1e-6

    @property
    def features(self) -> int:
        """Features an image: 729 for so400m-patch14-384."""
        return int((self.image_size // self.patch_size) ** 2)

    @pydantic.model_validator(mode="after")
    def _heads_divide(self) -> VisionConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        return self


def _sizes(model: type[Config]) -> pydantic.BeforeValidator:
    """So that what is wrong inside the sizes is reported as such, and not as "expected a string"."""
    return pydantic.BeforeValidator(lambda value: model.model_validate(value) if isinstance(value, dict) else value)


class ModelConfig(Config):
    decoder: Annotated[str | DecoderConfig, _sizes(DecoderConfig)]  # folder or hub id of a checkpoint; or the sizes of a new one
    vision: Annotated[str | VisionConfig | None, _sizes(VisionConfig)] = (
        None  # the same for SigLIP; null: no vision tower and no adapter
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05  # on both residual branches of the decoder
    z_loss: Annotated[float, Field(ge=0)] = 1e-5  # weight of the mean of logsumexp squared
    mask_image_logits: bool = False  # image codes get no probability: only for data in which no image is drawn
    attention: Literal["sdpa", "flex"] = "sdpa"  # flex skips the blocks between documents; compiled, so for GPUs


class OptimizerConfig(Config):
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    vit_lr_scale: Annotated[float, Field(gt=0)] = 1.0  # the vision tower's learning rate is this times the others'
    weight_decay: Annotated[float, Field(ge=0)] = 0.1  # on every trained tensor, norms and biases included, as the reference
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] = 4.0  # L2 norm of all gradients together


class SaveConfig(Config):
    folder: str  # the run's folder: step-*.pt, latest, metrics.jsonl
    interval: Duration = "1000ba"
    keep: Positive = 2


class LogConfig(Config):
    every: Positive = 10  # batches between two lines on the console; metrics.jsonl has every batch


class StageConfig(Config):
    name: str
    model: ModelConfig
    init_from: str | None = None  # an earlier stage's save.folder, or one checkpoint file: weights only
    trainable: Annotated[list[str], Field(min_length=1)]  # names of modules or parameters, e.g. [vit, adapter]
    optimizer: OptimizerConfig
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.01
    max_duration: Duration = "1ep"
    data: DataConfig
    microbatch: Positive = 1  # packs a rank computes at once
    precision: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: bool = False  # recompute each decoder layer in the backward pass
    compat: Literal["unitoken"] | None = None  # the reference's loss (mean over microbatches) and its separator labels
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    save: SaveConfig
    log: LogConfig = LogConfig()


class Checked(NamedTuple):
    decoder: DecoderConfig
    vision: VisionConfig | None
    vocabulary: Vocabulary


def check(config: StageConfig, world_size: int) -> Checked:
    """Everything that can be found wrong before anything large is loaded. Raises ConfigError."""
    decoder, vision = model_configs(config.model)
    _check_data(config, vision, world_size)
    _check_trainable(config.trainable, vision is not None)
    resumes = (Path(config.save.folder) / LATEST).is_symlink()
    if config.init_from is not None and not resumes:  # a run that resumes needs it no more
        find_checkpoint(config.init_from)
    vocabulary = check_mixture(config.data)
    if vocabulary.size > decoder.vocab_size:
        raise ConfigError(
            f"model.decoder: it has room for {decoder.vocab_size} ids (vocab_size), the datasets' vocabulary has {vocabulary.size}"
        )
    return Checked(decoder, vision, vocabulary)


def model_configs(config: ModelConfig) -> tuple[DecoderConfig, VisionConfig | None]:
    """The model's sizes, read from the checkpoints where folders or hub ids are given. Raises ConfigError."""
    decoder = read_decoder(config.decoder) if isinstance(config.decoder, str) else config.decoder
    vision = read_vision(config.vision) if isinstance(config.vision, str) else config.vision
    return decoder, vision


def find_checkpoint(source: str) -> Path:
    """A checkpoint file, or the newest in the folder of a run. Raises ConfigError."""
    path = Path(source)
    if path.is_dir():
        checkpoint = latest_checkpoint(path)
        if checkpoint is None:
            raise ConfigError(f"{path}: no checkpoint in it (`{LATEST}`): did that stage run?")
        return checkpoint
    if not path.is_file():
        raise ConfigError(f"{path}: no such checkpoint")
    return path.resolve()  # a link may move on while we read


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from; None in a folder where nothing was saved yet."""
    link = folder / LATEST
    if not link.is_symlink():
        return None
    checkpoint = folder / link.readlink()
    if not checkpoint.is_file():
        raise ConfigError(f"{link}: it names {checkpoint.name}, which is not there")
    return checkpoint


def _check_data(config: StageConfig, vision: VisionConfig | None, world_size: int) -> None:
    data = config.data
    if data.global_batch % world_size:
        raise ConfigError(f"data.global_batch: {data.global_batch} packs can not be shared evenly by {world_size} ranks")
    if vision is None and data.continuous != "none":
        raise ConfigError(f"data.continuous: '{data.continuous}' needs model.vision; without a vision tower it is 'none'")
    if config.compat == "unitoken" and vision is not None and data.continuous != "all":
        raise ConfigError(f"data.continuous: compat 'unitoken' gives features to all images, found '{data.continuous}'")
    if vision is not None and data.continuous != "none" and data.packed_length <= vision.features + 1:
        raise ConfigError(f"data.packed_length: {data.packed_length} is too short: an image alone has {vision.features} features")


def _check_trainable(trainable: list[str], has_vision: bool) -> None:
    parts = ["model", "lm_head"] + (["vit", "adapter"] if has_vision else [])
    for name in trainable:
        if name.split(".")[0] not in parts:
            raise ConfigError(f"trainable: '{name}' is no part of this model; its parts are {', '.join(parts)}")


def checkpoint_folder(source: str) -> Path:
    """A local folder as it is; anything that looks like a hub id is downloaded first."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ConfigError(f"{source}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub's client raises a dozen kinds: offline, unknown, gated, disk full
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{source}: no such folder, and the hub did not give it: {first}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def _fixed(path: Path, fields: dict[str, Any], key: str, expected: Any) -> None:
    if fields.get(key, expected) != expected:
        raise ConfigError(f"{path}: `{key}` is {fields[key]!r}; only {expected!r} is supported")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, from the headers of its safetensors files."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in tensor_files(folder):
        try:
            with safe_open(path, framework="np") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no iterator
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not readable as safetensors: {error}") from None
    return shapes


def tensor_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise ConfigError(f"{index}: it names files outside its folder")
        paths = [folder / name for name in names]
    else:
        paths = [folder / "model.safetensors"]
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise ConfigError(f"{folder}: it has no {', '.join(missing) or 'tensors'}")
    return paths


def read_decoder(source: str) -> DecoderConfig:
    """The sizes of a Chameleon checkpoint (transformers' `save_pretrained`, Lumina-mGPT, UniToken)."""
    folder = checkpoint_folder(source)
    path = folder / "config.json"
    fields = _read_json(path)
    _fixed(path, fields, "hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        _fixed(path, fields, key, False)
    rope = fields.get("rope_parameters") or {}  # transformers 5 keeps theta here
    if fields.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ConfigError(f"{path}: scaled rotary embeddings are not supported")
    known = {key: fields[key] for key in DecoderConfig.model_fields if fields.get(key) is not None}
    if "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    shapes = tensor_shapes(folder)
    norm = next((shape for name, shape in sorted(shapes.items()) if name.endswith("layers.0.self_attn.q_norm.weight")), None)
    if norm is None:
        raise ConfigError(f"{folder}: no Chameleon decoder: the tensor 'model.layers.0.self_attn.q_norm.weight' is missing")
    known["qk_norm"] = "shared" if len(norm) == 1 or norm[0] == 1 else "per_head"
    return _validated(DecoderConfig, known, path)


def read_vision(source: str) -> VisionConfig:
    """The sizes of a SigLIP checkpoint: a vision tower, or a whole SigLIP of which only the tower is used."""
    path = checkpoint_folder(source) / "config.json"
    fields = _read_json(path)
    fields = fields.get("vision_config", fields)
    _fixed(path, fields, "hidden_act", "gelu_pytorch_tanh")
    _fixed(path, fields, "num_channels", 3)
    return _validated(VisionConfig, {key: fields[key] for key in VisionConfig.model_fields if key in fields}, path)


def _validated(model: type[ConfigT], fields: dict[str, Any], path: Path) -> ConfigT:
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None
