"""Scores of drawings: by hand for vectors, and with a small random CLIP."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unitoken.codec.conversations import Conversation
from unitoken.common.errors import ConfigError
from unitoken.train.evaluation.config import TaskConfig
from unitoken.train.evaluation.items import TaskItem
from unitoken.train.evaluation.pictures import (
    ClipEmbedder,
    classify,
    clip_distance,
    open_pictures,
    reference_files,
    score_clip,
)
from unitoken.train.evaluation.scoring import score_task
from unitoken.train.evaluation.task_folder import TaskFolder
from unitoken.train.generation.command import png
from unitoken.train.generation.prompts import build_prompt

pytestmark = pytest.mark.filterwarnings("ignore")


def item(answer: str) -> TaskItem:
    return TaskItem("item 0", {}, Conversation("x", (), ()), (answer,))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, as transformers saves one."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    pieces = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{c}</w>" for c in "abcdefgh")]
    (folder / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(pieces),
            "max_position_embeddings": 8,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


def test_clip_embeds_texts_and_pictures_as_transformers(clip_folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    picture = Image.fromarray(np.arange(24 * 20 * 3, dtype=np.uint8).reshape(24, 20, 3))
    embedder = ClipEmbedder(clip_folder, "cpu", "clip")
    model = CLIPModel.from_pretrained(clip_folder)
    texts = ["a b", "abcdefgh" * 5]
    tokens = AutoTokenizer.from_pretrained(clip_folder)(
        texts, padding=True, truncation=True, max_length=8, return_tensors="pt"
    )
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(picture, return_tensors="pt")
    outputs = model(**tokens, **pixels)
    np.testing.assert_allclose(embedder.embed_texts(texts), outputs.text_embeds.detach(), atol=1e-6)
    ours = embedder.embed_pictures([picture] * 33)
    np.testing.assert_allclose(ours[32:], outputs.image_embeds.detach(), atol=1e-6)
    assert ours.shape == (33, 8)


def test_a_folder_without_a_clip_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tasks\.a\.clip: .*: no CLIP of transformers"):
        ClipEmbedder(tmp_path, "cpu", "tasks.a.clip")


def test_the_clip_score_is_a_mean_of_cosines() -> None:
    texts = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    drawings = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    found = score_clip(texts, drawings)
    assert found.of_replies == pytest.approx([100, 60, 0])
    assert found.scores == {"clip_score": pytest.approx(160 / 3)}


def test_the_distance_is_that_computed_by_hand() -> None:
    """The kernel of vectors at a right angle is exp(-2 / 200), of opposite ones exp(-4 / 200)."""
    x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert clip_distance(x, x) == pytest.approx(0)
    assert clip_distance(x, y) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)))
    both = np.concatenate([x, -x])
    within, across = (1 + math.exp(-0.02)) / 2, math.exp(-0.01)
    assert clip_distance(both, y) == pytest.approx(1000 * (within + 1 - 2 * across))


def test_the_distance_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(7, 4)), random.normal(size=(5, 4))
    whole = clip_distance(x, y)
    assert whole == pytest.approx(clip_distance(y, x))
    monkeypatch.setattr("unitoken.train.evaluation.pictures.ROWS", 2)
    assert clip_distance(x, y) == pytest.approx(whole)


def test_a_users_classifier_names_drawings(tmp_path: Path) -> None:
    files = []
    for value in (0, 255):
        files.append(tmp_path / f"{value}.png")
        Image.new("L", (4, 4), value).save(files[-1])
    (tmp_path / "see.py").write_text(
        "def tone(picture):\n    return 'Dark' if picture.getpixel((0, 0)) == (0, 0, 0) else 'light'\n"
        "def number(picture):\n    return 3\n"
        "def broken(picture):\n    raise KeyError('x')\n"
    )
    found = classify(f"{tmp_path}/see.py:tone", "classifier", [item("dark"), item("dark")], files)
    assert (found.scores, found.of_replies) == ({"classifier": 0.5}, ["Dark", "light"])
    for function, message in (("number", "expected text, it returned int"), ("broken", "KeyError: 'x'")):
        with pytest.raises(ConfigError, match=f"^classifier: .*{function}: {message}"):
            classify(f"{tmp_path}/see.py:{function}", "classifier", [item("x")] * 2, files)


def test_references_are_read_from_all_sub_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no pictures in it"):
        reference_files(tmp_path)
    (tmp_path / "art").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "art" / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"no picture")
    files = reference_files(tmp_path)
    assert [path.name for path in files] == ["a.jpg", "b.png"]
    with pytest.raises(ConfigError, match=r"b\.png: cannot be read"):
        list(open_pictures(files))


def test_drawings_are_scored_with_clip_as_the_suite_says(clip_folder: Path, tmp_path: Path) -> None:
    """Two replies to each of two prompts, compared with references that are the drawings themselves."""
    pictures = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    folder = TaskFolder(tmp_path / "task", {})
    folder.begin()
    for unit, number in enumerate((2, 3, 0, 1)):  # in the order of the prompts' lengths
        name = f"{number}.png"
        folder.add(unit, [{"number": number, "picture": name}], {name: png(pictures[number])})
    settings = {"prompts": "a.json", "draw": True, "replies": 2, "metrics": ["clip_score", "clip_distance"]}
    task = TaskConfig.model_validate(
        {**settings, "clip": str(clip_folder), "references": str(tmp_path / "task" / "pictures")}
    )
    items = [
        TaskItem("0", {"prompt": "a b"}, build_prompt("a b"), ()),
        TaskItem("1", {"caption": "c d"}, build_prompt("draw it"), ()),
    ]
    found = score_task("task", task, items, folder, 4, "cpu")
    clip = ClipEmbedder(clip_folder, "cpu", "clip")
    drawn = clip.embed_pictures([Image.fromarray(picture) for picture in pictures])
    expected = score_clip(clip.embed_texts(["a b", "a b", "c d", "c d"]), drawn)
    assert found.scores == {**expected.scores, "clip_distance": pytest.approx(0, abs=1e-9)}
    assert set(found.measured_with) == {"clip", "references"}
    lines = [json.loads(line) for line in (tmp_path / "task" / "replies.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2, 3]
    assert [line["clip_score"] for line in lines] == pytest.approx(expected.of_replies)
