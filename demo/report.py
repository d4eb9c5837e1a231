"""The demo's report: its figures and pictures in one HTML file that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image

mpl.use("Agg")
import matplotlib.pyplot as plt

STYLE = """
:root { --ink: #1c2330; --soft: #667085; --line: #e4e7ec; --paper: #fff; --good: #14804a; --bad: #c4320a;
  --accent: #2b59c3 }
* { box-sizing: border-box }
body { margin: 0; background: #f6f7f9; color: var(--ink);
  font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 28px; margin: 0 0 4px } h2 { font-size: 19px; margin: 0 0 4px }
p { margin: 0 0 14px; color: var(--soft); max-width: 76ch }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px;
  padding: 22px 24px; margin-top: 20px }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 20px }
.figure { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px }
.figure b { display: block; font-size: 25px; line-height: 1.2 }
.figure span { color: var(--soft); font-size: 13.5px }
.good b { color: var(--good) } .bad b { color: var(--bad) }
.columns { display: grid; grid-template-columns: 6fr 5fr; gap: 20px } .columns section { margin-top: 20px }
@media (max-width: 860px) { .columns { grid-template-columns: 1fr }
  .columns section + section { margin-top: 0 } }
svg, img { max-width: 100%; height: auto } img { image-rendering: pixelated }
table.grid { border-collapse: separate; border-spacing: 4px } table.grid td { padding: 0 }
table.grid th { font-weight: 600; color: var(--soft); font-size: 13.5px; text-align: right;
  padding-right: 8px }
table.grid img { display: block; width: 44px; border-radius: 5px; border: 2.5px solid transparent }
table.grid img.wrong { border-color: var(--bad) }
table.shares { border-collapse: collapse; font-size: 14px }
table.shares th { color: var(--soft); font-weight: 600 }
table.shares th, table.shares td { text-align: right; padding: 5px 18px 5px 0;
  border-bottom: 1px solid var(--line) }
table.shares th:first-child, table.shares td:first-child { text-align: left }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(66px, 1fr)); gap: 12px 8px }
.answers figure { margin: 0; text-align: center; font-size: 13px }
.answers img { width: 56px; border-radius: 6px }
.answers .wrong { color: var(--bad); font-weight: 600 }
.tokens { font: 13.5px/2.15 ui-monospace, "DejaVu Sans Mono", monospace; margin: 10px 0 16px }
.tokens span { border: 1px solid var(--line); border-radius: 5px; padding: 2px 5px; margin-right: 3px;
  white-space: pre-wrap; color: var(--soft) }
.tokens .trained { background: #e7eefc; border-color: #b9ccf4; color: #17398a }
footer { margin-top: 28px; color: var(--soft); font-size: 13.5px }
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
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _smooth(values: Sequence[float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Average each step with its neighbours, as a batch of drawings has a higher loss than one of answers.

    Returns:
        The steps, and the mean at each.
    """
    window = max(1, len(values) // 20)
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.arange(len(means)) + window // 2, means


def curves(losses: Mapping[str, Sequence[float]], resumed_at: int | None = None) -> str:
    """Plot the loss by step of each stage, side by side, as inline SVG; a kill in the last is marked."""
    figure, axes = plt.subplots(1, len(losses), figsize=(10, 2.9), constrained_layout=True)
    for axis, (name, values) in zip(axes, losses.items(), strict=True):
        axis.plot(values, color="#b9ccf4", linewidth=0.8)
        axis.plot(*_smooth(values), color="#2b59c3", linewidth=1.6)
        axis.set_title(TITLES.get(name, name), fontsize=11, loc="left", color="#1c2330")
        axis.set_xlabel("step", fontsize=9, color="#667085")
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8.5, colors="#667085")
        axis.grid(color="#eef0f3")
        for side in axis.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel("loss a token", fontsize=9, color="#667085")
    if resumed_at is not None:
        axes[-1].axvline(resumed_at, color="#c4320a", linewidth=1, linestyle="--")
        axes[-1].annotate(
            "killed, resumed",
            (resumed_at, axes[-1].get_ylim()[1]),
            (5, -9),
            textcoords="offset points",
            fontsize=8.5,
            color="#c4320a",
        )
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    _, start, rest = buffer.getvalue().partition("<svg")  # without the XML declaration
    return start + rest


def figure_tile(value: str, label: str, good: bool | None = None) -> str:
    """Return a box with a figure, green or red if it has a goal."""
    kind = "" if good is None else (" good" if good else " bad")
    return f'<div class="figure{kind}"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'


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
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="shares"><tr>{head}</tr>{body}</table>'


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
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>UniToken demo</title><style>{STYLE}</style>
<main>
<h1>One model that reads and draws digits</h1>
<p>Conversations about scikit-learn's handwritten digits were tokenized, mixed, packed and streamed to a small
UniToken model on two ranks with FSDP2: base training on text and image tokens, Stage I (vision tower and
adapter), Stage II (all parameters).</p>
<div class="figures">{_tiles(report.figures)}</div>
<section><h2>Loss</h2><p>Cross-entropy and z-loss over the tokens that are trained on: each step, and
smoothed. Stage II was killed with SIGKILL halfway and resumed by the same command.</p>
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
<footer>Written by <code>make demo</code>. Everything on this page was measured in that run.</footer>
</main></html>
"""
    path.write_text(page, encoding="utf-8")
