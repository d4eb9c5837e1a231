"""A mixture by tokens, as large as real ones, from the sidecars to the plan."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from support.small_datasets import small_vocabulary, write_manifest
from unitoken.dataset.manifest import INDEX, REJECTS, SIDECAR, VOCABULARY
from unitoken.dataset.sidecar import samples_schema
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.plan.build import build
from unitoken.streaming_data.plan.lengths import read_lengths
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import open_sources


def write_sidecar(folder: Path, samples: int, mean: float, images: int = 0, shard: int = 20_000) -> Path:
    """Write a dataset without its shards, which a plan does not need."""
    rng = np.random.default_rng([samples, images])
    folder.mkdir()
    tokens = np.clip(rng.lognormal(np.log(mean), 1.0, samples), 2, 6000).astype(np.uint32) + 1060 * images
    columns = {
        "id": [f"{n}" for n in range(samples)],
        "tokens": tokens,
        "target_tokens": tokens // 2,
        "images": np.full(samples, images),
        "question_images": np.full(samples, images),
        "image_sizes": pyarrow.ListArray.from_arrays(
            np.arange(samples + 1, dtype=np.int32) * 2 * images, np.full(samples * 2 * images, 640)
        ),
        "generated": pyarrow.ListArray.from_arrays(
            np.arange(samples + 1, dtype=np.int32) * images, np.zeros(samples * images, bool)
        ),
    }
    schema = samples_schema()
    table = pyarrow.table(
        {name: pyarrow.array(columns[name]).cast(schema.field(name).type) for name in schema.names}, schema
    )
    pyarrow.parquet.write_table(table, folder / SIDECAR)
    shards = [
        {
            "format": "mds", "version": 2, "compression": None, "zip_data": None,
            "samples": min(shard, samples - begin),
            "raw_data": {"basename": f"shard.{begin:09}.mds", "bytes": 1, "hashes": {}},
        }
        for begin in range(0, samples, shard)
    ]  # fmt: skip
    (folder / INDEX).write_text(json.dumps({"version": 2, "shards": shards}))
    (folder / REJECTS).write_bytes(b"")
    small_vocabulary().save(folder / VOCABULARY)
    write_manifest(folder, [], small_vocabulary())
    return folder


@pytest.mark.parametrize("unit", ["tokens", "target_tokens", "samples"])
def test_shares_of_a_million_samples_are_exact_to_a_thousandth(tmp_path: Path, unit: str) -> None:
    asked = {"chat": 0.45, "short": 0.05, "pictures": 0.2, "long": 0.3}
    sizes = {
        "chat": (400_000, 300),
        "short": (400_000, 25),
        "pictures": (100_000, 100, 1),
        "long": (100_000, 1500),
    }
    streams = {
        name: {"local": str(write_sidecar(tmp_path / name, *size)), "proportion": asked[name]}
        for name, size in sizes.items()
    }
    config = DataConfig.model_validate(
        {"streams": streams, "packed_length": 4096, "global_batch": 128, "unit": unit}
    )
    sources = open_sources(config)
    views = Views(384, 14)
    recipe = Recipe.of(config, sources, views)
    report = build(recipe, [read_lengths(source, recipe, views) for source in sources], 0, None).report
    total = sum(getattr(share, unit) for share in report.streams)
    for share in report.streams:
        assert share.asked == pytest.approx(asked[share.name], abs=1e-5)  # whole samples
        assert getattr(share, unit) / total == pytest.approx(share.asked, rel=1e-3), report.table()
    assert report.fill > 0.97
    assert {share.name: share.over_long > 0 for share in report.streams} == {
        "chat": True,
        "short": False,
        "pictures": True,
        "long": True,
    }
