"""Find the weights of each part of a new model, and load them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.growth import Growth, named_generator
from unitoken.train.checkpoint.locations import checkpoint_folder
from unitoken.train.checkpoint.tensors import (
    Shapes,
    Tensors,
    TensorSource,
    compare_shapes,
    drop_tied_head,
    fit_norms,
    open_decoder_folder,
    open_vision_folder,
    parameter_shapes,
)
from unitoken.train.config import VOCABULARY_MATRICES, ModelConfig, is_adapter
from unitoken.train.model.lora import draw_adapter
from unitoken.train.model.unitoken import UniToken

# Parts that are trained together: where only one of them is there, the other was lost.
PAIRS = (("model", "lm_head"), ("vit", "adapter"))


def find_weights(
    model: UniToken, config: ModelConfig, trained: TensorSource | None, growth: Growth | None = None
) -> dict[str, TensorSource]:
    """Find the weights of each part of a model, without loading any.

    They come from `trained`, else from the configured folders. A tower and an adapter that `trained` lacks
    (the base stage has none) are what they would be without it. A part that is in none of them is not in the
    result and will be new. A part whose companion is there (`PAIRS`) was lost, which is an error.

    Args:
        model: the model on the `meta` device.
        config: its settings, with the folders of pretrained weights.
        trained: the weights of an earlier stage, or None.
        growth: the rows that the configured decoder lacks, or None.

    Raises:
        ConfigError: tensors of a part are missing, are not part of the model, or have another shape; it names
            all.
    """
    parts: dict[str, TensorSource] = _split_with_companions(trained) if trained is not None else {}
    if isinstance(config.decoder, str) and "model" not in parts:
        folder = open_decoder_folder(config.decoder)
        if growth is not None:
            folder = growth.grow(folder, checkpoint_folder(config.decoder))
        parts = _split_with_companions(folder) | parts
    if isinstance(config.vision, str) and "vit" not in parts:
        parts |= _split_by_part(open_vision_folder(config.vision))
    # Adapters are new in every run.
    base = {name: shape for name, shape in parameter_shapes(model).items() if not is_adapter(name)}
    expected = _shapes_by_part(base)
    shapes: dict[str, tuple[Shapes, Shapes]] = {}  # of each file or folder: found, and expected of it
    for part, source in parts.items():
        parts[part] = drop_tied_head(fit_norms(source, expected.get(part, {})), expected.get(part, {}))
        found, needed = shapes.setdefault(source.where, ({}, {}))
        found |= parts[part].shapes
        needed |= expected.get(part, {})
    problems = [compare_shapes(found, needed, where) for where, (found, needed) in shapes.items()]
    if any(problems):
        raise ConfigError("; ".join(problem for problem in problems if problem))
    return parts


def load_weights(
    model: UniToken, parts: Mapping[str, TensorSource], seed: int, growth: Growth | None = None
) -> list[str]:
    """Load the weights that `find_weights` found into a `meta` model, and draw those of the other parts.

    Args:
        model: the model, on the CPU afterwards.
        parts: the weights of each part; a part that is not among them is new.
        seed: of new weights.
        growth: the rows that are new in new weights, too, or None.

    Returns:
        A line about each part: its size and where its weights come from.
    """
    lines = []
    for part, module in model.named_children():
        adapters = _draw_adapters(module, part, seed)
        if part in parts:
            source = parts[part]
            tensors = source.read([name for name in source.shapes if name.startswith(f"{part}.")])
            state = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}
            module.load_state_dict(state | adapters, assign=True)
        else:
            module.to_empty(device="cpu")
            _draw_weights(module, part, seed)
            module.load_state_dict(adapters, strict=False)
            for name, parameter in module.named_parameters(prefix=part):
                if growth is not None and name in VOCABULARY_MATRICES:
                    growth.fill(name, parameter)
        count = sum(parameter.numel() for parameter in module.parameters())
        origin = parts[part].where if part in parts else f"new, seed {seed}"
        lines.append(f"{part}: {count:,} parameters, {origin}")
    return lines


def _split_with_companions(source: TensorSource) -> dict[str, TensorSource]:
    """Split weights by part; a missing companion of a part gets an entry without tensors."""
    parts = _split_by_part(source)
    for pair in PAIRS:
        if any(part in parts for part in pair):
            parts = {part: source._replace(shapes={}) for part in pair} | parts
    return parts


def _split_by_part(source: TensorSource) -> dict[str, TensorSource]:
    shapes_by_part = _shapes_by_part(source.shapes)
    return {part: source._replace(shapes=shapes) for part, shapes in shapes_by_part.items()}


def _shapes_by_part(shapes: Shapes) -> dict[str, Shapes]:
    parts: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        parts.setdefault(name.split(".")[0], {})[name] = shape
    return parts


@torch.no_grad()
def _draw_weights(module: nn.Module, part: str, seed: int) -> None:
    """Draw new weights: N(0, 0.02) as the reference; in the tower Xavier uniform as SigLIP.

    SigLIP's position embeddings have unit length. Each part draws from a generator of its own, so that adding
    a part does not change the others.
    """
    generator = torch.Generator().manual_seed(seed * 4 + ("model", "lm_head", "vit", "adapter").index(part))
    for name, parameter in sorted(module.named_parameters()):
        if is_adapter(name):
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        elif part != "vit":
            parameter.normal_(0.0, 0.02, generator=generator)
        elif "position_embedding" in name:
            parameter.normal_(0.0, 1 / math.sqrt(parameter.shape[1]), generator=generator)
        else:
            fan_in, fan_out = parameter[0].numel(), parameter.shape[0]
            bound = math.sqrt(6 / (fan_in + fan_out))
            parameter.uniform_(-bound, bound, generator=generator)


def _draw_adapters(module: nn.Module, part: str, seed: int) -> Tensors:
    """Draw the adapters of a part, by their names in it."""
    return {
        name: draw_adapter(tuple(parameter.shape), name, named_generator(seed, f"{part}.{name}"))
        for name, parameter in module.named_parameters()
        if is_adapter(name)
    }


def fill_with_nan(model: UniToken) -> None:
    """Give a `meta` model memory to resume into, filled with NaN so that an unloaded weight shows at once."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
