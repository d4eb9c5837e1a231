"""The page of `make demo-llm`: its figures and pictures in one HTML file that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo.report import STYLE, Answer, Drawing, answer_figure, curves, drawings_grid
from unitoken.common.html_page import figure_tile, html_page, html_table

READING_GOAL, DRAWING_GOAL, ENGLISH_GOAL = 0.9, 0.6, 0.1
SHOWN_ANSWERS = 30


def _tiles(figures: Mapping[str, Any]) -> str:
    english = figures["english_loss"]
    worse = english["after training"] - english["before"]
    read, drawn = figures["reading_accuracy"], figures["drawing_accuracy"]
    return "".join([
        figure_tile(f"{read:.1%}", "of held-out digits read correctly", read >= READING_GOAL),
        figure_tile(f"{drawn:.0%}", "of drawn digits recognized as requested", drawn >= DRAWING_GOAL),
        figure_tile(f"{worse:+.3f}", "nats a token of held-out English", worse <= ENGLISH_GOAL),
        figure_tile(f"{figures['seconds'] / 60:.0f} min", "from the package index to this page"),
    ])  # fmt: skip


def _english(figures: Mapping[str, Any]) -> str:
    losses = [(name, f"{loss:.4f}") for name, loss in figures["english_loss"].items()]
    question = "“What is the capital of France?”"
    return f"""{html_table(["model", "nats a token"], losses)}<p></p>
{html_table(["model", question], figures["capital"].items())}"""


def write_llm_report(
    path: Path,
    figures: Mapping[str, Any],
    losses: Mapping[str, Sequence[float]],
    answers: Sequence[Answer],
    drawings: Sequence[Drawing],
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        figures: the JSON object that the demo prints.
        losses: the loss of every step of each stage.
        answers: to the questions about held-out digits.
        drawings: a row for each digit.
    """
    shown = "".join(map(answer_figure, answers[:SHOWN_ANSWERS]))
    body = f"""<h1>SmolLM2 reads and draws digits</h1>
<p>SmolLM2-135M-Instruct, a language model of 135 million parameters that has never seen a picture, got rows
for image tokens in its vocabulary, a small vision tower and an adapter. Conversations about handwritten
digits, in its own chat template, taught it to read and to draw them.</p>
<div class="figures">{_tiles(figures)}</div>
<section><h2>Loss</h2><p>Cross-entropy over the tokens that are trained on: each step, and smoothed. First the
new rows and the adapter alone, then everything.</p>{curves(losses)}</section>
<div class="columns">
<section><h2>“Draw a seven.”</h2><p>Ten drawings of each digit; ten pictures of each were in its training.
A red frame marks a drawing in which a simple classifier, trained on the real digits, sees another
digit.</p>{drawings_grid(drawings)}</section>
<section><h2>“What digit is this?”</h2><p>Digits that were held out of training, with the model's answers.
Wrong answers are red.</p><div class="answers">{shown}</div></section>
</div>
<section><h2>What became of its English</h2><p>The loss on texts of Python's reference, which nothing was
trained on, and an answer to a question.</p>{_english(figures)}</section>
<footer>Written by <code>make demo-llm</code>. Everything on this page was measured in that run.</footer>"""
    path.write_text(html_page("A language model that learns to see", body, STYLE), encoding="utf-8")
