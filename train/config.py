"""What a training stage is made of: the keys of its YAML file.

config = load_config(StageConfig, "yamls/stage1.yaml", ["optimizer.lr=5e-4"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator

from unitoken.codec.config import CodecConfig
from unitoken.common.config import Config, Count, Name
from unitoken.streaming_data.settings import DataConfig, StreamConfig

Fraction = Annotated[float, Field(ge=0, lt=1)]


def _written_as(examples: str) -> WrapValidator:
    """What a wrong value is told in place of the pattern."""

    def check(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except pydantic.ValidationError:
            raise ValueError(f"expected a number and its unit, as {examples}") from None

    return WrapValidator(check)


# ep: epochs, ba: batches, tok: tokens
Duration = Annotated[
    str,
    Field(pattern=r"^[1-9][0-9]{0,5}ep$|^[1-9][0-9]{0,8}ba$|^[1-9][0-9]{0,15}tok$"),
    _written_as("10ep, 1000ba or 1000000tok"),
]
Interval = Annotated[
    str, Field(pattern=r"^[1-9][0-9]{0,5}ep$|^[1-9][0-9]{0,8}ba$"), _written_as("1ep or 1000ba")
]
Warmup = Annotated[
    str,
    Field(pattern=r"^[0-9]{1,16}(\.[0-9]{1,16})?(ep|ba|tok)$"),
    _written_as("0.01ep, 100ba or 1000000tok"),
]


class DecoderConfig(Config):
    """A Chameleon decoder; the names are those of the checkpoints' config.json."""

    vocab_size: Annotated[int, Field(gt=0, le=2**24)]
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    """None: as many as attention heads."""
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    rope_theta: Annotated[float, Field(ge=1, le=1e12)] = 10000.0
    swin_norm: bool = False
    """True in the 34B model."""
    qk_norm: Literal["shared", "per_head"] = "shared"
    """One gain for all heads (UniToken, Lumina-mGPT) or one a head (transformers)."""

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @pydantic.model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not an even number times {self.num_attention_heads} heads"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads can not share {self.kv_heads} key-value heads"
            )
        return self


