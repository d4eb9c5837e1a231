"""Items pass a stage or become rejects."""

from __future__ import annotations

import json

from unitoken.codec.conversations import ItemError
from unitoken.tokenize.pipeline.item import Place, Rejects, SourceItem


def item(piece: int, position: int, value: object) -> SourceItem:
    return SourceItem(Place(piece, "items.json", position, f"i{position}"), value, ".")


def refuse_text(item: SourceItem) -> SourceItem:
    if isinstance(item.value, str):
        raise ItemError(f"no number: {item.value}")
    return item


def test_a_stage_passes_items_on_and_notes_its_rejects() -> None:
    rejects = Rejects()
    items = [item(0, 3, 1), item(0, 4, "x"), item(0, 5, 2)]
    assert list(rejects.apply("count", refuse_text, items)) == [items[0], items[2]]
    assert [json.loads(line) for line in rejects.dump().splitlines()] == [
        {
            "chunk": 0,
            "file": "items.json",
            "position": 4,
            "id": "i4",
            "stage": "count",
            "reason": "no number: x",
        }
    ]


def test_rejects_are_in_the_order_of_the_input() -> None:
    rejects = Rejects()
    assert not list(rejects.apply("late", refuse_text, [item(1, 9, "x"), item(1, 7, "y"), item(0, 8, "z")]))
    assert [json.loads(line)["position"] for line in rejects.dump().splitlines()] == [8, 7, 9]
