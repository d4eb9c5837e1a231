"""The settings of a training stage: the keys of its YAML file.

config = load_config(StageConfig, "yamls/stage1.yaml", ["optimizer.lr=5e-4"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import pydantic
from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator

from unitoken.codec.config import CodecConfig
from unitoken.common.config import Config, Count, Name
from unitoken.streaming_data.settings import DataConfig, StreamConfig

Fraction = Annotated[float, Field(ge=0, lt=1)]
Length = Annotated[int, Field(gt=0, le=2**31)]  # in tokens

NEW_ROWS = "new_rows"
"""In `trainable` and `optimizer.lr_scales`: the rows that `model.grow` adds."""
IMAGE_ROWS = "image_rows"
"""In the same places: the rows of the image codes, in a model that had them already."""
LORA = "lora"
"""In the same places: the adapters of `model.lora`."""
ROWS = (NEW_ROWS, IMAGE_ROWS)
VOCABULARY_MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
"""The parameters that have a row for each id; a model whose embeddings are tied has the first only."""


class TrainedRows(NamedTuple):
    """The only rows of the vocabulary's matrices that are trained, and their name in `trainable`."""

    name: str
    first: int
    end: int


def is_adapter(parameter: str) -> bool:
    """Return whether a parameter is one of the adapters' of `model.lora`."""
    return parameter.endswith((".lora_a", ".lora_b"))


