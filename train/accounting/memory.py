"""What a stage takes of a GPU's memory, computed before anything is loaded.

need = needs(config, decoder, vision, ranks=8, trained=7_442_880_560, views=16)
print(need.line())

The peak is in the backward pass: at its beginning, when all that was kept of the forward pass is still there, or at its end, when
all gradients are. The sizes of a token's activations are those of the code in decoder.py and vision.py: a test counts what they
really keep, and another runs whole steps of the 7B model on tensors without memory, which take what is said here or up to a tenth
less. Compiled layers keep somewhat less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unitoken.train.config import DecoderConfig, StageConfig, VisionTowerConfig

Mode = Literal["none", "full", "selective"]

GB = 1e9
CHUNK = 2048  # of loss.py
RUNTIME = 3e9  # CUDA's and NCCL's own, and what the allocator can not use: a guess


@dataclass(frozen=True)
class Need:
    """Bytes a GPU, by what they are for."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def line(self) -> str:
        most = sorted(self.parts.items(), key=lambda part: -part[1])
        return f"about {self.total / GB:.1f} GB a GPU: " + ", ".join(
            f"{name} {size / GB:.1f}" for name, size in most if size >= 5e7
        )


@dataclass(frozen=True)
class Counts:
    """Parameters in the units that FSDP gathers: a decoder layer, the tower, and the rest."""

    layer: int
    layers: int
    tower: int
    rest: int

    @property
    def total(self) -> int:
        return self.layer * self.layers + self.tower + self.rest


def counts(decoder: DecoderConfig, vision: VisionTowerConfig | None) -> Counts:
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    head = hidden // decoder.num_attention_heads
    keys = decoder.kv_heads * head
    shared = decoder.qk_norm == "shared"
    norms = 2 * hidden + 2 * head * (
        (1 if shared else decoder.num_attention_heads) + (1 if shared else decoder.kv_heads)
    )
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + norms
    rest, tower = 2 * decoder.vocab_size * hidden + hidden, 0
    if vision is not None:
        size, wide = vision.hidden_size, vision.intermediate_size
        each = 4 * (size * size + size) + 2 * size * wide + wide + size + 4 * size
        tower = vision.num_hidden_layers * each + (3 * vision.patch_size**2 + 1 + vision.features + 2) * size
        rest += size * hidden + hidden + hidden * hidden + hidden
    return Counts(layer, decoder.num_hidden_layers, tower, rest)


def decoder_token(
    decoder: DecoderConfig, mode: Mode, *, width: int, learns: bool, mask: int = 0, dropout: int = 1
) -> int:
    """Bytes that a layer keeps of a token for the backward pass.

    Args:
        width: bytes of an activation: 2 under bf16, else 4. Norms compute in float32 in any case.
        learns: its weights are trained; the inputs of a product with frozen weights are not needed.
        mask: bytes of its row of the attention mask, of which sdpa keeps a copy a layer; flex has one for all.
        dropout: bytes of an element of dropout's mask: 1 on a GPU, 4 on a CPU, 0 without dropout.
    """
    hidden, inner, heads = decoder.hidden_size, decoder.intermediate_size, decoder.num_attention_heads
    keys = hidden // heads * decoder.kv_heads
    if mode == "full":
        return width * hidden  # its input
    if mode == "selective":  # its input; q, k, v; attention and its normaliser; o; gate and up; down
        return width * (hidden + hidden + 2 * keys + hidden + hidden + 2 * inner + hidden) + 4 * heads
    norm = (
        4 * hidden + 4 + learns * 2 * width * hidden
    )  # input, scale; normalised, and times the gain for the next product
    head_norms = 4 * (hidden + keys) * (1 + learns) + 8 * (
        heads + decoder.kv_heads
    )  # inputs, normalised; means and scales
    attention = (
        width * 4 * hidden + 4 * heads + mask
    )  # q, k, v, all repeated to as many heads; output; normaliser
    mlp = width * (3 + learns) * inner  # gate, its silu, up; their product
    return 2 * norm + head_norms + attention + mlp + 2 * dropout * hidden


def tower_token(vision: VisionTowerConfig, mode: Mode, *, width: int) -> int:
    """The same for a feature in a layer of the vision tower. One that is frozen keeps nothing: no gradient passes it."""
    size, wide, heads = vision.hidden_size, vision.intermediate_size, vision.num_attention_heads
    if mode == "full":
        return width * size
    if mode == "selective":  # its input; q, k, v; attention; o; fc1; fc2
        return width * (7 * size + wide) + 4 * heads
    norm = 4 * size + 8 + width * size  # input, mean and scale; output for the next product
    return 2 * norm + width * 4 * size + 4 * heads + width * 2 * wide