class VisionTowerConfig(Config):
    """A SigLIP vision tower; names and defaults are those of the checkpoints' config.json."""

    hidden_size: Count = 768
    intermediate_size: Count = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    image_size: Count = 224
    patch_size: Count = 16
    layer_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-6

    @property
    def features(self) -> int:
        """Features an image: 729 for so400m-patch14-384."""
        return int((self.image_size // self.patch_size) ** 2)

    @pydantic.model_validator(mode="after")
    def _heads_divide(self) -> VisionTowerConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads"
            )
        return self


def _sizes(model: type[Config]) -> pydantic.BeforeValidator:
    """So that what is wrong inside the sizes is reported as such, and not as "expected a string"."""
    return pydantic.BeforeValidator(
        lambda value: model.model_validate(value) if isinstance(value, dict) else value
    )


class ModelConfig(Config):
    decoder: Annotated[Name | DecoderConfig, _sizes(DecoderConfig)]
    """Folder or hub id of a checkpoint; or the sizes of a new one."""
    vision: Annotated[Name | VisionTowerConfig | None, _sizes(VisionTowerConfig)] = None
    """The same for SigLIP; null: no vision tower and no adapter."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """On both residual branches of the decoder."""
    z_loss: Annotated[float, Field(ge=0, le=1e3)] = 1e-5
    """Weight of the mean of logsumexp squared."""
    mask_image_logits: bool = False
    """Image codes get no probability: only for data in which no image is drawn."""
    attention: Literal["sdpa", "flex"] = "sdpa"
    """Flex skips the blocks between documents; compiled, so for GPUs."""
    compile: bool = False
    """Torch.compile of each decoder layer: some minutes at the start."""


class OptimizerConfig(Config):
    """AdamW; the learning rate rises linearly from 0 over `warmup`, then follows `schedule` to `min_lr` at the run's end."""

    lr: Annotated[float, Field(gt=0, le=1e30)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Warmup = "0.01ep"
    lr_scales: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(default={})
    """Times `lr`, by the names of modules or parameters: {vit: 1e-2}."""
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.1
    """Not on norms and biases; with compat on everything, as the reference."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0, le=1e30)] = 4.0
    """L2 norm of all gradients together."""
    max_skipped: Count = 10
    """Steps in a row that a gradient or loss that is not finite may skip; one more ends the run."""

    @pydantic.model_validator(mode="after")
    def _falls(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr {self.min_lr:g} is above lr {self.lr:g}, from which the schedule falls to it"
            )
        return self


class FSDPConfig(Config):
    """How the model is shared by the ranks (FSDP2)."""

    reshard: bool = True
    """Free gathered parameters after the forward pass; false: more memory, less traffic."""
    replicas: Count = 1
    """Groups of ranks that each hold the whole model (HSDP); as many as nodes keeps gathering inside a
    node."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in under bf16."""


def _local(value: str) -> str:
    if "://" in value:
        raise ValueError("it is written to a folder, of this machine or shared, and not to a URL")
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError as error:  # ~nobody
        raise ValueError(str(error)) from None


LocalFolder = Annotated[Name, pydantic.AfterValidator(_local)]


class SaveConfig(Config):
    folder: LocalFolder
    """The run's folder: step-*.pt, latest, metrics.jsonl."""
    interval: Interval = "1000ba"
    keep: Count = 2
    export: LocalFolder | None = None
    """At the end of the stage: a folder for Hugging Face's layout."""


class LogConfig(Config):
    every: Count = 10
    """Batches between two points of the loggers; metrics.jsonl has every batch."""
    progress: bool = True
    """A bar on a terminal, lines elsewhere."""
    tensorboard: bool = True
    """Into save.folder/tensorboard."""
    wandb: str | None = None
    """A Weights & Biases project, where wandb is installed."""
    mlflow: str | None = None
    """An MLflow experiment, where mlflow is installed."""


class EvalConfig(Config):
    """The loss by kind on samples that are not trained on."""

    interval: Interval = "1000ba"
    """And after the last step."""
    streams: dict[str, StreamConfig] | None = None
    """Default: what `held_out` keeps back of the training streams, all of it."""
    batches: Count | None = None
    """Global batches an evaluation; default all."""


class SamplesConfig(Config):
    """Pictures drawn and questions answered while training, into save.folder/samples and TensorBoard. Needs `codec`."""

    interval: Interval = "1000ba"
    draw: list[str] = Field(default=[])
    """What to draw."""
    size: tuple[Count, Count] | None = None
    """Pixels, height and width, of drawings; default: those of the data's pictures."""
    answer: dict[str, str] = Field(default={})
    """Picture file -> question; `<|image|>` is put before it where it has none."""
    max_tokens: Count = 64
    temperature: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    """Of drawings; answers are the likeliest."""
    top_k: Count | None = None
    """Image codes that drawings are made of at each place."""
    guidance: Annotated[float, Field(ge=0, le=1e3)] | None = None
    """Away from the null prompt; 1: none; default 3, or 1 without data.null_prompt_fraction."""


class StageConfig(Config):
    name: Name
    model: ModelConfig
    init_from: Name | None = None
    """Weights only: a run's save.folder, a checkpoint file, an exported folder, or a hub id."""
    trainable: Annotated[list[str], Field(min_length=1)]
    """Names of modules or parameters, e.g. [vit, adapter]."""
    optimizer: OptimizerConfig
    max_duration: Duration = "1ep"
    data: DataConfig
    microbatch: Count = 1
    """Packs a rank computes at once."""
    precision: Literal["fp32", "bf16"] = "bf16"
    fsdp: FSDPConfig = FSDPConfig()
    activation_checkpointing: Literal["none", "full", "selective"] | Count = "none"
    """What the backward pass computes again instead of keeping: nothing; all of every layer, the tower's too;
    all of every k-th layer; or all but what is dear, the matrix products and attention (`selective`; with
    flex it needs model.compile)."""
    compat: Literal["unitoken"] | None = None
    """The reference's behaviour wherever ours is a fix."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    deterministic: bool = False
    """The same losses bit for bit each time on a GPU, too, where attention's gradient is slower then."""
    save: SaveConfig
    log: LogConfig = LogConfig()
    eval: EvalConfig | None = None
    samples: SamplesConfig | None = None
    codec: CodecConfig | None = None
    """The tokenizers the data was made with: for `samples`, `generate` and `export`."""

    @pydantic.model_validator(mode="after")
    def _compat_switches_everything(self) -> StageConfig:
        """`compat: unitoken` alone is the reference: where nothing else is said, all images bring their features."""
        if self.compat and self.model.vision is not None and "continuous" not in self.data.model_fields_set:
            object.__setattr__(
                self, "data", self.data.model_copy(update={"continuous": "all"})
            )  # the model is frozen
        return self
