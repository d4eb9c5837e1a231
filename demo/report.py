"""The demo's figures and pictures as one self-contained page."""

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
:root { --ink: #1c2330; --soft: #667085; --line: #e4e7ec; --paper: #fff; --good: #14804a; --bad: #c4320a; --accent: #2b59c3 }
* { box-sizing: border-box }
body { margin: 0; background: #f6f7f9; color: var(--ink); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 28px; margin: 0 0 4px } h2 { font-size: 19px; margin: 0 0 4px }
p { margin: 0 0 14px; color: var(--soft); max-width: 76ch }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px; margin-top: 20px }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 20px }
.figure { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px }
.figure b { display: block; font-size: 25px; line-height: 1.2 } .figure span { color: var(--soft); font-size: 13.5px }
.good b { color: var(--good) } .bad b { color: var(--bad) }
.columns { display: grid; grid-template-columns: 6fr 5fr; gap: 20px } .columns section { margin-top: 20px }
@media (max-width: 860px) { .columns { grid-template-columns: 1fr } .columns section + section { margin-top: 0 } }
svg, img { max-width: 100%; height: auto } img { image-rendering: pixelated }
table.grid { border-collapse: separate; border-spacing: 4px } table.grid td { padding: 0 }
table.grid th { font-weight: 600; color: var(--soft); font-size: 13.5px; text-align: right; padding-right: 8px }
table.grid img { display: block; width: 44px; border-radius: 5px; border: 2.5px solid transparent }
table.grid img.wrong { border-color: var(--bad) }
table.shares { border-collapse: collapse; font-size: 14px } table.shares th { color: var(--soft); font-weight: 600 }
table.shares th, table.shares td { text-align: right; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line) }
table.shares th:first-child, table.shares td:first-child { text-align: left }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(66px, 1fr)); gap: 12px 8px }
.answers figure { margin: 0; text-align: center; font-size: 13px } .answers img { width: 56px; border-radius: 6px }
.answers .wrong { color: var(--bad); font-weight: 600 }
.tokens { font: 13.5px/2.15 ui-monospace, "DejaVu Sans Mono", monospace; margin: 10px 0 16px }
.tokens span { border: 1px solid var(--line); border-radius: 5px; padding: 2px 5px; margin-right: 3px; white-space: pre-wrap;
  color: var(--soft) }
