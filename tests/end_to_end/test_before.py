"""Datasets, plans, checkpoints and exported models of an earlier commit are read, and made again the same.

tests/support/make_before.py made the files in tests/data/before.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import StreamingDataset
from transformers import AutoTokenizer
from typer.testing import CliRunner

from support.make_before import DRAWING, QUESTION, machine
from support.paths import DATA, ROOT
from support.stages import curve
from support.tokenizing import content, run_here
from unitoken.codec.passages import describe
from unitoken.common.config import load_config
from unitoken.dataset.record import Record
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.plan.build import Plan
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.tokenize.checks.verify import verify
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.merge import merge
from unitoken.train.__main__ import app
from unitoken.train.check import check_stage
from unitoken.train.config import StageConfig
from unitoken.train.stage import run_stage

BEFORE = DATA / "before"
TOKENIZER, IMAGE_TOKENIZER = ROOT / "demo/assets/tokenizer", ROOT / "demo/assets/vqgan"
# What these two say depends on where the items and the tokenizers are.
NAMES_OF_THE_MACHINE = {"input.json", "settings.yaml"}

pytestmark = pytest.mark.filterwarnings("ignore")  # Composer's, streaming's and transformers' own


def stage(folder: Path) -> StageConfig:
    """The settings that the earlier run left, with today's places of data and folders."""
    places = {
        "data.streams.questions.local": BEFORE / "dataset",
        "data.streams.others.local": BEFORE / "dataset",
        "data.cache": folder / "cache",
        "save.folder": folder / "run",
    }
    return load_config(
        StageConfig, BEFORE / "run" / "stage.yaml", [f"{key}={path}" for key, path in places.items()]
    )


def load_plan(config: StageConfig) -> Plan:
    """The plan of the stage's data; images bring features, as its model has a vision tower."""
    checked = check_stage(config, 1)
    assert checked.sizes.vision is not None
    views = Views(checked.sizes.vision.image_size, checked.sizes.vision.patch_size, config.data.anyres)
    loader = build_loader(
        config.data,
        views=views,
        vocabulary=checked.vocabulary,
        batch_packs=config.data.global_batch,
        compat=False,
    )
    return loader.dataset.plan


def saved_plans(folder: Path) -> dict[str, str]:
    return {name: sha256 for name, sha256 in content(folder).items() if not name.endswith("lock")}


def generate(*arguments: object) -> None:
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exit_code == 0, result.output


def test_the_same_items_become_the_same_files(tmp_path: Path) -> None:
    """Byte for byte; with another pyarrow than constraints.txt names, samples.parquet may differ."""
    recorded = (BEFORE / "dataset" / "settings.yaml").read_text()
    (tmp_path / "settings.yaml").write_text(recorded.replace("/before/unitoken", str(ROOT)))
    config = load_config(TokenizeConfig, tmp_path / "settings.yaml")
    run_here(config, BEFORE / "items" / "items.json", tmp_path / "dataset", splits=2)
    merge(str(tmp_path / "dataset"))
    made, expected = content(tmp_path / "dataset"), content(BEFORE / "dataset")
    assert made.keys() == expected.keys()
    assert {name for name in made if made[name] != expected[name]} <= NAMES_OF_THE_MACHINE


def test_an_earlier_dataset_is_verified() -> None:
    assert verify(str(BEFORE / "dataset")) == []


def test_an_earlier_dataset_reads_back_to_its_items() -> None:
    items = json.loads((BEFORE / "items" / "items.json").read_text())
    samples = [item for item in items if item.get("id") != "reject"]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    vocabulary = Vocabulary.load(BEFORE / "dataset" / "vocabulary.json")
    dataset = StreamingDataset(local=str(BEFORE / "dataset"), batch_size=1)
    for number, item in enumerate(samples):
        record = Record.from_mds(dataset[number])
        pieces = describe(record, vocabulary, tokenizer)
        shown = "".join(
            "<|image|>" if kind == "image" else text for kind, text, _ in pieces if kind != "special"
        )
        assert shown == "".join(turn["value"] for turn in item["conversations"])
        names = [item["image"]] if isinstance(item.get("image"), str) else item.get("image", [])
        assert [bytes(image) for image in record.images] == [
            (BEFORE / "items" / name).read_bytes() for name in names
        ]
    assert len(dataset) == len(samples) == 12


def test_the_same_mixture_gets_the_same_plan(tmp_path: Path) -> None:
    """The hash is the folder's name; ids, sizes of packs and the report are its files."""
    load_plan(stage(tmp_path))
    assert saved_plans(tmp_path / "cache" / "plans") == saved_plans(BEFORE / "plans")


def test_an_earlier_plan_is_used_as_it_is(tmp_path: Path) -> None:
    plans = shutil.copytree(BEFORE / "plans", tmp_path / "cache" / "plans")
    (ids,) = plans.glob("*/*/ids.npy")
    file = ids.stat().st_ino
    assert load_plan(stage(tmp_path)).ids.tolist() == np.load(ids).tolist()
    assert ids.stat().st_ino == file, "the plan was made anew"
    assert saved_plans(plans).keys() == saved_plans(BEFORE / "plans").keys(), "another plan was made"


def test_an_earlier_run_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    """The losses of the checkpoint's weights bit for bit, with the same processor, torch and threads.

    Others may add numbers in another order, as the gradient of the loss does since it is made in the forward
    pass: what follows the next update of the weights is the same within 1e-6.
    """
    run = shutil.copytree(BEFORE / "run", tmp_path / "run", symlinks=True)
    config = stage(tmp_path)
    run_stage(config, check_stage(config, 1))
    expected = curve(BEFORE)
    if machine() == json.loads((BEFORE / "machine.json").read_text()):
        assert curve(run)[:3] == expected[:3]
    assert [number for pair in curve(run) for number in pair] == pytest.approx(
        [number for pair in expected for number in pair], rel=1e-6
    )


def test_an_earlier_export_answers_and_draws_the_same(tmp_path: Path) -> None:
    codec = {"tokenizer": TOKENIZER, "vision.weights": IMAGE_TOKENIZER, "vision.precision": "fp32"}
    settings = [f"codec.{key}={value}" for key, value in codec.items()]
    question = [str(BEFORE / part) if part.startswith("items/") else part for part in QUESTION]
    generate(BEFORE / "model", *question, "--out", tmp_path / "answer", *settings)
    generate(BEFORE / "model", *DRAWING, "--out", tmp_path / "drawing", *settings)
    answer, drawing = "answer/0000.txt", "drawing/0000.png"
    assert (tmp_path / answer).read_text() == (BEFORE / answer).read_text()
    assert Image.open(tmp_path / drawing).tobytes() == Image.open(BEFORE / drawing).tobytes()
