"""Estimate what a stage takes of a GPU's memory, before anything is loaded.

estimate = estimate_memory(config, decoder, vision, ranks=8, trained=7_442_880_560, views=16)
print(estimate.summary())

The peak is where everything kept by the forward pass exists: in the loss, which makes its gradient at once,
or at the beginning of the backward pass; or it is at the end of that, when all gradients exist. The
activation sizes per token follow the code in decoder.py and vision_tower.py: a test counts what these modules
really keep, and another runs whole steps of the 7B model on tensors without memory, which take the estimate
or up to a tenth less. Compiled layers keep somewhat less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unitoken.train.config import ROWS, DecoderConfig, LoraConfig, StageConfig, VisionTowerConfig
from unitoken.train.model.activation_checkpointing import RecomputeMode
from unitoken.train.model.loss import CHUNK_ROWS

GB = 1e9
RUNTIME = 3e9  # CUDA's and NCCL's own memory, and what the allocator can not use: a guess
MODES: tuple[RecomputeMode, ...] = ("none", "full", "selective")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory on each GPU at the peak of a step, by purpose."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.parts.values())

    def summary(self) -> str:
        """Return the total and its parts in GB, largest first, without parts below 0.05 GB."""
        largest_first = sorted(self.parts.items(), key=lambda part: -part[1])
        return f"about {self.total / GB:.1f} GB a GPU: " + ", ".join(
            f"{name} {size / GB:.1f}" for name, size in largest_first if size >= 5e7
        )


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters in the units that FSDP gathers.

    Attributes:
        layer: of a decoder layer, of which there are `layers`.
        layers: number of decoder layers.
        tower: of the vision tower.
        head: of the output layer; 0 with tied embeddings, which are of the rest.
        rest: of all others.
    """

    layer: int
    layers: int
    tower: int
    head: int
    rest: int

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return self.layer * self.layers + self.tower + self.head + self.rest


def count_parameters(decoder: DecoderConfig, vision: VisionTowerConfig | None) -> ParameterCounts:
    """Count the parameters of a model of these sizes."""
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    query_size, key_size = decoder.query_size, decoder.key_size
    biases = query_size + 2 * key_size if decoder.attention_bias else 0
    rows_of_norms = {  # gains of the norms of queries and keys, and the biases of LayerNorms
        "none": 0,
        "layer_shared": 2 * (1 + 1),
        "layer_per_head": 2 * (decoder.num_attention_heads + decoder.kv_heads),
        "rms": 1 + 1,
    }
    norms = 2 * hidden + decoder.head_size * rows_of_norms[decoder.qk_norm]
    layer = 2 * hidden * query_size + 2 * hidden * key_size + biases + 3 * hidden * inner + norms
    matrix = decoder.vocab_size * hidden
    rest, tower = matrix + hidden, 0
    if vision is not None:
        size, wide = vision.hidden_size, vision.intermediate_size
        tower_layer = 4 * (size * size + size) + 2 * size * wide + wide + size + 4 * size
        embeddings = (3 * vision.patch_size**2 + 1 + vision.features + 2) * size  # and the last norm
        tower = vision.num_hidden_layers * tower_layer + embeddings
        rest += size * hidden + hidden + hidden * hidden + hidden
    head = 0 if decoder.tie_word_embeddings else matrix
    return ParameterCounts(layer, decoder.num_hidden_layers, tower, head, rest)


def decoder_layer_bytes(
    decoder: DecoderConfig,
    mode: RecomputeMode,
    *,
    width: int,
    trains: bool,
    mask: int = 0,
    dropout: int = 1,
    repeats: bool = True,
) -> int:
    """Return the bytes per token that a decoder layer keeps for the backward pass.

    Args:
        decoder: sizes of the decoder.
        mode: what the backward pass recomputes.
        width: bytes of an activation: 2 under bf16, else 4. Norms compute in float32 in any case.
        trains: whether its weights are trained; products with frozen weights do not need their inputs.
        mask: bytes of a token's row of the attention mask. Sdpa keeps a copy in each layer; flex has one mask
            for all.
        dropout: bytes of an element of dropout's mask: 1 on a GPU, 4 on a CPU, 0 without dropout.
        repeats: whether keys and values are repeated for all heads of a group: by sdpa, and not by flex.
    """
    hidden, inner, heads = decoder.hidden_size, decoder.intermediate_size, decoder.num_attention_heads
    query_size, key_size = decoder.query_size, decoder.key_size
    if mode == "full":
        return width * hidden  # the layer's input
    if mode == "selective":
        # Input; query, key, value; attention and its log-sum-exp; o_proj; gate and up; down.
        return width * (3 * hidden + 2 * query_size + 2 * key_size + 2 * inner) + 4 * heads
    # Input and scale; normalised, and times the gain for the next product.
    norm = 4 * hidden + 4 + trains * 2 * width * hidden
    head_norms = 0
    if decoder.family == "chameleon":  # inputs and normalised; means and scales
        head_norms = 4 * (query_size + key_size) * (1 + trains) + 8 * (heads + decoder.kv_heads)
    elif decoder.qk_norm == "rms":  # the same, rounded, and without means
        head_norms = (4 + trains * width) * (query_size + key_size) + 4 * (heads + decoder.kv_heads)
    # Query, key and value, repeated to the same number of heads; output; log-sum-exp.
    attention = width * 2 * (query_size + (query_size if repeats else key_size)) + 4 * heads + mask
    mlp = width * (3 + trains) * inner  # gate, its silu, up; their product
    return 2 * norm + head_norms + attention + mlp + 2 * dropout * hidden


