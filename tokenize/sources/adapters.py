"""Other formats -> the standard item that `codec/conversations.py` describes.

An adapter is a function from a raw item to a standard one: `{"conversations": [...], "image": [...]}`. The
settings name one of `ADAPTERS`, or `path/to/file.py:function` for a user's own. An exception in it rejects
the item, with its message.

A raw item is an object of a JSON list or line; a row of a table by its columns; or of a tar the files of a
sample by their suffix, `{"__key__": "000012", "jpg": bytes, "txt": str, "json": object}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from unitoken.codec.conversations import PICTURE_KEYS, ItemError, brief, pictures_of
from unitoken.common.user_functions import load_user_function, user_function_fingerprint
from unitoken.dataset.manifest import LEFT_OUT
from unitoken.dataset.vocabulary import IMAGE_PLACEHOLDER, Vocabulary
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.sources.adapter_fields import (
    EDITED_KEYS,
    SOURCE_KEYS,
    Raw,
    choose_by_id,
    fields_of,
    file_named,
    files_of,
    find_id,
    instruction,
    join_system,
    one_picture,
    picture_and_caption,
    picture_files_of,
    question_and_answer,
    refuse_unreadable_media,
    text_and_images,
    turns_under,
    without_greeting,
)

Adapter = Callable[[Raw], Raw]

DESCRIBE = (
    "Describe this image.",
    "What does this image show?",
    "Write a caption for this image.",
    "What can be seen in this picture?",
    "Give a description of this picture.",
)
DRAW = (
    "Draw this: {}",
    "Generate an image of this description: {}",
    "Create a picture that shows the following: {}",
    "Paint what this text describes: {}",
    "Make an image for this caption: {}",
)


def standard(raw: Raw) -> Raw:
    """Keep a standard item as it is.

    Of a tar's sample the `.json` is the item, with the pictures that it names by their suffix, or else all of
    them. `texts: [{"user": ..., "assistant": ...}]` is read as turns (The Cauldron).
    """
    item = raw if "__key__" not in raw else _item_of_sample(raw)
    if "conversations" not in item and isinstance(item.get("texts"), list):
        pairs = [pair if isinstance(pair, dict) else {} for pair in item["texts"]]
        turns = [
            turn for pair in pairs for turn in question_and_answer(pair.get("user"), pair.get("assistant"))
        ]
        item = {**{key: value for key, value in item.items() if key != "texts"}, "conversations": turns}
    return item


def _item_of_sample(raw: Raw) -> Raw:
    found = raw.get("json")
    if not isinstance(found, dict):
        raise ItemError(
            "no conversations: expected a .json file with an object, "
            f"the sample's files are {brief(files_of(raw))}"
        )
    named = pictures_of(found)
    if named or any(isinstance(found.get(key), list) for key in PICTURE_KEYS):  # an empty list names none
        images = [file_named(raw, image) for image in named]
    else:
        images = [raw[suffix] for suffix in picture_files_of(raw)]
    return {**{key: value for key, value in found.items() if key not in PICTURE_KEYS}, "image": images}


def sharegpt(raw: Raw) -> Raw:
    """Adapt LLaVA's and ShareGPT's items.

    They write `<image>` for a picture, have other names for the roles, a system turn, and a greeting by the
    assistant.
    """
    item = standard(raw)
    turns = turns_under(item, "conversations")
    for turn in turns:
        if isinstance(turn["value"], str):
            turn["value"] = turn["value"].replace("<image>", IMAGE_PLACEHOLDER)
    if item.get("system"):
        turns = [{"from": "system", "value": item["system"]}, *turns]
    turns, left_out = without_greeting(turns)
    return {
        "id": item.get("id"),
        "conversations": join_system(turns),
        "image": pictures_of(item),
        LEFT_OUT: left_out,
    }


def messages(raw: Raw) -> Raw:
    """Adapt OpenAI's items: `messages` with a `role` and a `content` that is text or a list of parts."""
    item = standard(raw)
    separate = iter(pictures_of(item))
    images: list[Any] = []
    turns = turns_under(item, "messages")
    for turn in turns:
        if isinstance(turn["value"], list):
            turn["value"], images_of_turn = text_and_images(turn["value"], separate)
            images += images_of_turn
    return {"id": item.get("id"), "conversations": join_system(turns), "image": [*images, *separate]}