def kept(setting: Literal["none", "full", "selective"] | int, layers: int, each: dict[Mode, int]) -> int:
    """Bytes of a token in a stack of layers, by `activation_checkpointing`."""
    if isinstance(setting, str):
        return layers * each[setting]
    recomputed = len(range(0, layers, setting))
    return recomputed * each["full"] + (layers - recomputed) * each["none"]


def needs(
    config: StageConfig,
    decoder: DecoderConfig,
    vision: VisionTowerConfig | None,
    *,
    ranks: int,
    trained: int,
    views: int,
) -> Need:
    """Args:
    trained: parameters that are.
    views: pictures that the tower sees in a microbatch, at most.
    """
    width, reduced = (2, 2 if config.fsdp.reduce == "bf16" else 4) if config.precision == "bf16" else (4, 4)
    number = counts(decoder, vision)
    parts = {name.split(".")[0] for name in config.trainable}
    learns, looks = "model" in parts, "vit" in parts
    hidden, tokens = decoder.hidden_size, config.microbatch * config.data.packed_length
    setting = config.activation_checkpointing
    dropout = 1 if config.model.dropout else 0
    mask = width * config.data.packed_length if config.model.attention == "sdpa" else 0

    modes: tuple[Mode, ...] = ("none", "full", "selective")
    of_layer = {
        mode: decoder_token(decoder, mode, width=width, learns=learns, mask=mask, dropout=dropout)
        for mode in modes
    }
    activations = tokens * kept(setting, number.layers, of_layer)
    # The last norm and the supervised rows, all of them at most.
    activations += tokens * hidden * (4 + 3 * width)
    tower = 0
    if vision is not None:
        features = views * vision.features
        if looks:
            of_tower = {mode: tower_token(vision, mode, width=width) for mode in modes}
            tower = features * kept(setting, vision.num_hidden_layers, of_tower)
        tower += (
            features * width * (vision.hidden_size + 3 * hidden)
        )  # the adapter's inputs, and what is put into the sequence
    # What is computed again of one layer, and the gradients on the way back through its widest part.
    again = of_layer["none"] - (of_layer[setting] if isinstance(setting, str) else 0)
    working = tokens * (again + 2 * width * decoder.intermediate_size + 8 * hidden)
    # A chunk's logits, rounded and in float32; their gradient and two passing copies of it.
    logits = CHUNK * decoder.vocab_size * (width + 4 * 4)

    shards = max(ranks // config.fsdp.replicas, 1)
    gradients = 4 * trained / shards
    earlier = (
        gradients if config.data.global_batch // ranks > config.microbatch else 0.0
    )  # of the microbatches before
    rest = number.rest if learns else 0  # what is summed and freed last of all

    def units(size: int, trains: bool) -> float:
        """One in use and the next, their gradients and those that are being summed; the rest stays, with the output layer's."""
        return width * (number.rest + 2 * size + rest / 2) + trains * (width + reduced) * size

    of_layers, of_the_tower, of_the_rest = (
        units(number.layer, learns),
        units(number.tower, looks),
        (2 * width + reduced) * rest,
    )
    not_freed = 0 if config.fsdp.reshard else width * (number.total - number.rest - number.layer)
    if ranks == 1:  # autocast's copies of the weights
        copied = number.total if setting == "none" else number.rest + number.layer
        of_layers = of_the_tower = of_the_rest = 2 * copied if width == 2 else 0
        not_freed = 0
    of_units = gradients - 4 * rest / shards
    moments: tuple[dict[str, float], ...] = (  # the last layer's turn, the first layer's, the tower's, the rest's
        {
            "decoder activations": activations, "one layer again": max(working, logits), "gathered units": of_layers + not_freed,
            "gradients": earlier,
        },
        {"one layer again": working, "gathered units": of_layers, "gradients": of_units},
        {"gathered units": of_the_tower, "gradients": of_units},
        {"gathered units": of_the_rest, "gradients": gradients},
    )  # fmt: skip
    most = max(moments, key=lambda moment: sum(moment.values()))
    return Need({
        "parameters": 4 * number.total / shards,
        "Adam's moments": 8 * trained / shards,
        "tower activations": float(tower),
        **most,
        "runtime": RUNTIME,
    })  # fmt: skip
