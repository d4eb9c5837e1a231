"""A document gives the same loss and gradients in a pack as alone, with the real collate function."""

import dataclasses
import io
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import Tensor

from support.small_datasets import data_config, make_record, small_vocabulary, write_dataset, write_manifest
from unitoken.dataset.manifest import SIDECAR
from unitoken.dataset.record import Record
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.plan.lengths import read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.reading.batch import PackedBatch, num_targets, num_tokens, split_batch, unpack
from unitoken.streaming_data.reading.collate import Collate
from unitoken.streaming_data.sources import open_sources
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.config import DecoderConfig, ModelConfig, VisionTowerConfig
from unitoken.train.model.unitoken import UniToken, build_model

VOCABULARY = small_vocabulary()
DECODER = DecoderConfig(
    vocab_size=170, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
VISION = VisionTowerConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
SIZES = (
    (4, 4),
    (40, 15),
    (9, 30),
    (16, 16),
    (24, 8),
)  # of the images, one after the other: each canvas of AnyRes


def documents() -> list[Record]:
    """(text, question images, generated images): text only, one image, several, in answers, and both."""
    kinds = [(9, 0, 0), (7, 1, 0), (5, 3, 0), (6, 0, 1), (8, 1, 1), (30, 0, 0), (12, 2, 2), (4, 1, 0)]
    records = [make_record(f"d{n}", VOCABULARY, *kind) for n, kind in enumerate(kinds)]
    drawn = iter(range(100))
    return [
        dataclasses.replace(record, images=tuple(picture(next(drawn)) for _ in record.images))
        for record in records
    ]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    width, height = SIZES[number % len(SIZES)]
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def build(attention: Literal["sdpa", "flex"]) -> UniToken:
    config = ModelConfig(decoder=DECODER, vision=VISION, dropout=0.0, attention=attention)
    model = build_model(DECODER, VISION, config)
    load_weights(model, {}, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # gains of 1 and embeddings of 0.02 would hide mix-ups
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return model.train()


def learn(model: UniToken, batches: list[PackedBatch]) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of all batches together, with equal weight for each supervised token."""
    model.zero_grad()
    counts = [num_targets(batch) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        loss = model(unpack(batch)).total * (count / sum(counts))
        loss.backward()
        total += loss.item()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return total, gradients


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of a tensor's gradient, relative to its norm."""
    assert found.keys() == expected.keys()
    everything = torch.stack([gradient.double().norm() for gradient in expected.values()]).norm().item()

    def difference(name: str) -> float:
        size = expected[name].double().norm().item() or 1.0  # without any features
        # The bias of the tower's keys moves all scores of a query alike: its gradient is only rounding.
        of = everything if name.startswith("vit.") and name.endswith("k_proj.bias") else size
        return (found[name].double() - expected[name].double()).norm().item() / of

    return max((difference(name), name) for name in expected)


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("anyres", [False, True], ids=["base", "anyres"])
@pytest.mark.parametrize(
    ("continuous", "compat"), [("questions", False), ("all", False), ("all", True), ("none", False)]
)
def test_packed_documents_give_the_gradients_of_single_ones(
    continuous: str, compat: bool, anyres: bool, attention: Literal["sdpa", "flex"]
) -> None:
    """Also bug 22: a mean of the documents' means would weigh each token by the length of its document.

    Measured: 8e-8 of the loss, 1e-6 of a gradient; both are as far from the numbers in float64.
    """
    views = Views(8, 4, anyres)

    def collate(length: int, *packs: list[Record]) -> PackedBatch:
        return Collate(length, views, continuous, VOCABULARY.separator, VOCABULARY.newline, compat)(packs)

    every = documents()
    lengths = [num_tokens(collate(999, [document])) for document in every]
    model = build(attention)
    batch = collate(max(sum(lengths[:4]), sum(lengths[4:])) + 9, every[:4], every[4:])
    alone = learn(
        model, [collate(length, [document]) for length, document in zip(lengths, every, strict=True)]
    )
    assert len(alone[1]) == len(list(model.parameters()))
    for batches in ([batch], split_batch(batch, 1)):  # whole, and in microbatches of one pack
        packed = learn(model, batches)
        assert packed[0] == pytest.approx(alone[0], rel=1e-5)
        difference, name = worst(packed[1], alone[1])
        assert difference < 1e-5, name


@pytest.mark.parametrize("anyres", [False, True], ids=["base", "anyres"])
@pytest.mark.parametrize("continuous", ["questions", "all", "none"])
def test_the_plan_knows_how_long_each_document_becomes(continuous: str, anyres: bool, tmp_path: Path) -> None:
    """The sidecar alone tells it, before any image is opened; otherwise packs would not hold their plan."""
    every, views = documents(), Views(8, 4, anyres)
    write_dataset(tmp_path, every, VOCABULARY)
    sizes = [
        [side for data in record.images for side in Image.open(io.BytesIO(data)).size] for record in every
    ]
    table = pyarrow.parquet.read_table(tmp_path / SIDECAR)
    column = pyarrow.array(sizes, pyarrow.list_(pyarrow.uint32()))
    pyarrow.parquet.write_table(
        table.set_column(table.column_names.index("image_sizes"), "image_sizes", column), tmp_path / SIDECAR
    )
    write_manifest(tmp_path, every, VOCABULARY)
    streams = {"a": {"local": str(tmp_path)}}
    config = data_config(tmp_path, streams, packed_length=999, continuous=continuous, anyres=anyres)
    sources = open_sources(config)
    planned = read_lengths(sources[0], Recipe.of(config, sources, views), views).lengths.tolist()
    collate = Collate(999, views, continuous, VOCABULARY.separator, VOCABULARY.newline, compat=False)
    assert planned == [num_tokens(collate([[document]])) for document in every]
