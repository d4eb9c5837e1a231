"""The batches of the reference, made of what was recorded from it (tests/data/golden), to hold our model against its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from unitoken.dataset.record import IGNORED, Record, spans_of
from unitoken.dataset.vision_views import NEWLINE, Pixels, Views
from unitoken.train.checkpoint.layouts import read_decoder, read_vision
from unitoken.train.checkpoint.loading import find_weights, load_weights
from unitoken.train.config import ModelConfig
from unitoken.train.model.unitoken import UniToken, build_model

Variant = Literal["base", "anyres"]
VARIANTS: tuple[Variant, ...] = ("base", "anyres")
VIEWS = {"base": Views(384, 14), "anyres": Views(384, 14, anyres=True)}
IMAGE_END, IMAGE_START, SEPARATOR, NEWLINE_ID = 8196, 8197, 8198, 8803
IMAGE_IDS = range(4, 8196)  # IMGIMGAZ ... IMGIMGIBJBZ


class Sample(NamedTuple):
    tokens: list[int]
    labels: list[int]
    pixels: Pixels  # (V, 3, 384, 384) of its first image; a text-only sample has one, too, for its padding
    layout: np.ndarray  # (F,) view * 729 + patch, or NEWLINE


def read_records(golden: Path) -> dict[str, Any]:
    """By id: the tokens and labels of part A."""
    lines = (golden / "dev/A_tokenization.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def read_model(golden: Path) -> UniToken:
    """The recording's tiny model, in float32 and in training."""
    assets = golden / "assets"
    decoder, vision = str(assets / "lm"), str(assets / "siglip")
    config = ModelConfig(decoder=decoder, vision=vision, dropout=0.0)
    built = build_model(read_decoder(decoder), read_vision(vision), config)
    load_weights(built, find_weights(built, config, None), seed=0)
    adapter = load_file(assets / "adapter" / "adapter.safetensors")
    built.adapter.load_state_dict(
        {name.removeprefix("adapter."): tensor.float() for name, tensor in adapter.items()}
    )
    return built.train()


def sample(golden: Path, record: dict[str, Any], variant: Variant, failed: bool = False) -> Sample:
    """A record with its first image. Without one, or with one that `failed`, the reference takes one black view, and masks
    all labels of the latter.
    """
    image = record["record"].get("image")
    labels = [IGNORED] * len(record["labels"]) if failed else record["labels"]
    if image is None or failed:
        # One view has a single row in AnyRes, so one newline.
        layout = np.arange(729) if variant == "base" else np.append(np.arange(729), NEWLINE)
        return Sample(record["tokens"], labels, np.zeros((1, 3, 384, 384), np.uint8), layout)
    path = golden / "assets" / (image if isinstance(image, str) else image[0])
    pixels, size = VIEWS[variant].pixels(path.read_bytes(), compat=True)
    return Sample(record["tokens"], labels, pixels, VIEWS[variant].layout(*size))


def samples_of(golden: Path, records: dict[str, Any], case: dict[str, Any]) -> list[Sample]:
    """Those of a batch of part D; their pixels are the recorded ones to the bit."""
    found = []
    for entry in case["samples"]:
        failed = entry["labels_all_masked"]
        found.append(sample(golden, records[entry["record_id"]], case["variant"], failed))
        if entry["raw_image"]:
            assert sha256_of(found[-1].pixels) == entry["pixel_sha256"], entry["record_id"]
    return found


def sha256_of(pixels: Pixels) -> str:
    """Of the float32 numbers that the reference's processor makes of them."""
    normalised = ((pixels / 255).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
    return hashlib.sha256(np.ascontiguousarray(normalised).tobytes()).hexdigest()


def reference_batch(samples: Sequence[Sample], max_length: int = 4096) -> dict[str, Tensor]:
    """The batch of the reference: cropped, padded with id 0 on the right, features and newlines put before the end of the
    image, one document a row with positions over the padding too.
    """
    # It pads to the longest before it inserts, and what has no image by as much as the longest of the images takes.
    longest = (
        max(min(len(one.tokens), max_length) for one in samples) + max(len(one.layout) for one in samples) + 1
    )
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    targets = torch.full((len(samples), longest), IGNORED)
    pixels: list[Pixels] = [np.zeros((0, 3, 384, 384), np.uint8)]
    view_rows: list[int] = []
    features: list[np.ndarray] = [np.zeros((0, 4), np.int64)]  # row, column, view, patch
    for row, one in enumerate(samples):
        tokens, labels = one.tokens[:max_length], one.labels[:max_length]
        if IMAGE_END in tokens:
            at = tokens.index(IMAGE_END)
            places = np.flatnonzero(one.layout != NEWLINE)
            view, patch = np.divmod(one.layout[places], 729)
            features.append(
                np.stack([np.full(len(places), row), at + 1 + places, view + len(view_rows), patch], axis=1)
            )
            pixels.append(one.pixels)
            view_rows += [row] * len(one.pixels)
            inserted = np.where(one.layout == NEWLINE, NEWLINE_ID, 0).tolist()
            tokens = [*tokens[:at], SEPARATOR, *inserted, *tokens[at:]]
            labels = [*labels[:at], SEPARATOR, *[IGNORED] * len(inserted), *labels[at:]]
        ids[row, : len(tokens)], targets[row, : len(labels)] = torch.tensor(tokens), torch.tensor(labels)
    row, column, view, patch = torch.from_numpy(np.concatenate(features)).T
    return {
        "input_ids": ids,
        "labels": targets,
        "position_ids": torch.arange(longest).expand(len(samples), -1),
        "document_ids": torch.zeros_like(ids, dtype=torch.int32),
        "pixel_values": torch.from_numpy(np.concatenate(pixels)),
        "view_rows": torch.tensor(view_rows, dtype=torch.int64),
        "feature_rows": row,
        "feature_columns": column,
        "feature_views": view,
        "feature_patches": patch,
    }


def record_of(golden: Path, record: dict[str, Any]) -> Record:
    """As `tokenize` would write it, with its image as encoded bytes."""
    tokens, image = np.array(record["tokens"], np.uint16), record["record"].get("image")
    starts = np.flatnonzero(tokens == IMAGE_START)
    ends = np.flatnonzero(tokens == IMAGE_END) + 1
    spans = np.stack([starts, ends, np.full(len(starts), 32), np.full(len(starts), 32)], axis=1).astype(
        np.uint32
    )
    paths = [image] if isinstance(image, str) else image or []
    originals = tuple((golden / "assets" / path).read_bytes() for path in paths)
    return Record(record["id"], tokens, spans_of(np.array(record["labels"]) != IGNORED), spans, originals)
