"""The demo's report: its figures and pictures in one HTML file that needs no other file."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from unitoken.common.html_page import figure_tile, html_page, html_table, picture_url
from unitoken.common.svg_charts import line_chart

STYLE = """
.curves { display: grid; gap: 12px 20px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)) }
.curves > div { min-width: 0 }
.columns { display: grid; grid-template-columns: 6fr 5fr; gap: 20px } .columns > section { min-width: 0 }
@media (max-width: 860px) { .columns { grid-template-columns: minmax(0, 1fr) }
  .columns section + section { margin-top: 0 } }
img { image-rendering: pixelated }
table.grid { border-collapse: separate; border-spacing: 4px } table.grid td { padding: 0 }
table.grid th { font-weight: 600; color: var(--soft); font-size: 13.5px; text-align: right;
  padding-right: 8px }
table.grid img { display: block; width: 44px; border-radius: 5px; border: 2.5px solid transparent }
table.grid img.wrong { border-color: var(--bad) }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(66px, 1fr)); gap: 12px 8px }
.answers figure { margin: 0; text-align: center; font-size: 13px }
.answers img { width: 56px; border-radius: 6px }
.answers .wrong { color: var(--bad); font-weight: 600 }
.tokens { font: 13.5px/2.15 ui-monospace, "DejaVu Sans Mono", monospace; margin: 10px 0 16px }
.tokens span { border: 1px solid var(--line); border-radius: 5px; padding: 2px 5px; margin-right: 3px;
  white-space: pre-wrap; color: var(--soft) }
.tokens .trained { border-color: var(--accent); color: var(--accent) }
"""

TITLES = {
    "base": "Base",
    "stage1": "Stage I",
    "stage2": "Stage II",
    "rows": "New rows and adapter",
    "all": "Everything",
}


@dataclass(frozen=True)
class Answer:
    """What the model answered about a held-out digit."""

    picture: npt.NDArray[np.uint8]
    digit: str  # the digit in the picture, as a word
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the digit's word and nothing else."""
        return self.answer == self.digit


@dataclass(frozen=True)
class Drawing:
    """A digit that the model drew."""

    picture: npt.NDArray[np.uint8]
    digit: str  # the digit that was requested, as a word
    read: str  # the digit that the classifier sees in the picture

    @property
    def is_right(self) -> bool:
        """Whether the classifier sees the digit that was requested."""
        return self.read == self.digit


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    Args:
        figures: the JSON object that the demo prints.
        losses: the loss of every step of each stage.
        resumed_at: the step of the last stage after which it was killed.
        drawings: for the grid of drawings, a row for each digit.
        answers: for the list of answers.
        samples: conversations as (piece of text, whether it is trained on).
    """

    figures: Mapping[str, Any]
    losses: Mapping[str, Sequence[float]]
    resumed_at: int
    drawings: Sequence[Drawing]
    answers: Sequence[Answer]
    samples: Sequence[Sequence[tuple[str, bool]]]


def png(picture: npt.NDArray[np.uint8]) -> str:
    """Encode a picture as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return picture_url(buffer.getvalue())


