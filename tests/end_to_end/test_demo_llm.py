"""The parts of `make demo-llm` that need neither the language model nor training."""

import json
from pathlib import Path

import numpy as np

from demo import english, llm, llm_report
from demo.report import Answer, Drawing
from support.paths import ROOT
from unitoken.common.config import load_config
from unitoken.tokenize.config import TokenizeConfig
from unitoken.train.config import StageConfig


def test_held_out_digits_are_neither_read_nor_drawn_in_training(tmp_path: Path) -> None:
    llm.write_digits(tmp_path)
    readings, drawings, held_out = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("readings", "drawings", "heldout")
    )
    assert (len(readings) * llm.READINGS_PER_CONVERSATION, len(held_out)) == (1500 * llm.VIEWS, 297)
    assert not {image.split("-")[0] for item in held_out for image in item["image"]} & {
        image.split("-")[0] for item in readings + drawings for image in item["image"]
    }
    for item in readings + drawings + held_out:
        text = "".join(turn["value"] for turn in item["conversations"])
        assert text.count("<|image|>") == len(item["image"])


def test_the_questions_and_the_held_out_texts_are_english() -> None:
    questions = english.questions()
    assert len(set(questions)) == len(questions) == 100
    assert english.CAPITAL not in questions
    texts = english.held_out_texts()
    assert len(texts) == english.HELD_OUT_TEXTS
    assert all(text.isprintable() or "\n" in text for text in texts)


def test_its_settings_are_valid() -> None:
    load_config(TokenizeConfig, ROOT / "yamls/demo-llm/tokenize.yaml")
    rows, everything = (
        load_config(StageConfig, ROOT / f"yamls/demo-llm/{stage}.yaml") for stage in llm.STAGES
    )
    assert everything.init_from == rows.save.folder
    assert rows.codec == everything.codec


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    figures = {
        "reading_accuracy": 0.95,
        "drawing_accuracy": 0.5,
        "english_loss": {"before": 3.0, "after growth": 3.01, "after training": 3.05},
        "capital": {"before": "Paris.", "after": "<b>Paris.</b>"},
        "seconds": 1200.0,
    }
    llm_report.write_llm_report(
        tmp_path / "report.html",
        figures,
        {"rows": [3.0, 1.0], "all": [1.0, 0.5]},
        [Answer(picture, "two", "two")],
        [Drawing(picture, "seven", "one")],
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'src="http' not in page
    assert "&lt;b&gt;Paris" in page
    assert 'class="figure bad"><b>50%' in page
    assert 'class="figure good"><b>+0.050' in page
