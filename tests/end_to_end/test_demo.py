"""The demo's own parts that need no training: its conversations and its report."""

import json
from pathlib import Path

import numpy as np

from demo import digits, report


def test_digits_are_read_and_drawn_and_held_out_ones_are_not(tmp_path: Path) -> None:
    digits.write(tmp_path)
    captions, drawings, held_out = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("captions", "drawings", "heldout")
    )
    assert (len(captions), len(drawings), len(held_out)) == (1500 * (digits.VIEWS + 2), 1500, 297)
    for item in captions + drawings + held_out:
        text = "".join(turn["value"] for turn in item["conversations"])
        assert text.count("<|image|>") == len(item.get("image", []))
        assert all((tmp_path / image).exists() for image in item.get("image", []))
    seen = {image[:-6] for item in captions + drawings for image in item.get("image", [])}  # without the view
    assert len(seen) == 1500
    assert not seen & {item["image"][0][:-6] for item in held_out}


def test_a_picture_shrinks_back_to_about_its_digit() -> None:
    digit = np.zeros((8, 8))
    digit[2:6, 3:5] = 16.0
    again = digits.small(np.asarray(digits.picture(digit).convert("RGB"))).reshape(8, 8)
    assert np.abs(again - digit).mean() < 1.0


def test_the_report_needs_nothing_but_itself(tmp_path: Path) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    figures = dict.fromkeys(("items", "samples", "rejected", "packs", "seconds"), 3) | {
        "fill": 0.97,
        "caption_accuracy": 0.95,
        "drawing_accuracy": 0.5,
        "resumed_equal": True,
        "share_in_batches": {
            "captions": dict.fromkeys(("mean", "sd", "least", "most", "independent_sd"), 0.5)
        },
    }
    path = tmp_path / "report.html"
    drawings = [report.Drawing(picture, "seven", "one")]
    answers = [report.Answer(picture, "two", "<b>")]
    losses = {"base": [3.0, 1.0], "stage1": [2.0, 1.0], "stage2": [1.0, 0.5]}
    samples = [[("Draw <x>", False), ("[image 4x4]", True)]]
    report.write_report(path, report.Report(figures, losses, 1, drawings, answers, samples))
    page = path.read_text(encoding="utf-8")
    assert 'src="http' not in page
    assert 'href="http' not in page
    assert "&lt;b&gt;" in page
    assert "Draw &lt;x&gt;" in page
    assert page.count('role="img"') == 3
    assert 'class="figure bad"><b>50%' in page
    assert 'class="figure good"><b>95.0%' in page
