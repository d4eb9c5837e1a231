"""Where each part of a new model gets its weights, and giving them to it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.tensors import (
    Shapes,
    TensorSource,
    decoder_source,
    fit_norms,
    misfits,
    vision_source,
)
from unitoken.train.config import ModelConfig
from unitoken.train.model.unitoken import UniToken

PAIRS = (
    ("model", "lm_head"),
    ("vit", "adapter"),
)  # trained together: where one is and the other is not, it was lost


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def find_weights(
    model: UniToken, config: ModelConfig, trained: TensorSource | None
) -> dict[str, TensorSource]:
    """Where each part of a `meta` model gets its weights: from `trained` (an earlier stage), else from the configured folders.

    Tower and adapter that `trained` lacks (the base stage has none) are what they would be without it; a part that is in
    none of them is new. A part whose companion is there (`PAIRS`) was lost and is not replaced. Nothing is loaded yet.

    Raises:
        ConfigError: tensors of a part are missing, have no place in the model, or have another shape; all of them.
    """
    parts: dict[str, TensorSource] = _in_pairs(trained) if trained is not None else {}
    if isinstance(config.decoder, str) and "model" not in parts:
        parts = _in_pairs(decoder_source(config.decoder)) | parts
    if isinstance(config.vision, str) and "vit" not in parts:
        parts |= _by_part(vision_source(config.vision))
    expected = {
        part: source.shapes
        for part, source in _by_part(TensorSource("", shapes_of(model), lambda _: {})).items()
    }
    found: dict[str, tuple[Shapes, Shapes]] = {}  # by where it is: what is there, what is needed of it
    for part, source in parts.items():
        parts[part] = fit_norms(source, expected.get(part, {}))
        there, needed = found.setdefault(source.where, ({}, {}))
        there |= parts[part].shapes
        needed |= expected.get(part, {})
    problems = [text for where, (there, needed) in found.items() if (text := misfits(there, needed, where))]
    if problems:
        raise ConfigError("; ".join(problems))
    return parts


def load_weights(model: UniToken, parts: Mapping[str, TensorSource], seed: int) -> list[str]:
    """Give a `meta` model what `find_weights` found, and new weights to the rest. Says where from, a line a part."""
    lines = []
    for part, module in model.named_children():
        if part in parts:
            tensors = parts[part].read([name for name in parts[part].shapes if name.startswith(f"{part}.")])
            module.load_state_dict(
                {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}, assign=True
            )
        else:
            module.to_empty(device="cpu")
            _new_weights(module, part, seed)
        count = sum(parameter.numel() for parameter in module.parameters())
        lines.append(
            f"{part}: {count:,} parameters, {parts[part].where if part in parts else f'new, seed {seed}'}"
        )
    return lines


def _in_pairs(source: TensorSource) -> dict[str, TensorSource]:
    """By part, where a part that lacks its companion brings it along, without a tensor."""
    parts = _by_part(source)
    for pair in PAIRS:
        if any(part in parts for part in pair):
            parts = {part: source._replace(shapes={}) for part in pair} | parts
    return parts


def _by_part(source: TensorSource) -> dict[str, TensorSource]:
    parts: dict[str, Shapes] = {}
    for name, shape in source.shapes.items():
        parts.setdefault(name.split(".")[0], {})[name] = shape
    return {part: source._replace(shapes=shapes) for part, shapes in parts.items()}


@torch.no_grad()
def _new_weights(module: nn.Module, part: str, seed: int) -> None:
    """N(0, 0.02) as the reference; the tower as SigLIP: Xavier, with position embeddings of unit length.

    Each part draws from a generator of its own, so that adding a part leaves the others as they were.
    """
    generator = torch.Generator().manual_seed(seed * 4 + ("model", "lm_head", "vit", "adapter").index(part))
    for name, parameter in sorted(module.named_parameters()):
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


def nan_weights(model: UniToken) -> None:
    """Memory for a run that resumes: its checkpoint overwrites all of it, and what it did not would be seen at once."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