def linear_sizes(decoder: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return the sizes of inputs and outputs of a decoder layer's linear layers."""
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    query_size, key_size = decoder.query_size, decoder.key_size
    return {
        "q_proj": (hidden, query_size),
        "k_proj": (hidden, key_size),
        "v_proj": (hidden, key_size),
        "o_proj": (query_size, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def count_adapters(decoder: DecoderConfig, lora: LoraConfig | None) -> int:
    """Count the parameters of the adapters of all layers."""
    if lora is None:
        return 0
    sizes = linear_sizes(decoder)
    return decoder.num_hidden_layers * sum(lora.rank * sum(sizes[target]) for target in lora.targets)


def adapter_bytes(decoder: DecoderConfig, lora: LoraConfig, mode: RecomputeMode, *, width: int) -> int:
    """Return the bytes per token that a frozen decoder layer keeps for its adapters.

    Args:
        decoder: sizes of the decoder.
        lora: the adapters.
        mode: what the backward pass recomputes.
        width: bytes of an activation.
    """
    targets, sizes = set(lora.targets), linear_sizes(decoder)
    if mode == "full":
        return 0
    if mode == "selective":  # the outputs of A and B
        return sum(width * (lora.rank + sizes[target][1]) for target in targets)
    # Of A the outputs, and the inputs: three layers share one, two another, and attention keeps o_proj's.
    inputs = decoder.hidden_size * bool(targets & {"q_proj", "k_proj", "v_proj"})
    inputs += decoder.hidden_size * bool(targets & {"gate_proj", "up_proj"})
    inputs += decoder.intermediate_size * ("down_proj" in targets)
    return width * (lora.rank * len(targets) + inputs)


def tower_layer_bytes(vision: VisionTowerConfig, mode: RecomputeMode, *, width: int) -> int:
    """Return the bytes per feature that a trained layer of the vision tower keeps for the backward pass.

    A frozen tower keeps nothing, as no gradient passes through it.

    Args:
        vision: sizes of the tower.
        mode: what the backward pass recomputes.
        width: bytes of an activation: 2 under bf16, else 4.
    """
    size, wide, heads = vision.hidden_size, vision.intermediate_size, vision.num_attention_heads
    if mode == "full":
        return width * size
    if mode == "selective":  # input; query, key, value; attention; out_proj; fc1; fc2
        return width * (7 * size + wide) + 4 * heads
    norm = 4 * size + 8 + width * size  # input, mean and scale; output for the next product
    return 2 * norm + width * 4 * size + 4 * heads + width * 2 * wide


def stack_bytes(setting: RecomputeMode | int, layers: int, layer_bytes: Mapping[RecomputeMode, int]) -> int:
    """Return the bytes per token that a stack of layers keeps for the backward pass.

    Args:
        setting: `activation_checkpointing`: a mode, or k to recompute every k-th layer in full.
        layers: number of layers.
        layer_bytes: bytes per token of one layer in each mode.
    """
    if isinstance(setting, str):
        return layers * layer_bytes[setting]
    recomputed = len(range(0, layers, setting))
    return recomputed * layer_bytes["full"] + (layers - recomputed) * layer_bytes["none"]


@dataclass(frozen=True)
class _GatheredBytes:
    """Bytes of gathered parameters, and of gradients in reduction, in the loss and at each unit's turn."""

    loss: float
    last_layer: float  # the first one of the backward pass
    layer: float
    tower: float
    rest: float
    not_resharded: float  # layers that stay gathered, or copied, from the forward pass to the backward pass


@dataclass(frozen=True)
class _Step:
    """A step of a stage on one GPU: what its memory depends on."""

    config: StageConfig
    decoder: DecoderConfig
    vision: VisionTowerConfig | None

    @property
    def width(self) -> int:
        """Bytes of an activation and of a gathered parameter."""
        return 2 if self.config.precision == "bf16" else 4

    @property
    def reduced(self) -> int:
        """Bytes of a gradient in reduction."""
        return 2 if self.config.precision == "bf16" and self.config.fsdp.reduce == "bf16" else 4

    @property
    def tokens(self) -> int:
        """Positions of a microbatch."""
        return self.config.microbatch_packs * self.config.data.packed_length

    def trains(self, part: str) -> bool:
        """Return whether any parameter of a part of the model (`model`, `vit`, ...) is trained."""
        return any(name.split(".")[0] == part for name in self.config.trainable)

    @property
    def trains_head(self) -> bool:
        """Return whether the output layer has a gradient."""
        head = "model" if self.decoder.tie_word_embeddings else "lm_head"
        return self.trains(head) or any(rows in self.config.trainable for rows in ROWS)

    @property
    def trains_rest(self) -> bool:
        """Return whether the vocabulary's matrices have gradients, which they have as a whole."""
        return self.trains("model") or any(rows in self.config.trainable for rows in ROWS)

    def layer_bytes(self) -> dict[RecomputeMode, int]:
        """Return the bytes per token that a decoder layer keeps in each mode."""
        sdpa = self.config.model.attention == "sdpa"
        mask = self.width * self.config.data.packed_length if sdpa else 0
        dropout = 1 if self.config.model.dropout else 0
        trains, lora = self.trains("model"), self.config.model.lora
        return {
            mode: (adapter_bytes(self.decoder, lora, mode, width=self.width) if lora is not None else 0)
            + decoder_layer_bytes(
                self.decoder,
                mode,
                width=self.width,
                trains=trains,
                mask=mask,
                dropout=dropout,
                repeats=sdpa,
            )
            for mode in MODES
        }

    def decoder_activations(self) -> int:
        """Return the bytes that the decoder's layers, the last norm and the supervised rows keep."""
        setting, layers = self.config.recompute, self.decoder.num_hidden_layers
        activations = self.tokens * stack_bytes(setting, layers, self.layer_bytes())
        # The last norm and the supervised rows, which are at most all rows.
        return activations + self.tokens * self.decoder.hidden_size * (4 + 3 * self.width)

    def tower_activations(self, views: int) -> int:
        """Return the bytes that the tower and the adapter keep of `views` views."""
        if self.vision is None:
            return 0
        features, activations = views * self.vision.features, 0
        if self.trains("vit"):
            layer_bytes = {mode: tower_layer_bytes(self.vision, mode, width=self.width) for mode in MODES}
            setting, layers = self.config.recompute, self.vision.num_hidden_layers
            activations = features * stack_bytes(setting, layers, layer_bytes)
        # The adapter's inputs, and the features that are put into the sequence.
        return activations + features * self.width * (self.vision.hidden_size + 3 * self.decoder.hidden_size)

    def recomputed_layer(self) -> int:
        """Return the bytes of a layer's recomputed activations, and of gradients through its widest part."""
        setting, layer_bytes = self.config.recompute, self.layer_bytes()
        recomputed = layer_bytes["none"] - (layer_bytes[setting] if isinstance(setting, str) else 0)
        gradients = 2 * self.width * self.decoder.intermediate_size + 8 * self.decoder.hidden_size
        lora = self.config.model.lora
        if lora is not None and "down_proj" in lora.targets:  # its input is freed before the widest part
            recomputed -= self.width * self.decoder.intermediate_size
        return self.tokens * (recomputed + gradients)

    def loss(self) -> int:
        """Return the bytes of the loss: a chunk's logits, and the gradients of rows and output layer."""
        # Logits, or their gradient, are rounded and in float32, of which the first is freed.
        logits = CHUNK_ROWS * self.decoder.vocab_size * (4 + (self.width if self.width == 2 else 0))
        rows = self.tokens * self.decoder.hidden_size * self.width
        # The sum of the output layer's gradients in float32, and a chunk's.
        weight = self.trains_head * self.decoder.vocab_size * self.decoder.hidden_size * (4 + self.width)
        return logits + rows + weight

    def _copies(self, number: ParameterCounts) -> _GatheredBytes:
        """Return the bytes of the copies in bfloat16 that autocast keeps of the weights on one GPU."""
        if self.width == 4:
            return _GatheredBytes(0, 0, 0, 0, 0, 0)
        setting, copied = self.config.recompute, number.total
        if setting != "none":  # those of recomputed layers are made anew, one layer at a time
            every = 1 if isinstance(setting, str) else setting
            kept = number.layers - len(range(0, number.layers, every))
            copied = number.rest + number.head + (kept + 1) * number.layer
        copies = 2 * copied
        # At the end of the forward pass autocast still has those of all trained weights.
        cached = 2 * number.total - copies if self.trains("model") else 0
        return _GatheredBytes(copies, copies, copies, copies, copies, cached)

    def gathered(self, number: ParameterCounts, ranks: int) -> _GatheredBytes:
        """Return the bytes of gathered parameters in the loss and at the turn of each unit's gradients."""
        if ranks == 1:  # nothing is gathered, but autocast keeps copies of the weights
            return self._copies(number)
        trained_head = number.head if self.trains_head else 0
        trained_rest = number.rest if self.trains_rest else 0
        # With tied embeddings the output layer's gradient waits for that of the embeddings.
        waiting = trained_rest if self.decoder.tie_word_embeddings else 0

        def two_units(size: int, trained: int, reduced: int) -> float:
            """Return the bytes of two gathered units, of one's gradients, and of gradients in reduction.

            The root unit stays gathered.
            """
            gathered = self.width * (number.rest + 2 * size + waiting)
            return gathered + self.width * trained + self.reduced * reduced

        trained_layer = number.layer if self.trains("model") else 0
        trained_tower = number.tower if self.trains("vit") else 0
        other_layers = self.width * number.layer * (number.layers - 1)
        first_layer = 0 if self.config.fsdp.reshard else self.width * number.layer
        return _GatheredBytes(
            # FSDP2 keeps what came last from the other GPUs, the output layer, beside its parameters.
            loss=self.width * (number.rest + 2 * number.head) + first_layer,
            last_layer=two_units(number.layer, trained_layer, max(trained_layer, trained_head)),
            layer=two_units(number.layer, trained_layer, trained_layer),
            tower=two_units(number.tower, trained_tower, trained_tower),
            rest=(2 * self.width + self.reduced) * trained_rest,
            not_resharded=0 if self.config.fsdp.reshard else other_layers + self.width * number.tower,
        )


def estimate_memory(
    config: StageConfig,
    decoder: DecoderConfig,
    vision: VisionTowerConfig | None,
    *,
    ranks: int,
    trained: int,
    views: int,
) -> MemoryEstimate:
    """Estimate the bytes that a stage takes on each GPU.

    Args:
        config: the stage.
        decoder: sizes of the decoder.
        vision: sizes of the vision tower, or None.
        ranks: number of GPUs.
        trained: number of trainable parameters.
        views: the most views (images or tiles) that the tower sees in a microbatch.
    """
    step, number = _Step(config, decoder, vision), count_parameters(decoder, vision)
    shards = max(ranks // config.fsdp.replicas, 1)
    accumulates = config.data.global_batch // ranks > config.microbatch_packs
    moments = _moments(step, number, step.gathered(number, ranks), 4 * trained / shards, shards, accumulates)
    peak = max(moments, key=lambda moment: sum(moment.values()))
    return MemoryEstimate({
        "parameters": 4 * (number.total + count_adapters(decoder, config.model.lora)) / shards,
        "Adam's moments": 8 * trained / shards,
        "tower activations": float(step.tower_activations(views)),
        **peak,
        "runtime": RUNTIME,
    })  # fmt: skip


def _moments(
    step: _Step,
    number: ParameterCounts,
    gathered: _GatheredBytes,
    gradients: float,
    shards: int,
    accumulates: bool,
) -> tuple[dict[str, float], ...]:
    """Return the bytes at the moments of a step that may be its peak, besides what stays all the time.

    Args:
        step: the step.
        number: the model's parameters.
        gathered: what is gathered.
        gradients: bytes of this GPU's gradients at the end of the step.
        shards: GPUs that share a copy of the model.
        accumulates: whether there are gradients of earlier microbatches.
    """
    recomputed = step.recomputed_layer()
    first = 4 * (number.head if step.trains_head else 0) / shards  # gradients that are reduced first
    last = 4 * (number.rest if step.trains_rest else 0) / shards  # and last
    return (
        {  # the loss
            "decoder activations": step.decoder_activations(),
            "loss": step.loss(),
            "gathered units": gathered.loss + gathered.not_resharded,
            "gradients": gradients if accumulates else 0.0,
        },
        {  # the backward pass of the last layer
            "decoder activations": step.decoder_activations(),
            "recomputed layer": recomputed,
            "gathered units": gathered.last_layer + gathered.not_resharded,
            "gradients": gradients if accumulates else first,
        },
        {  # of the first layer
            "recomputed layer": recomputed,
            "gathered units": gathered.layer,
            "gradients": gradients - last,
        },
        {"gathered units": gathered.tower, "gradients": gradients - last},  # of the tower
        {"gathered units": gathered.rest, "gradients": gradients},  # of the rest
    )