def caption(raw: Raw) -> Raw:
    """Ask the model to describe the picture of a pair."""
    picture, text = picture_and_caption(raw)
    request = choose_by_id(DESCRIBE, raw, text)
    turns = question_and_answer(f"{IMAGE_PLACEHOLDER} {request}", text)
    return {"id": find_id(raw), "conversations": turns, "image": [picture]}


def drawing(raw: Raw) -> Raw:
    """Ask the model to draw the picture of a pair."""
    picture, text = picture_and_caption(raw)
    request = choose_by_id(DRAW, raw, text).format(text)
    turns = question_and_answer(request, IMAGE_PLACEHOLDER)
    return {"id": find_id(raw), "conversations": turns, "image": [picture]}


def caption_or_drawing(raw: Raw) -> Raw:
    """Use about half of the pairs as captions and the other half as drawings, each pair in one way only."""
    _, text = picture_and_caption(raw)
    adapter: Adapter = choose_by_id((caption, drawing), raw, text)
    return adapter(raw)


def editing(raw: Raw) -> Raw:
    """Ask the model to draw the edited picture (InstructPix2Pix, MagicBrush)."""
    fields = fields_of(raw)
    for suffix in picture_files_of(raw):  # x.input.jpg and x.edited.jpg are the fields `input` and `edited`
        fields[suffix.rpartition(".")[0]] = raw[suffix]
    source, edited = one_picture(raw, fields, SOURCE_KEYS), one_picture(raw, fields, EDITED_KEYS)
    turns = question_and_answer(f"{IMAGE_PLACEHOLDER} {instruction(raw, fields)}", IMAGE_PLACEHOLDER)
    return {"id": find_id(raw), "conversations": turns, "image": [source, edited]}


ADAPTERS: dict[str, Adapter] = {
    "standard": standard,
    "sharegpt": sharegpt,
    "messages": messages,
    "caption": caption,
    "drawing": drawing,
    "caption_or_drawing": caption_or_drawing,
    "editing": editing,
}


def find_adapter(name: str) -> Adapter:
    """Return the adapter called `name`, wrapped so that it raises ItemErrors only.

    Raises:
        ConfigError: there is no such adapter, file or function.
    """
    function = ADAPTERS.get(name) or load_user_function(name, "adapter", ADAPTERS)

    def adapter(raw: Raw) -> Raw:
        if not isinstance(raw, dict):
            raise ItemError(f"not an item: expected a JSON object, found {brief(raw)}")
        if name in ADAPTERS:
            refuse_unreadable_media(raw)
        try:
            return function(raw)
        except ItemError:
            raise
        except Exception as error:  # a user's function may fail in any way
            if type(error) is ValueError:
                raise ItemError(str(error)) from None
            reason = re.sub(r" at 0x[0-9a-f]+", "", str(error))  # rejects are the same in each run
            raise ItemError(f"adapter failed: {type(error).__name__}: {reason[:200]}") from None

    return adapter


def adapter_fingerprint(name: str) -> str:
    """Return what a dataset's manifest keeps of its adapter.

    It is the name; of a user's own adapter it is the function's name and a hash of its file.
    """
    return name if name in ADAPTERS else user_function_fingerprint(name, "adapter", ADAPTERS)


def prepends_system(config: TokenizeConfig, vocabulary: Vocabulary) -> bool:
    """Return whether the text of a system turn is put before the first human's."""
    if config.system is not None:
        return config.system == "prepend"
    is_ours = config.adapter in ADAPTERS and config.adapter != "standard"
    return is_ours and vocabulary.conversation.system is None
