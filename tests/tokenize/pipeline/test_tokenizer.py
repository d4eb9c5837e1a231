"""The stages of a worker on lists of items."""

from __future__ import annotations

from unitoken.codec.conversations import Conversation
from unitoken.tokenize.pipeline.item import Item, Place
from unitoken.tokenize.pipeline.tokenizer import base_name, group_items


def item(position: int, images: int) -> Item:
    conversation = Conversation(str(position), (), ("a.png",) * images)
    return Item(Place(0, "items.json", position, str(position)), conversation, ".")


def test_a_group_ends_by_its_items_or_its_images() -> None:
    items = [item(number, images) for number, images in enumerate((0, 0, 0, 1, 3, 0, 2))]
    groups = [[one.place.position for one in group] for group in group_items(items, 3, max_images=2)]
    assert groups == [[0, 1, 2], [3, 4], [5, 6]]
    assert list(group_items([], 3, 2)) == []


def test_a_rejects_file_has_no_folder_and_no_signature() -> None:
    assert base_name("/home/me/data/a.json") == "a.json"
    assert base_name("https://host/data/a.jsonl?signature=secret") == "a.jsonl"
