"""JSON lists and lines: the same values as from `json.loads`, wherever blocks and pieces end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from support.read_sources import opened, source_of, values_of
from unitoken.common.errors import ConfigError
from unitoken.tokenize.sources import json_files

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


blanks = st.text(st.sampled_from(" \t\r\n"), max_size=3)


@st.composite
def json_lists(draw: st.DrawFn) -> tuple[list[Any], bytes]:
    """Draw a list and a JSON text of it, with blanks in all places where JSON allows them."""
    values = draw(st.lists(json_values, min_size=1, max_size=8))
    ascii_only, indent = draw(st.booleans()), draw(st.sampled_from([None, 1]))
    texts = [json.dumps(value, ensure_ascii=ascii_only, indent=indent) for value in values]
    text = (
        draw(blanks) + "[" + ",".join(draw(blanks) + one + draw(blanks) for one in texts) + "]" + draw(blanks)
    )
    return values, (draw(st.sampled_from(["", "\ufeff"])) + text).encode("utf-8", "surrogatepass")


@given(json_lists(), st.integers(1, 4), st.sampled_from([1, 2, 3, 7, 64, 1 << 20]))
@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_list_equals_json_loads_for_any_block_and_chunk_size(
    tmp_path: Path, content: tuple[list[Any], bytes], chunk_size: int, window: int
) -> None:
    values, text = content
    (tmp_path / "i.json").write_bytes(text)
    file = opened(tmp_path / "i.json", block_bytes=window)
    spans = list(json_files.list_spans(file, chunk_size))
    pieces = [list(json_files.list_values(file, span.start, span.end, None)) for span in spans]
    assert [value for piece in pieces for _, value in piece] == values
    assert [number for number, _ in pieces[-1]] == list(range(len(pieces[-1])))
    assert [span.items for span in spans] == [len(piece) for piece in pieces]
    assert len(spans) == -(-len(values) // chunk_size)
    assert values_of(source_of(tmp_path / "i.json", chunk_size)) == values


@given(json_lists(), st.data())
@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_list_cut_anywhere_keeps_the_items_before(
    tmp_path: Path, content: tuple[list[Any], bytes], data: st.DataObject
) -> None:
    values, text = content
    text = text.rstrip()
    (tmp_path / "i.json").write_bytes(text[: data.draw(st.integers(0, len(text) - 1))])
    try:
        *before, error = values_of(source_of(tmp_path / "i.json", data.draw(st.integers(1, 3))))
    except ConfigError:
        return
    assert str(error).startswith("input cut: at byte ")
    assert before[:-1] == values[: len(before[:-1])]  # the last may be a number without its last digits
    assert len(before) <= len(values)


@given(
    st.lists(json_values, min_size=1, max_size=8),
    st.integers(1, 4),
    st.sampled_from([1, 3, 64, 1 << 20]),
    st.data(),
)
@hypothesis_settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_lines_equal_json_loads(
    tmp_path: Path, values: list[Any], chunk_size: int, window: int, data: st.DataObject
) -> None:
    ends = [data.draw(st.sampled_from(["\n", "\r\n", "\n\n", " \n\t\n"])) for _ in values]
    text = "".join(
        json.dumps(value, ensure_ascii=False) + end for value, end in zip(values, ends, strict=True)
    )
    (tmp_path / "i.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    file = opened(tmp_path / "i.jsonl", block_bytes=window)
    spans = list(json_files.line_spans(file, chunk_size))
    pieces = [list(json_files.line_values(file, span.start, span.end, None)) for span in spans]
    assert [value for piece in pieces for _, value in piece] == values
    assert values_of(source_of(tmp_path / "i.jsonl", chunk_size)) == values


def test_a_long_element_is_scanned_only_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window doubles, so 1000 blocks do not mean 1000 scans."""
    scans: list[int] = []

    class Scanner:
        def raw_decode(self, text: str, at: int) -> tuple[object, int]:
            scans.append(len(text))
            return json.JSONDecoder().raw_decode(text, at)

    monkeypatch.setattr(json_files, "SCANNER", Scanner())
    (tmp_path / "i.json").write_text(json.dumps(["x" * 100_000]))
    file = opened(tmp_path / "i.json", block_bytes=100)
    (span,) = json_files.list_spans(file, 10)
    ((_, value),) = json_files.list_values(file, span.start, span.end, None)
    assert value == "x" * 100_000
    assert 2 < len(scans) < 2 * 14
