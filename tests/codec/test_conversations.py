"""The rules of the input: which items are accepted, and why others are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.tokenizing import turns
from unitoken.codec.conversations import ItemError, brief, parse, refuse_empty


def segments(item: dict[str, Any]) -> list[tuple[str, ...]]:
    return [turn.segments for turn in parse(item, "0").turns]


def test_turns_alternate_and_assistant_turns_are_trained_on() -> None:
    conversation = parse({"conversations": turns("a", "b", "c")}, "7")
    assert conversation.id == "7"
    assert [turn.trained for turn in conversation.turns] == [False, True, False]


def test_text_is_cut_at_images() -> None:
    item = {"conversations": turns("x <|image|>y", "<|image|>"), "image": ["1.png", "2.png"]}
    assert segments(item) == [("x ", "y"), ("", "")]
    assert parse(item, "0").images == ("1.png", "2.png")


def test_images_without_a_place_in_the_text_come_first() -> None:
    assert segments({"conversations": turns("What?", "It."), "image": ["1", "2"]}) == [
        ("", " ", " What?"),
        ("It.",),
    ]


@pytest.mark.parametrize("images", [{"image": "1.png"}, {"image": ["1.png"]}, {"<|image|>": ["1.png"]}])
def test_one_image_may_be_a_string_and_the_symbol_a_key(images: dict[str, Any]) -> None:
    assert parse({"conversations": turns("<|image|>", "a"), **images}, "0").images == ("1.png",)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (b"bytes", b"bytes"),
        ({"bytes": b"bytes", "path": "a.png"}, b"bytes"),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        ({"base64": "QUJD"}, "data:image;base64,QUJD"),
        ("https://host/a.png", "https://host/a.png"),
        ("data:image/png;base64,QUJD", "data:image/png;base64,QUJD"),
    ],
)
def test_an_image_may_be_its_bytes_or_where_they_are(image: object, expected: str | bytes) -> None:
    assert parse({"conversations": turns("a", "b"), "image": [image, image]}, "0").images == (
        expected,
        expected,
    )


@pytest.mark.parametrize("images", [{}, {"image": []}, {"image": None}])
def test_items_without_images_may_omit_them(images: dict[str, Any]) -> None:
    assert parse({"conversations": turns("a", "b"), **images}, "0").images == ()


def test_the_last_answer_may_be_open() -> None:
    assert len(parse({"conversations": turns("a", "b", "c", None)}, "0").turns) == 3


def test_ids_are_text_or_numbers() -> None:
    assert parse({"id": "a/1", "conversations": turns("a", "b")}, "3").id == "a/1"
    assert parse({"id": 12, "conversations": turns("a", "b")}, "3").id == "12"


BAD: dict[str, list[Any]] = {
    "not an item": [[], "text", None, 3],
    "no conversations": [
        {},
        {"conversations": []},
        {"conversations": "a"},
        {"conversations": {"from": "human"}},
    ],
    "bad turn": [{"conversations": ["hello"]}, {"conversations": [{"from": "human"}]}],
    "wrong turn order": [
        {"conversations": [{"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "a"}]},
        {"conversations": [{"from": "system", "value": "a"}]},
        {"conversations": [{"from": 1, "value": "a"}]},
    ],
    "turn without text": [
        {"conversations": turns(None, "a")},
        {"conversations": turns("a", None, "b", "c")},
        {"conversations": [{"from": "human", "value": 3}]},
    ],
    "image counts differ": [
        {"conversations": turns("<|image|>", "a")},
        {"conversations": turns("<|image|>", "<|image|>"), "image": ["1"]},
        {"conversations": turns("<|image|>", "a"), "image": ["1", "2"]},
    ],
    "bad image path": [
        {"conversations": turns("a", "b"), "image": image}
        for image in ([1], [""], {}, {"bytes": None, "path": None}, {"base64": 3})
    ],
    "bad id": [{"id": 1.5, "conversations": turns("a", "b")}, {"id": True, "conversations": turns("a", "b")}],
    "text that is not Unicode": [
        {"conversations": turns("\ud800", "b")},
        {"id": "\udfff", "conversations": turns("a", "b")},
    ],
}


@pytest.mark.parametrize(("kind", "item"), [(kind, item) for kind, items in BAD.items() for item in items])
def test_bad_items_are_refused_with_their_reason(kind: str, item: object) -> None:
    with pytest.raises(ItemError, match=f"^{kind}: "):
        parse(item, "0")


def test_reasons_hold_the_numbers() -> None:
    with pytest.raises(ItemError, match=r"2 <\|image\|> in the text but 1 image$"):
        parse({"conversations": turns("<|image|><|image|>", "a"), "image": ["1"]}, "0")


@pytest.mark.parametrize("texts", [("", "a"), ("a", " \n"), ("a", "b", "", "c")])
def test_turns_without_text_and_images_are_refused(
    texts: tuple[str, ...],
) -> None:
    conversation = parse({"conversations": turns(*texts)}, "0")
    with pytest.raises(ItemError, match=r"^empty text: turn \d holds neither"):
        refuse_empty(conversation)


def test_an_image_is_enough_for_a_turn() -> None:
    refuse_empty(parse({"conversations": turns("<|image|>", "<|image|>"), "image": ["1", "2"]}, "0"))


def test_large_values_are_shortened_for_messages() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert brief(deep) == "[[[['...']]]]"
    assert len(brief({"bytes": b"x" * 50_000_000, "more": ["y" * 50_000_000] * 100})) == 60


def test_reasons_stay_short_and_printable() -> None:
    with pytest.raises(ItemError) as error:
        parse({"conversations": [{"from": "\x1b[31m" * 10_000, "value": "a"}]}, "0")
    assert len(str(error.value)) < 200
    assert str(error.value).isprintable()


def test_items_that_the_reference_refuses_are_refused(golden: Path) -> None:
    kinds = {
        "err_more_symbols": "image counts differ",
        "err_fewer_symbols": "image counts differ",
        "err_symbol_no_image_key": "image counts differ",
        "err_gpt_first": "wrong turn order",
        "err_unknown_role": "wrong turn order",
        "err_no_conversations": "no conversations",
        "err_none_in_middle": "turn without text",
    }
    rows = [json.loads(line) for line in (golden / "dev" / "A_tokenization.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        try:
            parse(row["record"], "0")
        except ItemError as error:
            found[row["kind"]] = str(error).partition(": ")[0]
    assert found == kinds


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["human", "gpt", "<|image|>"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["conversations", "image", "<|image|>", "id", "from", "value", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_parsed_or_refused_and_nothing_else(item: object) -> None:
    try:
        conversation = parse(item, "0")
    except ItemError:
        return
    assert sum(len(turn.segments) - 1 for turn in conversation.turns) == len(conversation.images)
