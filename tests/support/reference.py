"""The reference's batches, rebuilt from its recording in tests/data/golden, to compare our model with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from unitoken.dataset.record import IGNORED, Record, spans_of
from unitoken.dataset.vision_views import NEWLINE, Pixels, Views
from unitoken.streaming_data.reading.batch import target_places
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
    pixels: Pixels  # (V, 3, 384, 384) of its first image; a text-only sample has a black one
    layout: npt.NDArray[np.int64]  # (F,) view * 729 + patch, or NEWLINE


def read_records(golden: Path) -> dict[str, Any]:
    """Read the recorded tokens and labels (part A) by the id of their item."""
    lines = (golden / "dev/A_tokenization.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def read_model(golden: Path) -> UniToken:
    """Load the tiny model of the recording in float32 and in training mode."""
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
    """Make the reference's sample of a record with its first image.

    Where there is no image, or where it `failed` to load, the reference takes one black view; it masks all
    labels of a sample whose image failed.
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
    """Make the samples of a recorded batch (part D), and check that their pixels are the recorded ones."""
    samples = []
    for entry in case["samples"]:
        failed = entry["labels_all_masked"]
        samples.append(sample(golden, records[entry["record_id"]], case["variant"], failed))
        if entry["raw_image"]:
            assert sha256_of(samples[-1].pixels) == entry["pixel_sha256"], entry["record_id"]
    return samples


def sha256_of(pixels: Pixels) -> str:
    """Hash the float32 pixels as the reference's processor makes them."""
    normalised = ((pixels / 255).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
    return hashlib.sha256(np.ascontiguousarray(normalised).tobytes()).hexdigest()


def reference_batch(samples: Sequence[Sample], max_length: int = 4096) -> dict[str, Tensor]:
    """Make a batch as the reference does.

    Samples are cropped and padded with id 0 on the right; features and newlines are inserted before the end
    of the image; each row is one document, whose positions go on over the padding.
    """
    # It pads to the longest sample before it inserts, and then adds room for the longest image to every row.
    longest_text = max(min(len(one.tokens), max_length) for one in samples)
    longest = longest_text + max(len(one.layout) for one in samples) + 1
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    targets = torch.full((len(samples), longest), IGNORED)
    pixels: list[Pixels] = [np.zeros((0, 3, 384, 384), np.uint8)]
    view_rows: list[int] = []
    features = [np.zeros((0, 4), np.int64)]  # row, column, view, patch
    for row, one in enumerate(samples):
        tokens, labels = one.tokens[:max_length], one.labels[:max_length]
        if IMAGE_END in tokens:
            at = tokens.index(IMAGE_END)
            places = np.flatnonzero(one.layout != NEWLINE)
            view, patch = np.divmod(one.layout[places], 729)
            rows = np.full(len(places), row)
            features.append(np.stack([rows, at + 1 + places, view + len(view_rows), patch], axis=1))
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
        **target_places(targets),
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
    """Make the record that `tokenize` would write, with its images as encoded bytes."""
    tokens, image = np.array(record["tokens"], np.uint16), record["record"].get("image")
    starts = np.flatnonzero(tokens == IMAGE_START)
    ends = np.flatnonzero(tokens == IMAGE_END) + 1
    latents = np.full(len(starts), 32)  # each way
    spans = np.stack([starts, ends, latents, latents], axis=1).astype(np.uint32)
    paths = [image] if isinstance(image, str) else image or []
    originals = tuple((golden / "assets" / path).read_bytes() for path in paths)
    return Record(record["id"], tokens, spans_of(np.array(record["labels"]) != IGNORED), spans, originals)
