"""Pages that need no other file: one style for all of them, light and dark, from 400 pixels of width on."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence

# --paper lies behind --card; --series-1 to --series-8 are the colours of a chart's series, in that order.
STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6678; --line: #e1e5eb; --paper: #f6f7f9;
  --card: #ffffff; --accent: #2b59c3; --good: #14804a; --bad: #c4320a;
  --series-1: #2b59c3; --series-2: #d9730d; --series-3: #14804a; --series-4: #9a3fa8;
  --series-5: #c4320a; --series-6: #0e8a9c; --series-7: #8a6d1b; --series-8: #667085 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a0a9b8; --line: #313845;
  --paper: #12151b; --card: #1b2029; --accent: #86a9f8; --good: #5cc58c; --bad: #f58464;
  --series-1: #86a9f8; --series-2: #f2a65e; --series-3: #5cc58c; --series-4: #d68fdf;
  --series-5: #f58464; --series-6: #5fc4d4; --series-7: #d6b860; --series-8: #a0a9b8 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 64px }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 6px; overflow-wrap: anywhere }
h2 { font-size: 19px; margin: 0 0 6px } h3 { font-size: 15.5px; margin: 16px 0 4px }
p { margin: 0 0 14px; color: var(--soft); max-width: 76ch } a { color: var(--accent) }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 20px 24px; margin-top: 20px }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 20px }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px }
.figure b { display: block; font-size: 24px; line-height: 1.25; overflow-wrap: anywhere }
.figure span { color: var(--soft); font-size: 13.5px }
.good b { color: var(--good) } .bad b { color: var(--bad) }
svg, img { max-width: 100%; height: auto }
.scroll { overflow-x: auto } .scroll:focus-visible { outline: 2px solid var(--accent) }
table.cells { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
table.cells th { color: var(--soft); font-weight: 600 }
table.cells th, table.cells td { text-align: left; padding: 5px 20px 5px 0; vertical-align: top;
  border-bottom: 1px solid var(--line) }
table.cells .number { text-align: right; white-space: nowrap }
code { font: 0.9em ui-monospace, "DejaVu Sans Mono", monospace }
footer { margin-top: 28px; color: var(--soft); font-size: 13.5px }
@media (max-width: 600px) { svg.chart text { font-size: 16px }
  main { padding: 20px 12px 40px } section { padding: 14px }
  h1 { font-size: 22px } .figures { grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)) } }
"""
# A number with its sign and unit: `-1,024`, `3.1%`, `2e-05`, `12.5 GB`, `1,200 tokens/s`.
_NUMBER = re.compile(r"[-+−±]?[\d,]*\.?\d+(e[-+]?\d+)?( ?(%|[a-zA-Zµ]{1,7}(/[a-z]{1,5})?))?")


def html_page(title: str, body: str, style: str = "", script: str = "", *, files: bool = False) -> str:
    """Return a page, whose own script is the only one that a browser runs in it.

    Args:
        title: of the browser's tab, not escaped yet; the body has a heading of its own.
        body: HTML, everything from data already escaped: a heading, and sections, which are shown as cards.
        style: rules of this page, after those of all pages.
        script: JavaScript, run once the body is there. Attributes such as `onclick` stay without effect.
        files: pictures may lie in files beside the page, and forms may be sent to where it came from;
            else it shows pictures from data URLs alone (`picture_url`).
    """
    script = script.replace("</", "<\\/")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pictures, forms = ("data: 'self' file:", "'self'") if files else ("data:", "'none'")
    scripts = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        f"default-src 'none'; base-uri 'none'; style-src 'unsafe-inline'; script-src {scripts}; "
        f"img-src {pictures}; form-action {forms}"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><link rel="icon" href="data:,">
<style>{STYLE}{style}</style></head>
<body><main>
{body}
</main>{f"<script>{script}</script>" if script else ""}</body></html>
"""


def html_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table that scrolls by itself where it is too wide; columns of numbers are aligned right.

    Args:
        head: the columns' names.
        rows: their cells; whole numbers get thousands separators, others four significant digits.
    """
    texts = [[_cell_text(cell) for cell in row] for row in rows]
    are_numbers = [
        any(_NUMBER.fullmatch(row[column]) for row in texts)
        and all(_NUMBER.fullmatch(row[column]) or row[column] in ("", "-") for row in texts)
        for column in range(len(head))
    ]

    def line(tag: str, cells: Iterable[str]) -> str:
        marks = (' class="number"' if is_number else "" for is_number in are_numbers)
        marked = (
            f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True)
        )
        return f"<tr>{''.join(marked)}</tr>"

    lines = [f"<thead>{line('th', map(_cell_text, head))}</thead>", *(line("td", row) for row in texts)]
    return f'<div class="scroll" tabindex="0"><table class="cells">{"".join(lines)}</table></div>'


def _cell_text(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def figure_tile(value: str, label: str, good: bool | None = None) -> str:
    """Return a box with a figure, for `<div class="figures">`; green or red if it has a goal."""
    kind = "" if good is None else (" good" if good else " bad")
    return f'<div class="figure{kind}"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'


def picture_url(png: bytes) -> str:
    """Return the data URL of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