.tokens .trained { background: #e7eefc; border-color: #b9ccf4; color: #17398a }
footer { margin-top: 28px; color: var(--soft); font-size: 13.5px }
"""


TITLES = {"base": "Base", "stage1": "Stage I", "stage2": "Stage II"}


@dataclass(frozen=True)
class Answer:
    picture: npt.NDArray[np.uint8]
    asked: str  # what it is
    answer: str  # what the model said


@dataclass(frozen=True)
class Drawing:
    picture: npt.NDArray[np.uint8]
    asked: str
    read: str  # what the classifier reads


def png(picture: npt.NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _smooth(values: Sequence[float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Steps, and the mean of the steps around each: a batch of drawings has another loss than one of answers."""
    window = max(1, len(values) // 20)
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    return np.arange(len(means)) + window // 2, means


def curves(losses: Mapping[str, Sequence[float]], resumed_at: int) -> str:
    """Loss by step of each stage, side by side, as inline SVG."""
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
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _figure(value: str, label: str, good: bool | None = None) -> str:
    kind = "" if good is None else (" good" if good else " bad")
    return f'<div class="figure{kind}"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'


def _wrong(wrong: bool) -> str:
    return ' class="wrong"' if wrong else ""


def _drawings(drawings: Sequence[Drawing]) -> str:
    rows = []
    for word in dict.fromkeys(d.asked for d in drawings):
        cells = "".join(
            f'<td><img src="{png(d.picture)}" alt="{d.read}" title="asked {word}, read as {d.read}"{_wrong(d.read != word)}></td>'
            for d in drawings
            if d.asked == word
        )
        rows.append(f"<tr><th>{word}</th>{cells}</tr>")
    return f'<table class="grid">{"".join(rows)}</table>'


def _answers(answers: Sequence[Answer]) -> str:
    return "".join(
        f'<figure><img src="{png(a.picture)}" alt="{a.asked}"><figcaption{_wrong(a.answer != a.asked)}>'
        f"{html.escape(a.answer) or '(nothing)'}</figcaption></figure>"
        for a in answers
    )


def _shares(shares: Mapping[str, Mapping[str, float]]) -> str:
    head = ("stream", "mean", "standard deviation", "least", "most", "of independent draws")
    rows = [
        (name, *(f"{one[key]:.1%}" for key in ("mean", "sd", "least", "most", "independent_sd")))
        for name, one in shares.items()
    ]
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{title}</th>" for title in head)
    return f'<table class="shares"><tr>{titles}</tr>{"".join(f"<tr>{row}</tr>" for row in cells)}</table>'


def _tokens(sample: Sequence[tuple[str, bool]]) -> str:
    spans = "".join(
        f"<span{' class=trained' if trained else ''}>{html.escape(text)}</span>" for text, trained in sample
    )
    return f'<div class="tokens">{spans}</div>'


def write_report(
    path: Path,
    figures: Mapping[str, Any],
    losses: Mapping[str, Sequence[float]],
    resumed_at: int,
    drawings: Sequence[Drawing],
    answers: Sequence[Answer],
    samples: Sequence[Sequence[tuple[str, bool]]],
) -> None:
    """Write the page. `samples` are conversations as (piece of text, is it trained on)."""
    equal = figures["resumed_equal"]
    tiles = [
        _figure(
            f"{figures['caption_accuracy']:.1%}",
            "of held-out digits read rightly",
            figures["caption_accuracy"] >= 0.9,
        ),
        _figure(
            f"{figures['drawing_accuracy']:.0%}",
            "of drawn digits read as asked",
            figures["drawing_accuracy"] >= 0.7,
        ),
        _figure("equal" if equal else "different", "losses after kill -9 and resume, bit for bit", equal),
        _figure(f"{figures['fill']:.1%}", f"of {figures['packs']:,} packs an epoch is real tokens"),
        _figure(
            f"{figures['samples']:,}",
            f"samples of {figures['items']:,} items, {figures['rejected']} rejected",
        ),
        _figure(f"{figures['seconds']:.0f} s", "from raw pictures to this page"),
    ]
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>UniToken demo</title><style>{STYLE}</style>
<main>
<h1>One model that reads and draws digits</h1>
<p>Conversations about scikit-learn's handwritten digits were tokenized, mixed, packed and streamed to a small UniToken model on two
ranks with FSDP2: base training on text and image tokens, Stage I (vision tower and adapter), Stage II (everything).</p>
<div class="figures">{"".join(tiles)}</div>
<section><h2>Loss</h2><p>Cross-entropy + z-loss over the tokens that are trained on, each step and smoothed. Stage II was killed
with SIGKILL halfway and resumed by the same command.</p>{curves(losses, resumed_at)}</section>
<section><h2>The mixture in every batch</h2><p>Share of each stream in the tokens of Stage II's global batches of eight packs. The
last column is how much it would scatter if conversations were drawn one by one.</p>{_shares(figures["share_in_batches"])}</section>
<div class="columns">
<section><h2>“Draw a seven.”</h2><p>Ten drawings of each digit, sampled token by token, guided away from what is drawn
without a caption. A red frame: an ordinary
classifier, trained on the real digits, reads another digit.</p>{_drawings(drawings)}</section>
<section><h2>“What digit is this?”</h2><p>Digits that were held out of training, with the model's answer. Wrong ones are red.</p>
<div class="answers">{_answers(answers)}</div></section>
</div>
<section><h2>What the model sees</h2><p>One conversation of each direction. What is blue is trained on; the rest is only read.</p>
{"".join(_tokens(sample) for sample in samples)}</section>
<footer>Written by <code>make demo</code>. Everything on this page was measured in that run.</footer>
</main></html>
"""
    path.write_text(page, encoding="utf-8")