def _error_with_examples(examples: str) -> WrapValidator:
    """Replace pydantic's message about a pattern by one with examples."""

    def check(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except pydantic.ValidationError:
            raise ValueError(f"expected a number and its unit, as {examples}") from None

    return WrapValidator(check)


# Composer's units: ep for epochs, ba for batches, tok for tokens.
Duration = Annotated[
    str,
    Field(pattern=r"^[1-9][0-9]{0,5}ep$|^[1-9][0-9]{0,8}ba$|^[1-9][0-9]{0,15}tok$"),
    _error_with_examples("10ep, 1000ba or 1000000tok"),
]
Interval = Annotated[
    str, Field(pattern=r"^[1-9][0-9]{0,5}ep$|^[1-9][0-9]{0,8}ba$"), _error_with_examples("1ep or 1000ba")
]
Warmup = Annotated[
    str,
    Field(pattern=r"^[0-9]{1,16}(\.[0-9]{1,16})?(ep|ba|tok)$"),
    _error_with_examples("0.01ep, 100ba or 1000000tok"),
]


class RopeScaling(Config):
    """A scaled rotary embedding; the names are those of the checkpoints' config.json."""

    rope_type: Literal["linear", "llama3", "yarn"]
    """How frequencies are scaled: all alike (linear), by their wavelength (llama3), or by YaRN (yarn)."""
    factor: Annotated[float, Field(ge=1, le=1e6)]
    """How many times longer the texts are than those without scaling."""
    original_max_position_embeddings: Length | None = None
    """Of llama3 and yarn: the longest text before scaling."""
    low_freq_factor: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Of llama3: wavelengths above the longest text divided by this are scaled in full."""
    high_freq_factor: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Of llama3: wavelengths below the longest text divided by this are not scaled."""
    beta_fast: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Of yarn: frequencies with more rotations than this are not scaled; None: 32."""
    beta_slow: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Of yarn: frequencies with fewer rotations than this are scaled in full; None: 1."""
    attention_factor: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Of yarn: factor of queries and keys; None: it follows from `factor`, `mscale` and `mscale_all_dim`."""
    mscale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Of yarn: weight of the logarithm of `factor` in the factor of queries and keys, as in DeepSeek."""
    mscale_all_dim: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Of yarn: the same of the divisor of that factor."""
    truncate: bool | None = None
    """Of yarn: round the borders between scaled and unscaled frequencies to whole dimensions; None: yes."""

    def __str__(self) -> str:
        numbers = self.model_dump(exclude={"rope_type"}, exclude_none=True)
        return f"{self.rope_type} ({', '.join(f'{name} {value:g}' for name, value in numbers.items())})"

    @pydantic.model_validator(mode="after")
    def _has_the_numbers_of_its_type(self) -> RopeScaling:
        needed, allowed = ROPE_NUMBERS[self.rope_type]
        given = self.model_dump(exclude={"rope_type"}, exclude_none=True)
        for name in needed:
            if name not in given:
                raise ValueError(f"rope_type {self.rope_type} needs {name}")
        for name in given:
            if name not in (*needed, *allowed):
                raise ValueError(f"rope_type {self.rope_type} has no {name}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(f"high_freq_factor {high:g} is not above low_freq_factor {low:g}")
        return self


# The numbers that each type of scaling needs, and those that it may have besides.
ROPE_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}

# Of older files, whose decoders were all Chameleon's.
_OLD_QK_NORMS = {"shared": "layer_shared", "per_head": "layer_per_head"}


Rows = Annotated[int, Field(gt=0, le=2**24)]  # of the vocabulary's matrices


class NewDecoderConfig(Config):
    """A decoder; the names are those of the checkpoints' config.json.

    The defaults are Chameleon's. Llama's and Mistral's have `qk_norm: none`, Qwen2's also `attention_bias`,
    and Qwen3's `qk_norm: rms`.
    """

    vocab_size: Rows | Literal["auto"] = "auto"
    """Rows of the token embedding and of the output layer: ids that the model has room for; auto: as many as
    the datasets' vocabulary has."""
    hidden_size: Count
    """Size of the vectors between layers."""
    intermediate_size: Count
    """Size of the vectors inside an MLP."""
    num_hidden_layers: Count
    """Number of layers."""
    num_attention_heads: Count
    """Number of attention heads."""
    num_key_value_heads: Count | None = None
    """None: as many as attention heads."""
    head_dim: Count | None = None
    """Size of a head; None: hidden_size / num_attention_heads."""
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    """Added to the mean square in the norms."""
    rope_theta: Annotated[float, Field(ge=1, le=1e12)] = 10000.0
    """Base of the rotary embedding's wavelengths."""
    rope_scaling: RopeScaling | None = None
    """How the rotary embedding is scaled for longer texts; null: not at all."""
    max_position_embeddings: Length | None = None
    """The longest text of the checkpoint's own training; None: not known. Nothing is cut to it."""
    swin_norm: bool = False
    """Normalise after attention and MLP instead of before; true in Chameleon 34B."""
    qk_norm: Annotated[
        Literal["none", "layer_shared", "layer_per_head", "rms"],
        pydantic.BeforeValidator(
            lambda value: _OLD_QK_NORMS.get(value, value) if isinstance(value, str) else value
        ),
    ] = "layer_shared"
    """Norm of queries and keys: none (Llama, Qwen2); a LayerNorm with one gain for all heads (UniToken,
    Lumina-mGPT) or one per head (transformers' Chameleon); or a root-mean-square norm (Qwen3)."""
    attention_bias: bool = False
    """Biases of the query, key and value projections, as in Qwen2."""
    tie_word_embeddings: bool = False
    """The token embedding is the output layer, too."""

    def with_vocabulary(self, size: int) -> DecoderConfig:
        """Return all sizes, where `auto` stands for this size of the vocabulary."""
        rows = size if self.vocab_size == "auto" else self.vocab_size
        return DecoderConfig(**{**dict(self), "vocab_size": rows})

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Size of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Size of all heads' queries together."""
        return self.num_attention_heads * self.head_size

    @property
    def key_size(self) -> int:
        """Size of all heads' keys together, and of their values."""
        return self.kv_heads * self.head_size

    @property
    def family(self) -> Literal["chameleon", "llama", "qwen2", "qwen3"]:
        """The family in transformers that has these switches."""
        if self.qk_norm == "none":
            return "qwen2" if self.attention_bias else "llama"
        return "qwen3" if self.qk_norm == "rms" else "chameleon"

    @pydantic.model_validator(mode="after")
    def _heads_divide(self) -> NewDecoderConfig:
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % (2 * heads):
            raise ValueError(f"hidden_size {self.hidden_size} is not an even number times {heads} heads")
        if self.head_size % 2:
            raise ValueError(f"head_dim {self.head_dim} is not even, as the rotary embedding needs it")
        if heads % self.kv_heads:
            raise ValueError(f"{heads} attention heads can not share {self.kv_heads} key-value heads")
        return self

    @pydantic.model_validator(mode="after")
    def _is_of_a_family(self) -> NewDecoderConfig:
        """Refuse mixtures of families, which no program but this one could load."""
        if self.attention_bias and self.qk_norm != "none":
            raise ValueError(f"attention_bias is Qwen2's, which has `qk_norm: none`, found {self.qk_norm}")
        if self.family != "chameleon" and self.swin_norm:
            raise ValueError(
                f"swin_norm is Chameleon's, which has a LayerNorm as qk_norm, found {self.qk_norm}"
            )
        if self.family == "chameleon" and self.query_size != self.hidden_size:
            raise ValueError(
                f"head_dim {self.head_dim} times {self.num_attention_heads} heads is not hidden_size "
                f"{self.hidden_size}, as in Chameleon (qk_norm {self.qk_norm})"
            )
        return self


class DecoderConfig(NewDecoderConfig):
    """A decoder all of whose sizes are known."""

    vocab_size: Rows
    """Rows of the token embedding and of the output layer."""


class VisionTowerConfig(Config):
    """A SigLIP vision tower; names and defaults are those of the checkpoints' config.json."""

    hidden_size: Count = 768
    """Size of the vectors between layers."""
    intermediate_size: Count = 3072
    """Size of the vectors inside an MLP."""
    num_hidden_layers: Count = 12
    """Number of layers."""
    num_attention_heads: Count = 12
    """Number of attention heads."""
    image_size: Count = 224
    """Side of the square that an image is resized to, in pixels."""
    patch_size: Count = 16
    """Side of a patch in pixels; each patch gives one feature."""
    layer_norm_eps: Annotated[float, Field(ge=0, lt=1)] = 1e-6
    """Added to the variance in the norms."""

    @property
    def features(self) -> int:
        """Number of features per image: 729 for so400m-patch14-384."""
        return int((self.image_size // self.patch_size) ** 2)

    @pydantic.model_validator(mode="after")
    def _heads_divide(self) -> VisionTowerConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads"
            )
        return self


def _validate_as(model: type[Config]) -> pydantic.BeforeValidator:
    """Validate a mapping as `model` first, so that a wrong size is reported, and not "expected a string"."""
    return pydantic.BeforeValidator(
        lambda value: model.model_validate(value) if isinstance(value, dict) else value
    )


class GrowConfig(Config):
    """Rows for the ids of the datasets' vocabulary that the checkpoint's tokenizer lacks."""

    init: Literal["mean", "normal", "codebook"] = "mean"
    """`mean`: the mean of the old rows, with a billionth of their covariance, as in transformers. `normal`:
    N(0, 0.02). `codebook`: for image codes a random projection of the image tokenizer's vectors with the old
    rows' mean and spread, for others as `mean`; needs `codec`."""


LinearName = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Config):
    """Low-rank adapters beside the decoder's linear layers, which stay frozen (LoRA, arXiv 2106.09685)."""

    rank: Annotated[int, Field(gt=0, le=4096)] = 16
    """Size of the vectors between the two matrices of an adapter."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    """The adapters' outputs are multiplied by alpha / rank."""
    targets: list[LinearName] = Field(default=list(get_args(LinearName)), min_length=1)
    """The layers that get adapters, in every layer of the decoder."""

    @property
    def scale(self) -> float:
        """Factor of the adapters' outputs."""
        return self.alpha / self.rank


class ModelConfig(Config):
    """The model: where its sizes and pretrained weights come from, and how it computes."""

    decoder: Annotated[Name | NewDecoderConfig, _validate_as(NewDecoderConfig)]
    """Folder or hub id of a checkpoint; or the sizes of a new decoder."""
    vision: Annotated[Name | VisionTowerConfig | None, _validate_as(VisionTowerConfig)] = None
    """The same for SigLIP; null: no vision tower and no adapter."""
    grow: GrowConfig | None = None
    """Add rows for image codes and special tokens that the checkpoint lacks. Spare rows are used first; more
    are added up to a multiple of 64. Weights that have them, of an earlier stage, stay as they are."""
    lora: LoraConfig | None = None
    """Train adapters of the decoder's layers instead of the layers: `lora` in `trainable`. With `new_rows` or
    `image_rows` the model also learns image codes, which adapters alone can not teach it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """On both residual branches of the decoder."""
    z_loss: Annotated[float, Field(ge=0, le=1e3)] = 1e-5
    """Weight of the mean of logsumexp squared."""
    mask_image_logits: bool = False
    """Give image codes no probability; only for data in which no image is generated."""
    attention: Literal["sdpa", "flex"] = "sdpa"
    """Flex skips the blocks between documents; it is compiled, so it is meant for GPUs."""
    compile: bool = False
    """Apply torch.compile to each layer of decoder and tower; this takes some minutes at the start."""
    float8: bool = False
    """Multiply in float8 in the decoder's layers, with torchao, on GPUs that can (H100 and newer)."""

    @property
    def is_sized_by_data(self) -> bool:
        """Whether the decoder has as many rows as the datasets' vocabulary."""
        return isinstance(self.decoder, NewDecoderConfig) and self.decoder.vocab_size == "auto"


class OptimizerConfig(Config):
    """AdamW; the learning rate rises linearly from 0 over `warmup`, then follows `schedule` to `min_lr`."""

    lr: Annotated[float, Field(gt=0, le=1e30)]
    """Learning rate after the warm-up."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from `lr` to `min_lr`; `constant` keeps it at `lr`."""
    warmup: Warmup = "0.01ep"
    """How long the learning rate rises from 0: epochs (0.01ep), steps (100ba) or tokens (1000000tok)."""
    lr_scales: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(default={})
    """Factors of `lr` by the names of modules or parameters, or `new_rows`, `image_rows` or `lora`:
    {vit: 1e-2}."""
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.1
    """Not applied to norms and biases; with `compat` to all parameters, as in the reference."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the root of the mean square before the division."""
    clip_norm: Annotated[float, Field(gt=0, le=1e30)] = 4.0
    """Maximum L2 norm of all gradients together."""
    max_skipped: Count = 10
    """Most steps in a row that are skipped because loss or gradient is not finite; one more ends the run."""

    @pydantic.model_validator(mode="after")
    def _min_lr_is_below_lr(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr {self.min_lr:g} is above lr {self.lr:g}, from which the schedule falls to it"
            )
        return self


class FSDPConfig(Config):
    """How the ranks shard the model (FSDP2)."""

    reshard: bool = True
    """Free gathered parameters after the forward pass; false: more memory, less traffic."""
    replicas: Count = 1
    """Number of copies of the model (HSDP), each sharded over a group of ranks; one per node keeps
    the gathering inside a node."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Data type in which gradients are summed under bf16."""


BUCKETS = ("s3://", "gs://", "az://", "azure://")


def _check_local_folder(value: str) -> str:
    if "://" in value:
        raise ValueError("it is written to a folder, of this machine or shared, and not to a URL")
    return _expand_home(value)


def _check_folder(value: str) -> str:
    if "://" in value and not value.startswith(BUCKETS):
        raise ValueError(f"expected a folder, or a URL that begins with {', '.join(BUCKETS)}")
    return _expand_home(value)


def _expand_home(value: str) -> str:
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError as error:  # ~nobody
        raise ValueError(str(error)) from None


LocalFolder = Annotated[Name, pydantic.AfterValidator(_check_local_folder)]


class SaveConfig(Config):
    """Where and when checkpoints are saved."""

    folder: Annotated[Name, pydantic.AfterValidator(_check_folder)]
    """The run's folder, or its URL in a bucket: step-*, latest, metrics.jsonl."""
    interval: Interval = "1000ba"
    """Steps or epochs between two checkpoints; there is one after the last step, too."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""
    export: LocalFolder | None = None
    """Folder for the trained model in Hugging Face's layout, written at the end of the stage."""


class LogConfig(Config):
    """Which metrics go where, besides metrics.jsonl, which has every batch."""

    every: Count = 10
    """Batches between two points of the loggers; metrics.jsonl has every batch."""
    progress: bool = True
    """Show a progress bar on a terminal; elsewhere lines are printed."""
    tensorboard: bool = True
    """Write event files to save.folder/tensorboard."""
    wandb: str | None = None
    """A Weights & Biases project; needs the package wandb."""
    mlflow: str | None = None
    """An MLflow experiment; needs the package mlflow."""


class EvalConfig(Config):
    """The loss by kind on held-out samples."""

    interval: Interval = "1000ba"
    """Steps or epochs between two evaluations; there is one after the last step, too."""
    streams: dict[str, StreamConfig] | None = None
    """Default: all held-out samples of the training streams (`held_out`)."""
    batches: Count | None = None
    """Global batches per evaluation; default all."""


class SamplesConfig(Config):
    """Images generated and questions answered during training, for save.folder/samples and the loggers.

    Needs `codec`.
    """

    interval: Interval = "1000ba"
    """Steps or epochs between two times."""
    draw: list[str] = Field(default=[])
    """Prompts to generate an image from."""
    size: tuple[Count, Count] | None = None
    """Height and width in pixels of generated images; default: the sizes of the data's images."""
    answer: dict[str, str] = Field(default={})
    """Image file -> question; `<|image|>` is put before a question that has none."""
    max_tokens: Count = 64
    """Most tokens in an answer."""
    temperature: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    """For images; answers are greedy."""
    top_k: Count | None = None
    """For images: sample each code from this many of the likeliest; default: from all."""
    guidance: Annotated[float, Field(ge=0, le=1e3)] | None = None
    """Classifier-free guidance of images; 1: none; default 3, or 1 without data.null_prompt_fraction."""


class SuiteConfig(Config):
    """A suite of tasks that the model is evaluated on during training, as by `unitoken evaluate`.

    Replies and scores are in save.folder/suite; prompts need `codec`.
    """

    file: Name
    """The suite's YAML file."""
    interval: Interval = "1000ba"
    """Steps or epochs between two evaluations; there is one after the last step, too."""


class StageConfig(Config):
    """All settings of a training stage."""

    name: Name
    """Name of the stage, for the terminal and the loggers; a run goes on under the same name only."""
    model: ModelConfig
    """Sizes, weights and precision of the model."""
    init_from: Name | None = None
    """Weights to start from, without optimizer state: a run's save.folder, a checkpoint file, an exported
    folder, or a hub id."""
    trainable: Annotated[list[str], Field(min_length=1)]
    """Names of modules or parameters, e.g. [vit, adapter]. `new_rows` trains the rows that `model.grow` adds
    to the input and output matrices, and no others; `image_rows` those of the image codes, and no others;
    `lora` the adapters of `model.lora`."""
    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    max_duration: Duration = "1ep"
    """Length of the stage: epochs (1ep), steps (1000ba) or tokens (1000000000tok)."""
    data: DataConfig
    """The mixture of datasets, and how it is packed and streamed."""
    microbatch: Literal["auto"] | Count = 1
    """Packs per rank in one forward and backward pass; `auto`: the most that fit the GPU and divide the
    rank's share of `data.global_batch`; on a CPU 1."""
    precision: Literal["fp32", "tf32", "bf16"] = "bf16"
    """Of activations and products. tf32: float32, but the factors of matrix products are rounded, to TF32 on
    a GPU and to bfloat16 on a CPU that has units for it. bf16 needs a GPU."""
    fsdp: FSDPConfig = FSDPConfig()
    """How the ranks shard the model."""
    activation_checkpointing: Literal["auto", "none", "full", "selective"] | Count = "none"
    """What the backward pass recomputes instead of keeping: nothing; all of every layer, the vision tower's
    too; all of every k-th layer; all but matrix products and attention, which are expensive (`selective`;
    with flex it needs model.compile); or the least that fits the GPU (`auto`; nothing on a CPU)."""
    compat: Literal["unitoken"] | None = None
    """Behave as the reference (UniToken) wherever this program corrects it."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of new weights, dropout and samples; the order of the data has `data.seed`."""
    deterministic: bool = False
    """Give the same losses bit for bit on GPUs, too, where the gradient of attention is then slower."""
    save: SaveConfig
    """Where and when checkpoints are saved."""
    log: LogConfig = LogConfig()
    """Progress on the terminal, and loggers."""
    eval: EvalConfig | None = None
    """Losses on held-out samples while training; null: none."""
    samples: SamplesConfig | None = None
    """Drawings and answers while training; null: none."""
    suite: SuiteConfig | None = None
    """Scores on a suite of tasks while training; null: none."""
    codec: CodecConfig | None = None
    """The tokenizers that made the data; `samples`, `suite`, `generate`, `evaluate` and `export` use them."""

    @property
    def microbatch_packs(self) -> int:
        """`microbatch`, of a stage whose `auto` was replaced (accounting/fitting.py)."""
        assert self.microbatch != "auto"
        return self.microbatch

    @property
    def recompute(self) -> Literal["none", "full", "selective"] | int:
        """`activation_checkpointing`, of a stage whose `auto` was replaced (accounting/fitting.py)."""
        assert self.activation_checkpointing != "auto"
        return self.activation_checkpointing

    @property
    def supports_selective(self) -> bool:
        """Whether the stage can recompute selectively.

        Flex attention must be compiled, and torch ignores compiled functions inside a selective region.
        """
        return self.model.attention != "flex" or self.model.compile

    @pydantic.model_validator(mode="after")
    def _compat_gives_features_to_all_images(self) -> StageConfig:
        """With `compat: unitoken` and a vision tower `data.continuous` is "all", and nothing else."""
        if self.compat is None or self.model.vision is None or self.data.continuous == "all":
            return self
        if "continuous" in self.data.model_fields_set:
            raise ValueError(
                "data.continuous: compat 'unitoken' gives features to all images, "
                f"found '{self.data.continuous}'"
            )
        # The model is frozen.
        object.__setattr__(self, "data", self.data.model_copy(update={"continuous": "all"}))
        return self
