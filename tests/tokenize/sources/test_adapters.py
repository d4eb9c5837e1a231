"""Adapters: items of other formats become standard items, or rejects that say what is missing."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from support.paths import DATA, ROOT
from support.tokenizing import turns
from unitoken.codec.conversations import Conversation, ItemError, parse
from unitoken.common.errors import ConfigError
from unitoken.tokenize.sources.adapters import ADAPTERS, adapter_fingerprint, find_adapter
from unitoken.tokenize.sources.pictures import PictureReader
from unitoken.tokenize.sources.reader import cut, find_files, folder_of, item_name, read_piece

EXAMPLE = DATA / "my_format.py"


def adapted(name: str, raw: object) -> Conversation:
    return parse(find_adapter(name)(raw), "0", prepend_system=True)  # type: ignore[arg-type]


def texts(conversation: Conversation) -> list[str]:
    return ["<|image|>".join(turn.segments) for turn in conversation.turns]


def sample(**files: object) -> dict[str, object]:
    return {"__key__": "a/000012", **{suffix.replace("_", "."): content for suffix, content in files.items()}}


# --- the same records in every format -----------------------------------------------------------------------


def test_the_same_records_in_every_format_are_the_same_items(tmp_path: Path, golden: Path) -> None:
    images = golden / "assets" / "images"
    rows = [json.loads(line) for line in (golden / "dev" / "A_tokenization.jsonl").read_text().splitlines()]
    good = [row["record"] | {"id": f"r{n}"} for n, row in enumerate(rows) if row["status"] == "ok"]
    records: list[dict[str, Any]] = [
        {"id": one["id"], "conversations": one["conversations"]}
        for one in good
        if "<|image|>" not in str(one)
    ]
    pictures = sorted(path.name for path in images.iterdir())[:6]
    records += [
        {"id": f"p{n}", "conversations": turns("See <|image|>", "ok"), "image": [name]}
        for n, name in enumerate(pictures)
    ]
    records.append({"id": "two", "conversations": turns("<|image|><|image|>", "ok"), "image": pictures[:2]})
    assert len(records) > 10

    full = [one | {"image": [str(images / name) for name in one.get("image", [])]} for one in records]
    (tmp_path / "i.json").write_text(json.dumps(full))
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(one) + "\n" for one in full))
    inline = [
        one
        | {"image": [{"bytes": (images / name).read_bytes(), "path": name} for name in one.get("image", [])]}
        for one in records
    ]
    table = pa.Table.from_pylist(inline)
    pq.write_table(table, tmp_path / "i.parquet", row_group_size=3)
    with pa.ipc.new_stream(tmp_path / "i.arrow", table.schema) as stream:
        stream.write_table(table, 3)
    with webdataset.TarWriter(str(tmp_path / "i.tar")) as writer:
        for one in records:
            names = {f"{n}.{name.rpartition('.')[2]}": name for n, name in enumerate(one.get("image", []))}
            files = {suffix: (images / name).read_bytes() for suffix, name in names.items()}
            item = {
                "conversations": one["conversations"],
                **({"image": list(names)} if names and one["id"] != "two" else {}),
            }
            writer.write({"__key__": one["id"], "json": item, **files})

    found = [items_of(tmp_path / name) for name in ("i.json", "i.jsonl", "i.parquet", "i.arrow", "i.tar")]
    assert found[0] == found[1] == found[2] == found[3] == found[4]
    assert len(found[0]) == len(records)


def items_of(path: Path) -> list[tuple[str, object, list[bytes]]]:
    source, adapter, pictures = (
        cut(find_files([str(path)]), 4),
        find_adapter("standard"),
        PictureReader(False, False, 1),
    )
    result: list[tuple[str, object, list[bytes]]] = []
    for piece in range(len(source.pieces)):
        for item in read_piece(source, piece):
            conversation = parse(adapter(item.value), item_name(source, item))  # type: ignore[arg-type]
            images = [
                pictures.read(folder_of(source, item.file), image, 1 << 30) for image in conversation.images
            ]
            result.append((conversation.id, conversation.turns, images))
    return result


# --- standard -----------------------------------------------------------------------------------------------


def test_standard_leaves_items_as_they_are() -> None:
    raw = {"conversations": turns("a", "b"), "anything": 1}
    assert find_adapter("standard")(raw) is raw


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({}, [b"1", b"2"]),
        ({"image": None}, [b"1", b"2"]),
        ({"image": "jpg"}, [b"1"]),
        ({"image": ["0.png", "jpg"]}, [b"2", b"1"]),
        ({"image": ["000012.jpg", "a/000012.0.png"]}, [b"1", b"2"]),
        ({"image": ["https://host/a.png", "elsewhere.jpg"]}, ["https://host/a.png", "elsewhere.jpg"]),
        ({"image": []}, []),
        ({"image": "__key__"}, ["__key__"]),
    ],
)
def test_standard_finds_the_pictures_of_a_tar(named: dict[str, Any], expected: list[object]) -> None:
    raw = sample(jpg=b"1", **{"0.png": b"2", "json": {"conversations": [], **named}, "txt": "no picture"})
    assert find_adapter("standard")(raw)["image"] == expected


def test_standard_needs_a_json_in_a_tar() -> None:
    with pytest.raises(
        ItemError,
        match=r"^no conversations: expected a .json file with an object, the sample's files are \['jpg'\]",
    ):
        find_adapter("standard")(sample(jpg=b"1"))


# --- ShareGPT and LLaVA -------------------------------------------------------------------------------------


def test_llava_becomes_the_standard() -> None:
    raw = {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A bus."},
        ],
    }
    conversation = adapted("sharegpt", raw)
    assert (conversation.id, conversation.images) == ("000000033471", ("coco/train2017/000000033471.jpg",))
    assert texts(conversation) == ["<|image|>\nWhat is it?", "A bus."]


@pytest.mark.parametrize("human", ["human", "user", "Human"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatbot", "model"])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_sharegpt_accepts_all_names_in_use(human: str, assistant: str, keys: tuple[str, str]) -> None:
    raw_turns = [
        dict(zip(keys, turn, strict=True))
        for turn in (("system", "Be kind."), (human, "<image>a<image>"), (assistant, "b"))
    ]
    conversation = adapted("sharegpt", {"conversations": raw_turns, "images": ["1.png", "2.png"]})
    assert texts(conversation) == ["Be kind.\n\n<|image|>a<|image|>", "b"]
    assert conversation.images == ("1.png", "2.png")


def test_the_system_text_may_be_a_field_of_the_item() -> None:
    assert texts(adapted("sharegpt", {"system": "Be kind.", "conversations": turns("a", "b")})) == [
        "Be kind.\n\na",
        "b",
    ]


def test_a_greeting_by_the_assistant_is_left_out_and_counted() -> None:
    greeted = [{"from": "gpt", "value": "Hello!"}, *turns("a<image>", "b")]
    for system in ([], [{"from": "system", "value": "Be kind."}]):
        raw = {"conversations": [*system, *greeted], "image": "1.png"}
        assert texts(adapted("sharegpt", raw)) == [
            f"{system[0]['value'] + chr(10) * 2 if system else ''}a<|image|>",
            "b",
        ]
        assert find_adapter("sharegpt")(raw)["turns_left_out"] == 1
    assert find_adapter("sharegpt")({"conversations": turns("a", "b")})["turns_left_out"] == 0
    with pytest.raises(ItemError, match="image counts differ"):  # no picture is left out
        adapted(
            "sharegpt",
            {
                "conversations": [{"from": "gpt", "value": "<image>"}, *turns("<image>a", "b")],
                "image": ["1", "2"],
            },
        )


@pytest.mark.parametrize(
    "roles", [["system"], ["human", "system"], ["system", "gpt"], ["human", "function"], ["human", None]]
)
def test_roles_in_the_wrong_place_are_rejects(roles: list[str]) -> None:
    with pytest.raises(ItemError, match="wrong turn order"):
        adapted("sharegpt", {"conversations": [{"from": role, "value": "a"} for role in roles]})


# --- messages -----------------------------------------------------------------------------------------------


def message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def test_openai_messages_become_the_standard() -> None:
    parts = [
        {"type": "text", "text": "What are "},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD", "detail": "low"}},
        {"type": "text", "text": " and "},
        {"type": "image_url", "image_url": "https://host/a.png"},
        {"type": "image", "image": "b.png"},
        {"type": "image", "path": "c.png", "url": None},
    ]
    raw_turns = [message("system", "Be kind."), message("user", parts), message("assistant", "Letters.")]
    conversation = adapted("messages", {"id": 7, "messages": raw_turns})
    assert texts(conversation) == [
        "Be kind.\n\nWhat are <|image|> and <|image|><|image|><|image|>",
        "Letters.",
    ]
    assert conversation.images == ("data:image/png;base64,QUJD", "https://host/a.png", "b.png", "c.png")


def test_images_of_messages_may_be_in_a_separate_list() -> None:
    parts = [
        {"type": "image", "text": None},
        {"type": "text", "text": "and"},
        {"type": "image", "text": None},
    ]
    raw = {
        "messages": [message("user", parts), message("assistant", "b")],
        "images": [{"bytes": b"1"}, {"bytes": b"2"}],
    }
    assert adapted("messages", raw).images == (b"1", b"2")
    with pytest.raises(ItemError, match=r"image counts differ: 2 .* but 3 images"):
        adapted("messages", raw | {"images": ["1", "2", "3"]})
    with pytest.raises(ItemError, match="bad image path"):
        adapted("messages", raw | {"images": ["1"]})


@pytest.mark.parametrize("content", [[{"type": "audio"}], ["text"], [{"type": "text"}], [None]])
def test_parts_of_another_kind_are_rejects(content: object) -> None:
    with pytest.raises(ItemError, match="bad turn: expected parts of type 'text', 'image_url' or 'image'"):
        adapted("messages", {"messages": [message("user", content), message("assistant", "b")]})


# --- pairs --------------------------------------------------------------------------------------------------

PAIRS: list[tuple[dict[str, Any], object]] = [
    (sample(jpg=b"1", txt="A cat.\n"), b"1"),
    (sample(webp=b"1", json={"caption": "A cat.", "url": "https://host/gone.png"}), b"1"),
    ({"image": {"bytes": b"1", "path": None}, "text": "A cat."}, b"1"),
    ({"URL": "https://host/a.png", "TEXT": "A cat."}, "https://host/a.png"),
    ({"image_path": "a.png", "caption": "A cat."}, "a.png"),
]


@pytest.mark.parametrize(("raw", "picture"), PAIRS)
def test_pairs_go_both_ways(raw: dict[str, Any], picture: object) -> None:
    described, drawn = adapted("caption", raw), adapted("drawing", raw)
    assert described.images == drawn.images == (picture,)
    assert described.turns[0].segments[0] == ""
    assert len(described.turns[0].segments[1]) > 10
    assert texts(described)[1] == "A cat."
    assert "A cat." in texts(drawn)[0]
    assert texts(drawn)[1] == "<|image|>"


def test_task_and_wording_follow_from_the_id_and_are_spread() -> None:
    raws = [{"id": f"{n}", "image": "a.png", "text": "A cat."} for n in range(400)]
    items = [adapted("caption_or_drawing", raw) for raw in raws]
    assert items == [adapted("caption_or_drawing", raw) for raw in raws]
    drawn = [item for item in items if texts(item)[1] == "<|image|>"]
    assert 150 < len(drawn) < 250
    assert (
        len({texts(item)[0] for item in drawn})
        == len({texts(item)[0] for item in items if item not in drawn})
        == 5
    )


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"text": "a"}, "no picture: expected one under jpg, "),
        ({"image": "a.png"}, "no caption: expected text under txt, "),
        ({"image": "a.png", "text": {"a": 1}}, "no caption: expected text under 'text'"),
        ({"image": "a.png", "text": None}, "no caption: .*'text' is null"),
        ({"image": "a.png", "text": " \n"}, "empty text: "),
        ({"image": "a.png", "text": "forged <|image|>"}, "image counts differ: "),
    ],
)
@pytest.mark.parametrize("name", ["caption", "drawing", "caption_or_drawing"])
def test_incomplete_pairs_are_rejects(name: str, raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ItemError, match=f"^{words}"):
        adapted(name, raw)


# --- any value, and a user's own ----------------------------------------------------------------------------

keys = st.sampled_from(
    [
        "conversations",
        "messages",
        "image",
        "images",
        "json",
        "text",
        "jpg",
        "__key__",
        "from",
        "value",
        "role",
        "content",
        "type",
        "id",
    ]
)
words = st.sampled_from(
    ["human", "gpt", "user", "system", "image", "text", "image_url", "a", ""]
) | st.binary(max_size=2)
json_values = st.recursive(
    st.none() | st.integers() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", ADAPTERS)
@given(json_values)
def test_any_json_becomes_an_item_or_a_reject(name: str, raw: object) -> None:
    try:
        adapted(name, raw)
    except ItemError:
        return


def test_the_readmes_example_is_an_adapter() -> None:
    raw = {"file": "cat.jpg", "question": "What is it?", "answers": ["A cat."]}
    conversation = adapted(f"{EXAMPLE}:my_format", raw)
    assert (conversation.id, texts(conversation), conversation.images) == (
        "cat.jpg",
        ["<|image|> What is it?", "A cat."],
        ("cat.jpg",),
    )
    with pytest.raises(ItemError, match=r"^no answer: the list is empty$"):
        adapted(f"{EXAMPLE}:my_format", raw | {"answers": []})
    with pytest.raises(ItemError, match=r"^adapter failed: KeyError: 'answers'$"):
        adapted(f"{EXAMPLE}:my_format", {"file": "cat.jpg"})


def test_the_page_shows_the_example_that_is_run() -> None:
    assert EXAMPLE.read_text(encoding="utf-8") in (ROOT / "docs/tokenize.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("return None", "not an item: expected a JSON object, found None"),
        ("raise TypeError(object())", "adapter failed: TypeError: <object object>"),
        ("return f(raw)", "adapter failed: RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_a_failing_function_rejects_with_the_same_message(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "mine.py").write_text(f"def f(raw):\n    {source}\n")
    with pytest.raises(ItemError, match=f"^{reason}"):
        adapted(f"{tmp_path}/mine.py:f", {})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sharegtp", "expected one of standard, sharegpt, .* or path/to/file.py:function, found 'sharegtp'"),
        ("{}/none.py:f", "none.py: cannot be read: No such file or directory"),
        ("{}/mine.py", "expected one of "),
        ("{}/mine.py:g", "mine.py: has no function 'g'"),
        ("{}/mine.py:x", "mine.py: has no function 'x'"),
        ("{}/broken.py:f", "broken.py: SyntaxError: "),
    ],
)
def test_a_name_that_is_no_adapter_is_a_config_error(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "mine.py").write_text("x = 1\ndef f(raw): return raw\n")
    (tmp_path / "broken.py").write_text("def f(raw) return raw\n")
    with pytest.raises(ConfigError, match=words) as error:
        find_adapter(name.format(tmp_path))
    assert "\n" not in str(error.value)


def test_fingerprints_follow_the_content_and_not_the_path(tmp_path: Path) -> None:
    for name, text in (
        ("a.py", "def f(raw): return raw\n"),
        ("b.py", "def f(raw): return raw\n"),
        ("c.py", "def f(raw): return 1\n"),
    ):
        (tmp_path / name).write_text(text)
    one, same, other = (adapter_fingerprint(f"{tmp_path}/{name}:f") for name in ("a.py", "b.py", "c.py"))
    assert one == same != other
    assert one.startswith("f ")
    assert adapter_fingerprint("sharegpt") == "sharegpt"


# --- pictures and placeholders that other formats name ------------------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        *(
            {key: "a.png"}
            for key in (
                "image",
                "images",
                "image_path",
                "image_url",
                "img",
                "img_path",
                "picture",
                "pictures",
                "photo",
            )
        ),
        {"images": ["a.png"]},
        {"image": "a.png", "image_path": "data/a.png"},
        {"image": {"path": "a.png", "bytes": None}},
        {"images": [{"url": "a.png"}]},
        {"image": "", "images": ["a.png"]},
        {"image": None, "img": "a.png"},
    ],
)
@pytest.mark.parametrize("adapter", ["standard", "sharegpt", "messages"])
def test_a_picture_is_used_under_any_name(adapter: str, named: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    raw = {"messages": messages} if adapter == "messages" else {"conversations": turns("What?", "A.")}
    conversation = adapted(adapter, {**raw, **named})
    assert conversation.images == ("a.png",)
    assert texts(conversation)[0] == "<|image|> What?", "in front"


@pytest.mark.parametrize("adapter", ["standard", "sharegpt", "caption"])
@pytest.mark.parametrize("named", [{"video": "a.mp4"}, {"audios": ["a.wav"]}, {"Video": "a.mp4"}])
def test_video_and_audio_reject_the_item(adapter: str, named: dict[str, Any]) -> None:
    with pytest.raises(ItemError, match=r"^video and audio are not read: the item names some under "):
        adapted(adapter, {"conversations": turns("a", "b"), "image": "a.png", "caption": "c", **named})


@pytest.mark.parametrize(
    "named", [{"image": "a.png", "images": ["a.png", "b.png"]}, {"image": "a.png", "img": "b.png"}]
)
def test_two_names_of_different_pictures_reject_the_item(named: dict[str, Any]) -> None:
    with pytest.raises(ItemError, match=r"^which pictures: "):
        adapted("standard", {"conversations": turns("a", "b"), **named})


@pytest.mark.parametrize(
    ("text", "pictures", "expected"),
    [
        ("<image>\nWhat?", 1, "<|image|>\nWhat?"),
        ("<image> or <image>?", 2, "<|image|> or <|image|>?"),
        ("<image> or <image>?", 1, None),
        ("<image>", 0, None),
        ("<video> What?", 1, None),
        ("<|image_pad|> What?", 1, None),
        ("<|vision_start|> What?", 0, None),
        ("<image_1> What?", 1, None),
        ("<|image_1|> What?", 1, None),
        ("<ImageHere> What?", 1, None),
        ("<image_placeholder> What?", 1, None),
        ("[IMG] What?", 1, None),
        ("<img> is a tag of HTML", 0, "<img> is a tag of HTML"),
        ("<img> What?", 1, None),
        ("<|image|> and <image>?", 1, None),
        ("an <imagery> of x<imagex", 0, "an <imagery> of x<imagex"),
    ],
)
def test_foreign_placeholders_are_never_trained_on_as_text(
    text: str, pictures: int, expected: str | None
) -> None:
    raw = {"conversations": turns(text, "b"), "image": ["a.png"] * pictures}
    if expected is None:
        with pytest.raises(ItemError, match=r"^placeholder of another format: the text says "):
            adapted("standard", raw)
    else:
        assert texts(adapted("standard", raw))[0] == expected


def test_bare_base64_is_a_picture() -> None:
    for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"):
        buffer = io.BytesIO()
        Image.new("RGB", (30, 30), (1, 2, 3)).save(buffer, format)
        text = base64.b64encode(buffer.getvalue()).decode()
        (image,) = adapted("standard", {"conversations": turns("a", "b"), "image": text}).images
        assert PictureReader(False, False, 1).read(".", image, 1 << 20) == buffer.getvalue(), format
    for path in ("/9j/a.jpg", "/9j/" + "a" * 70 + ".jpg", "iVBORw0KGgo", "images/" + "a" * 90):
        assert adapted("standard", {"conversations": turns("a", "b"), "image": path}).images == (path,)


def test_texts_of_the_cauldron_are_turns() -> None:
    raw = {
        "images": [b"1"],
        "texts": [{"user": "What?", "assistant": "A."}, {"user": "And?", "assistant": "B."}],
    }
    assert texts(adapted("standard", raw)) == ["<|image|> What?", "A.", "And?", "B."]


@pytest.mark.parametrize(
    "raw",
    [
        {"input_image": b"1", "edited_image": b"2", "edit_prompt": "Make it red."},
        {"original_image": b"1", "output_image": b"2", "instruction": ["Make it red."]},
        {"__key__": "a", "input.jpg": b"1", "edited.png": b"2", "txt": "Make it red."},
        {"__key__": "a", "source.jpg": b"1", "target.png": b"2", "json": {"instruction": "Make it red."}},
    ],
)
def test_editing_draws_the_edited_picture(raw: dict[str, Any]) -> None:
    conversation = adapted("editing", raw)
    assert texts(conversation) == ["<|image|> Make it red.", "<|image|>"]
    assert conversation.images == (b"1", b"2")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"jpg": None, "url": "http://a/b", "caption": "a", "status": "failed", "error_message": "404"},
            "not downloaded: '404'",
        ),
        ({"__key__": "a", "jpg": b"1", "png": b"2", "txt": "a"}, "several pictures: "),
        ({"images": ["a", "b"], "caption": "a"}, "several pictures: "),
        ({"__key__": "a", "mp4": b"1", "txt": "a"}, "not a format that is read: a.mp4"),
        ({"__key__": "a", "heic": b"1", "txt": "a"}, "not a format that is read: a.heic"),
        ({"image": "a", "caption": None}, "no caption: .* 'caption' is null"),
    ],
)
def test_unusable_pairs_say_why(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ItemError, match=f"^{words}"):
        adapted("caption", raw)


def test_a_table_and_a_tar_of_img2dataset_become_the_same_task() -> None:
    for n in range(20):
        row = {"key": f"{n:09d}", "jpg": b"1", "caption": "a"}
        tar = {"__key__": f"{n:09d}", "jpg": b"1", "txt": "a", "json": {"key": f"{n:09d}", "caption": "a"}}
        ways = [find_adapter("caption_or_drawing")(raw) for raw in (row, tar)]
        assert ways[0]["conversations"] == ways[1]["conversations"]


@pytest.mark.parametrize(
    ("adapter", "raw"),
    [
        ("sharegpt", {"image": "0/1.jpg", "conversations": turns("Describe.\n<image>", "A sofa.")}),
        (
            "caption",
            {"__key__": "01", "jpg": b"1", "txt": "a cat", "json": {"caption": "a cat", "key": "01"}},
        ),
        ("drawing", {"img_path": "000/a.jpg", "prompt": "a fox --v 5", "Task2": {"Caption": "A fox."}}),
    ],
    ids=["LLaVA-Pretrain and ShareGPT4V", "CC12M", "JourneyDB"],
)
def test_the_datasets_of_the_recipes_are_accepted(adapter: str, raw: dict[str, Any]) -> None:
    assert len(adapted(adapter, raw).images) == 1
