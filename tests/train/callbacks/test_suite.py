"""A model is scored on a suite while it trains, and training is not affected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from support.checkpoints import all_tensors
from support.drawn import ROOM, drawing_stage, write_data
from support.paths import ROOT
from support.ranks import finish, start
from support.stages import curve, metrics
from unitoken.common.errors import ConfigError
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.locations import find_origin
from unitoken.train.config import StageConfig
from unitoken.train.run import run_folder
from unitoken.train.stage import run_stage

pytestmark = pytest.mark.filterwarnings("ignore")

SEE = """\
import random
import numpy
import torch

def tone(picture):
    random.random(), numpy.random.rand(), torch.rand(1)
    return "two"
"""

SHAPE = ("max_duration=4ba", "data.packed_length=128")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a suite with a task of each kind, whose classifier draws random numbers."""
    folder = tmp_path_factory.mktemp("suite")
    write_data(folder / "data")
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "a.png")
    (folder / "see.py").write_text(SEE)
    question = {"prompt": "What is it? <|image|>", "image": "a.png", "answer": "two"}
    (folder / "read.json").write_text(json.dumps([question] * 3))
    (folder / "draw.json").write_text(json.dumps([{"prompt": "Draw a two.", "answer": "two"}]))
    drawing = {"prompts": "draw.json", "draw": True, "size": [8, 8], "metrics": ["classifier"]}
    tasks = {
        "reading": {
            "prompts": "read.json",
            "metrics": ["exact_match"],
            "max_tokens": 3,
            "batch": 2,
            "temperature": 1,
        },
        "drawing": {**drawing, "classifier": "see.py:tone"},
        "losses": {"dataset": "data", "limit": 20},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    return folder


def settings(folder: Path, name: str, suite: bool, *overrides: str) -> StageConfig:
    """A run named `name` of four batches, with dropout."""
    changes: dict[str, Any] = {"name": name}
    if suite:
        changes["suite"] = {"file": str(folder / "suite.yaml"), "interval": "3ba"}
    shape = (f"save.folder={folder / name}", *SHAPE)
    return drawing_stage(folder, *shape, *overrides, **changes)


def suite_lines(run: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["suite"] for line in lines if "suite" in line}


def test_a_suite_does_not_change_training(folder: Path) -> None:
    """Losses, weights and random states are the same bit for bit, with dropout."""
    for name in ("without", "with"):
        config = settings(folder, name, name == "with")
        run_stage(config, check_stage(config, 1))
    assert curve(folder / "with") == curve(folder / "without")
    assert len(curve(folder / "with")) == 4
    files = [find_origin(str(folder / name)) for name in ("without", "with")]
    first, second = (all_tensors(file) for file in files)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    states = [run_folder.read_state(file)["rng"] for file in files]
    assert str(states[0]) == str(states[1])
    assert torch.equal(states[0][0]["torch"], states[1][0]["torch"])


def test_scores_are_written_at_the_interval_and_at_the_end(folder: Path) -> None:
    found = suite_lines(folder / "with")
    assert list(found) == [3, 4]
    assert found[3]["drawing/classifier"] == 1.0
    assert found[3]["losses/loss"] != found[4]["losses/loss"]
    assert sorted(path.name for path in (folder / "with" / "suite").iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]
    result = json.loads((folder / "with" / "suite" / "step-00000004" / "result.json").read_bytes())
    assert result["checkpoint"]["step"] == 4
    scores = {
        f"{name}/{key}": value
        for name, task in result["tasks"].items()
        for key, value in task["scores"].items()
    }
    assert scores == found[4]
    assert len(metrics(folder / "with")) == 4


@pytest.mark.slow
def test_two_ranks_score_from_their_shards_together(folder: Path) -> None:
    """FSDP2: losses are those of two ranks without a suite."""
    for name in ("two-without", "two"):
        settings(folder, name, name == "two")
        overrides = [f"save.folder={folder / name}", *SHAPE, f"model.decoder.vocab_size={ROOM}"]
        assert finish(start(2, [ROOT / "train.py", folder / f"{name}.yaml", *overrides])) == [0, 0]
    assert curve(folder / "two") == curve(folder / "two-without")
    assert list(suite_lines(folder / "two")) == [3, 4]


def test_a_wrong_suite_is_found_before_weights_are_loaded(folder: Path) -> None:
    config = settings(folder, "wrong", True, f"suite.file={folder}/nowhere.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        check_stage(config, 1)
    config = settings(folder, "wrong", True, "codec=null")
    with pytest.raises(ConfigError, match=r"prompts take the data's tokenizers"):
        check_stage(config, 1)