def _smooth(values: Sequence[float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Average each step with its neighbours, as a batch of drawings has a higher loss than one of answers.

    Returns:
        The steps, and the mean at each.
    """
    window = max(1, len(values) // 20)
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.arange(len(means)) + window // 2, means


def curves(losses: Mapping[str, Sequence[float]], resumed_at: int | None = None) -> str:
    """Draw the loss by step of each stage, side by side; a kill in the last is marked."""
    parts = []
    for name, values in losses.items():
        steps, means = _smooth(values)
        is_last = name == list(losses)[-1]
        marks = [(float(resumed_at), "killed, resumed")] if resumed_at is not None and is_last else []
        lines = {
            "each step": (list(range(len(values))), list(values)),
            "smoothed": (steps.tolist(), means.tolist()),
        }
        chart = line_chart(lines, x_label="step", y_label="loss a token", marks=marks)
        parts.append(f"<div><h3>{html.escape(TITLES.get(name, name))}</h3>{chart}</div>")
    return f'<div class="curves">{"".join(parts)}</div>'


def _marked(is_right: bool) -> str:
    return "" if is_right else ' class="wrong"'


def drawings_grid(drawings: Sequence[Drawing]) -> str:
    """Return a table with a row of drawings for each digit."""
    rows = []
    for word in dict.fromkeys(drawing.digit for drawing in drawings):
        cells = "".join(_drawing(drawing) for drawing in drawings if drawing.digit == word)
        rows.append(f"<tr><th>{word}</th>{cells}</tr>")
    return f'<table class="grid">{"".join(rows)}</table>'


def _drawing(drawing: Drawing) -> str:
    title = f"asked for {drawing.digit}, read as {drawing.read}"
    picture = f'src="{png(drawing.picture)}" alt="{drawing.read}" title="{title}"'
    return f"<td><img {picture}{_marked(drawing.is_right)}></td>"


def answer_figure(answer: Answer) -> str:
    """Return a picture with the model's answer below it."""
    caption = (
        f"<figcaption{_marked(answer.is_right)}>{html.escape(answer.answer) or '(nothing)'}</figcaption>"
    )
    return f'<figure><img src="{png(answer.picture)}" alt="{answer.digit}">{caption}</figure>'


def _shares(streams: Mapping[str, Mapping[str, float]]) -> str:
    """The table of each stream's share in the batches."""
    columns = ("mean", "sd", "least", "most", "independent_sd")
    titles = ("stream", "mean", "standard deviation", "least", "most", "if drawn independently")
    rows = [(name, *(f"{shares[column]:.1%}" for column in columns)) for name, shares in streams.items()]
    return html_table(titles, rows)


def _tokens(sample: Sequence[tuple[str, bool]]) -> str:
    spans = "".join(
        f"<span{' class=trained' if trained else ''}>{html.escape(text)}</span>" for text, trained in sample
    )
    return f'<div class="tokens">{spans}</div>'


def _tiles(figures: Mapping[str, Any]) -> str:
    """The boxes with one figure each; green or red where there is a goal."""
    read, drawn = figures["caption_accuracy"], figures["drawing_accuracy"]
    equal = figures["resumed_equal"]
    tiles = [
        figure_tile(f"{read:.1%}", "of held-out digits read correctly", read >= 0.9),
        figure_tile(f"{drawn:.0%}", "of drawn digits recognized as requested", drawn >= 0.7),
        figure_tile("equal" if equal else "different", "losses after kill -9 and resume, bit for bit", equal),
        figure_tile(
            f"{figures['fill']:.1%}", f"of an epoch's {figures['packs']:,} packs is filled with tokens"
        ),
        figure_tile(
            f"{figures['samples']:,}",
            f"samples from {figures['items']:,} items, {figures['rejected']} rejected",
        ),
        figure_tile(f"{figures['seconds']:.0f} s", "from raw pictures to this page"),
    ]
    return "".join(tiles)


def write_report(path: Path, report: Report) -> None:
    """Write the page."""
    body = f"""<h1>One model that reads and draws digits</h1>
<p>Conversations about scikit-learn's handwritten digits were tokenized, mixed, packed and streamed to a small
UniToken model on two ranks with FSDP2: base training on text and image tokens, Stage I (vision tower and
adapter), Stage II (all parameters).</p>
<div class="figures">{_tiles(report.figures)}</div>
<section><h2>Loss</h2><p>Cross-entropy and z-loss over the tokens that are trained on: each step, and
smoothed. Stage II was killed with SIGKILL halfway, at the dashed line, and resumed by the same command.</p>
{curves(report.losses, report.resumed_at)}</section>
<section><h2>The mixture in every batch</h2><p>Share of each stream in the tokens of Stage II's global
batches of eight packs. The last column is the standard deviation if conversations were drawn one by one.</p>
{_shares(report.figures["share_in_batches"])}</section>
<div class="columns">
<section><h2>“Draw a seven.”</h2><p>Ten drawings of each digit, sampled token by token, with guidance away
from what the model draws without a prompt. A red frame marks a drawing in which a simple classifier, trained
on the real digits, sees another digit.</p>{drawings_grid(report.drawings)}</section>
<section><h2>“What digit is this?”</h2><p>Digits that were held out of training, with the model's answers.
Wrong answers are red.</p>
<div class="answers">{"".join(map(answer_figure, report.answers))}</div></section>
</div>
<section><h2>What the model sees</h2><p>One conversation of each direction. Blue tokens are trained on; the
others are only read.</p>
{"".join(_tokens(sample) for sample in report.samples)}</section>
<footer>Written by <code>make demo</code>. Everything on this page was measured in that run.</footer>"""
    path.write_text(html_page("UniToken demo", body, STYLE), encoding="utf-8")
