"""The form that filters the samples of a page: by a script in a file, or by the server that sent the page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import cast, get_args

from unitoken.common.errors import ConfigError
from unitoken.dataset.kinds import KINDS, Kind
from unitoken.tokenize.checks.sample_cards import KIND_NAMES
from unitoken.tokenize.checks.sample_table import Filters, SampleTable

LONGEST_TEXT = 200  # letters of an id that are searched for
STYLE = """
.filters { position: sticky; top: 0; z-index: 1; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; padding: 12px 18px; margin-top: 14px; display: flex; flex-wrap: wrap;
  gap: 10px 22px; align-items: center; font-size: 14px }
.filters label { display: inline-flex; gap: 6px; align-items: center }
.filters .kinds { display: inline-flex; flex-wrap: wrap; gap: 6px 14px }
.filters input[type=search], .filters input[type=number], .filters select, .filters button {
  font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line);
  border-radius: 7px; padding: 4px 8px; max-width: 100% }
.filters input[type=number] { width: 6.5em } .filters input[type=search] { width: 11em }
.filters output { color: var(--soft); margin-left: auto; font-variant-numeric: tabular-nums }
@media (max-width: 600px) { .filters { position: static } }
"""
# The fields' names are those of `read_filters`: a page's file keeps them behind the # of its address.
SCRIPT = """
const form = document.querySelector("form.filters");
const cards = [...document.querySelectorAll("section.sample")];
const count = form.querySelector("output");

function show() {
  const fields = new FormData(form), kinds = fields.getAll("kind");
  const from = Number(fields.get("from") || 0), to = Number(fields.get("to") || Infinity);
  const source = fields.get("source") || "", id = fields.get("id").toLowerCase();
  let shown = 0;
  for (const card of cards) {
    const data = card.dataset, tokens = Number(data.tokens);
    card.hidden = !((!kinds.length || kinds.includes(data.kind)) && from <= tokens && tokens <= to
      && (source === "" || source === data.source) && data.id.toLowerCase().includes(id));
    shown += !card.hidden;
  }
  count.textContent = `${shown.toLocaleString("en")} of ${cards.length.toLocaleString("en")} shown`;
  const set = [...fields].filter(([, value]) => value !== "");
  history.replaceState(null, "", "#" + new URLSearchParams(set));
}

for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  for (const field of form.querySelectorAll("[name]")) {
    if (field.name !== name) continue;
    if (field.type === "checkbox") field.checked ||= field.value === value;
    else field.value = value;
  }
}
form.addEventListener("input", show);
form.addEventListener("submit", event => event.preventDefault());
show();
"""


def filter_form(table: SampleTable, filters: Filters, shown: str, button: bool) -> str:
    """Return the form.

    Args:
        table: names the kinds and sources that there are.
        filters: what is filled in.
        shown: what it says of the samples that pass.
        button: whether the form is sent by a button.
    """
    there = [kind for place, kind in enumerate(KINDS) if (table.kinds == place).any()]
    longest = "" if filters.longest is None else filters.longest
    name = html.escape(filters.part_of_id)
    parts = [
        '<span class="kinds" role="group" aria-label="Kind">',
        *(_kind_field(kind, kind in filters.kinds) for kind in there),
        '</span><label>from <input type="number" name="from" min="0" aria-label="Fewest tokens" '
        f'placeholder="0" value="{filters.shortest or ""}"></label>',
        '<label>to <input type="number" name="to" min="0" aria-label="Most tokens" '
        f'placeholder="{table.tokens.max(initial=0)}" value="{longest}"> tokens</label>',
        _source_field(table.source_names, filters.source),
        f'<label>id <input type="search" name="id" maxlength="{LONGEST_TEXT}" aria-label="Part of the id" '
        f'placeholder="part of it" value="{name}"></label>',
        "<button>Show</button>" if button else "",
        f"<output>{html.escape(shown)}</output>",
    ]
    return f'<form class="filters" autocomplete="off">{"".join(parts)}</form>'


def _kind_field(kind: Kind, is_checked: bool) -> str:
    checked = " checked" if is_checked else ""
    return f'<label><input type="checkbox" name="kind" value="{kind}"{checked}>{KIND_NAMES[kind]}</label>'


def _source_field(names: Sequence[str], chosen: int | None) -> str:
    if not names:
        return ""
    options = "".join(
        f'<option value="{place}"{" selected" if place == chosen else ""}>{html.escape(name)}</option>'
        for place, name in enumerate(names)
    )
    return f'<label>source <select name="source"><option value="">all</option>{options}</select></label>'


def read_filters(fields: Mapping[str, Sequence[str]]) -> Filters:
    """Read the form's fields as a browser sends them.

    Raises:
        ConfigError: a field holds something that the form can not hold.
    """
    kinds = tuple(fields.get("kind", ()))
    if not set(kinds) <= set(get_args(Kind)):
        raise ConfigError(f"kind: expected {', '.join(KINDS)}, found {kinds!r}")
    return Filters(
        cast(tuple[Kind, ...], kinds),
        _number(fields, "from") or 0,
        _number(fields, "to"),
        _number(fields, "source"),
        fields.get("id", [""])[0][:LONGEST_TEXT],
    )


def filter_query(filters: Filters) -> list[tuple[str, str]]:
    """Return the fields of the form, as in the address of a page."""
    fields = [
        *(("kind", kind) for kind in filters.kinds),
        ("from", str(filters.shortest or "")),
        ("to", "" if filters.longest is None else str(filters.longest)),
        ("source", "" if filters.source is None else str(filters.source)),
        ("id", filters.part_of_id),
    ]
    return [(name, value) for name, value in fields if value]


def _number(fields: Mapping[str, Sequence[str]], name: str) -> int | None:
    text = fields.get(name, [""])[0]
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise ConfigError(f"{name}: expected a whole number, found {text[:40]!r}")
    return int(text)
