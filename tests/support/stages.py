"""A small stage of training, for tests that run one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from support.small_datasets import make_record, small_vocabulary, write_dataset
from unitoken.common.config import load_config
from unitoken.train.config import StageConfig

DECODER = {
    "vocab_size": 170,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
ALL = ["vit", "adapter", "model", "lm_head"]


def write_data(folder: Path) -> Path:
    """Write 90 samples with 0 to 2 input images or one drawn image. Some batches of a rank have no image."""
    vocabulary = small_vocabulary()
    records = [make_record(f"q{n}", vocabulary, 8 + n % 5, question_images=n % 3) for n in range(60)]
    records += [make_record(f"a{n}", vocabulary, 6, answer_images=1) for n in range(30)]
    return write_dataset(folder, records, vocabulary)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings with 9 batches of 4 packs per epoch; `folder` holds data/ and gets run/ and cache/."""
    return {
        "name": "tiny",
        "model": {"decoder": DECODER, "vision": VISION, "dropout": 0.2},
        "trainable": ALL,
        "optimizer": {"lr": 3e-3, "warmup": "0.1ep"},
        "max_duration": "1ep",
        "data": {
            "streams": {"all": {"local": str(folder / "data")}},
            "packed_length": 64,
            "global_batch": 4,
            "cache": str(folder / "cache"),
        },
        "microbatch": 1,
        "precision": "fp32",
        "save": {"folder": str(folder / "run"), "interval": "2ba", "keep": 2},
        "log": {"every": 100, "tensorboard": False},
        **changes,
    }


def write_stage(folder: Path, **changes: Any) -> Path:
    path = folder / f"{changes.get('name', 'tiny')}.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)))
    return path


def stage(folder: Path, *overrides: str, **changes: Any) -> StageConfig:
    return load_config(StageConfig, write_stage(folder, **changes), overrides)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of steps in metrics.jsonl."""
    return [
        line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval"] for line in lines if "eval" in line}


def curve(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(run)]
