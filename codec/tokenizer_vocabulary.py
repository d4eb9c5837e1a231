"""A text tokenizer, the size of a codebook and a layout -> the vocabulary.

vocabulary = tokenizer_vocabulary(load_tokenizer("weights/Qwen3-0.6B"), 16384, "chat_template")
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unitoken.codec.chat_template import generated_tokens, read_chat_template, render
from unitoken.codec.conversations import Conversation, Turn
from unitoken.codec.sequence import lay_out
from unitoken.codec.text import TextEncoder
from unitoken.common.config import load_config
from unitoken.common.errors import ConfigError
from unitoken.common.hashing import fingerprint
from unitoken.dataset.layout import (
    MAX_GRID,
    ConversationLayout,
    ConversationPattern,
    HeaderPart,
    ImageLayout,
    ImagePattern,
    Layout,
    LayoutPattern,
    Pieces,
    TurnLayout,
    TurnPattern,
)
from unitoken.dataset.record import IGNORED
from unitoken.dataset.vocabulary import (
    CHAMELEON,
    SPECIAL_NAMES,
    Vocabulary,
    appended_ids,
    tokens_digest,
    without_appended,
)

CHAT_TEMPLATE, EMU3 = "chat_template", "emu3"
EMU3_IMAGE = ImagePattern(
    block="<|image start|>{height}*{width}<|image token|>{rows}<|extra_201|><|image end|>",
    row_end="<|extra_200|>",
    code_name="<|visual token {code:06}|>",
    size_name=None,
    latents_per_size=1,
)
"""`Emu3Processor` of transformers: sizes as text, the end of each line, the end of the frame."""
EMU3_SYSTEM = "You are a helpful assistant. "
EXAMPLES = ("Hello", " what's  up?\n", "It is 12:30.", "\n\nüber", "a")
"""Texts on which a layout that was read from a chat template is compared with the template."""


def is_layout_file(layout: str) -> bool:
    """Return whether the setting `layout` names a user's file."""
    return layout.endswith((".yaml", ".yml"))


def tokenizer_vocabulary(tokenizer: Any, codebook_size: int, layout: str) -> Vocabulary:
    """Return the vocabulary of a tokenizer in a layout.

    Args:
        tokenizer: a tokenizer of transformers.
        codebook_size: the number of image codes.
        layout: `chameleon`, `chat_template`, `emu3`, or the path of a user's YAML file.

    Raises:
        ConfigError: there is no such layout, or it does not fit the tokenizer.
    """
    if layout == CHAMELEON:
        return Vocabulary.from_tokens(tokenizer.get_vocab(), codebook_size)
    if layout == CHAT_TEMPLATE:
        return _of_chat_template(tokenizer, codebook_size)
    if layout == EMU3:
        return _build(tokenizer, codebook_size, layout, _emu3(tokenizer))
    if not is_layout_file(layout):
        names = ", ".join((CHAMELEON, CHAT_TEMPLATE, EMU3))
        raise ConfigError(f"layout: expected {names}, or a file that ends in .yaml, found '{layout}'")
    pattern = load_config(LayoutPattern, layout)
    name = f"{Path(layout).stem} {fingerprint(pattern.model_dump_json().encode())}"
    return _build(tokenizer, codebook_size, name, pattern)


def _emu3(tokenizer: Any) -> LayoutPattern:
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    if not begin or not end:
        raise ConfigError("layout: emu3: the tokenizer has no token for the begin or the end of a text")
    conversation = ConversationPattern(
        human=TurnPattern(opening=f"{begin}{EMU3_SYSTEM}USER: "),
        later_human=TurnPattern(opening="USER: "),
        assistant=TurnPattern(opening=" ASSISTANT:", lead=" ", closing=end),
        system=TurnPattern(opening=begin),
        human_after_system=TurnPattern(opening=" USER: "),
    )
    return LayoutPattern(tokens=[begin, end], conversation=conversation, image=EMU3_IMAGE)


def _build(
    tokenizer: Any, codebook_size: int, name: str, pattern: LayoutPattern, closing: str = "end"
) -> Vocabulary:
    """Look up the names of a pattern in a tokenizer, and append those that it lacks.

    Args:
        tokenizer: a tokenizer of transformers.
        codebook_size: the number of image codes.
        name: of the layout.
        pattern: the layout in names.
        closing: what is trained on of the assistant's `closing`: "end" up to its first special token, "all",
            or "nothing".
    """
    image = pattern.image
    names = list(_names(pattern))
    codes = [image.name_of_code(code) for code in range(codebook_size)]
    tokens = without_appended(tokenizer.get_vocab(), [*names, *codes])
    ids = appended_ids(tokens, [*names, *codes])
    special = _special_ids(tokenizer) | {name: ids[name] for name in names}
    conversation = _conversation(pattern.conversation, special, closing)
    conversation = replace(conversation, text_starts_anew=_text_starts_anew(tokenizer, special))
    encode = _Numbers(tokenizer, conversation.text_starts_anew)
    laid_out = _image(image, special, encode)
    end = conversation.end_of_turn
    if end is None:
        raise ConfigError(f"layout: {name}: no special token ends the assistant's last turn (`closing`)")
    begin = conversation.first_ids() or {end}
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else min(begin)
    sizes = [ids[image.name_of_size(n)] for n in _grid(image)]
    vocabulary = Vocabulary(
        size=max(*tokens.values(), *ids.values()) + 1,
        bos=bos,
        end_of_turn=end,
        image_start=laid_out.start,
        image_end=laid_out.end[-1],
        separator=ids[SPECIAL_NAMES["separator"]],
        newline=laid_out.row_end[-1] if laid_out.row_end else ids[SPECIAL_NAMES["newline"]],
        grid_ids=tuple(sizes),
        image_ids=tuple(ids[code] for code in codes),
        tokens_sha256=tokens_digest(tokens),
        layout=Layout(
            name, conversation, laid_out, image.code_name, tuple((name, ids[name]) for name in names)
        ),
        first_new_id=max(tokens.values()) + 1,
    )
    _check_ids(vocabulary, name)
    return vocabulary


def _names(pattern: LayoutPattern) -> Iterator[str]:
    """Yield the names of a pattern's special tokens, without codes, in the order of their appending."""
    image = pattern.image
    block = re.split(r"\{height\}|\{width\}|\{rows\}", image.block)
    written = [name for part in (*block, image.row_end) for name in re.findall(r"<[^<>]*>", part)]
    yield from dict.fromkeys(
        (
            *pattern.tokens,
            *written,
            SPECIAL_NAMES["separator"],
            *([] if image.row_end else [SPECIAL_NAMES["newline"]]),
            *(image.name_of_size(units) for units in _grid(image)),
        )
    )


def _grid(image: ImagePattern) -> range:
    """Return the sizes that have tokens of their own."""
    return range(1, MAX_GRID + 1) if image.size_name is not None else range(0)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _pieces(text: str, special: Mapping[str, int]) -> Pieces:
    """Split text at the names of special tokens."""
    names = sorted(special, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return tuple(special.get(part, part) for part in parts if part)


def _conversation(
    pattern: ConversationPattern, special: Mapping[str, int], trained: str
) -> ConversationLayout:
    def turn(turn: TurnPattern) -> TurnLayout:
        closing, trailing = _pieces(turn.closing, special), _pieces(turn.trailing, special)
        first_special = next(
            (n for n, piece in enumerate(closing, 1) if isinstance(piece, int)), len(closing)
        )
        end = {"end": first_special, "all": len(closing), "nothing": 0}[trained]
        return TurnLayout(
            opening=_pieces(turn.opening, special),
            lead=_pieces(turn.lead, special),
            closing=closing[:end],
            trailing=closing[end:] + trailing,
            strip=turn.strip,
        )

    later = pattern.later_human or pattern.human
    after_system = pattern.human_after_system or later
    return ConversationLayout(
        human=turn(pattern.human),
        later_human=turn(later),
        assistant=turn(pattern.assistant),
        last_assistant=turn(pattern.last_assistant or pattern.assistant),
        system=turn(pattern.system) if pattern.system is not None else None,
        human_after_system=turn(after_system) if pattern.system is not None else None,
    )


def _text_starts_anew(tokenizer: Any, special: Mapping[str, int]) -> bool:
    """Return whether the tokenizer encodes text after a special token as it encodes the begin of a text."""
    name = next((name for name, token in special.items() if token in tokenizer.added_tokens_decoder), None)
    if name is None:
        return True
    together = tokenizer(f"{name}Hello", add_special_tokens=False)["input_ids"]
    return bool(together[1:] == tokenizer("Hello", add_special_tokens=False)["input_ids"])


class _Numbers:
    """Encodes the text in an image's header, which follows a special token."""

    def __init__(self, tokenizer: Any, starts_anew: bool) -> None:
        self._tokenizer, self._starts_anew = tokenizer, starts_anew

    def __call__(self, text: str) -> tuple[int, ...]:
        """Encode text after a special token."""
        if not self._starts_anew:
            return tuple(self._encode(f"@{text}")[len(self._encode("@")) :])
        return tuple(self._encode(text))

    def _encode(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(encoded["input_ids"])


def _image(pattern: ImagePattern, special: Mapping[str, int], encode: _Numbers) -> ImageLayout:
    head, _, end_text = pattern.block.partition("{rows}")
    head_pieces = _pieces(head, special)
    end, row_end = _pieces(end_text, special), _pieces(pattern.row_end, special)
    tables: dict[str, tuple[tuple[int, ...], ...]] = {}
    header: list[HeaderPart] = []
    for piece in head_pieces:
        if isinstance(piece, int):
            header.append((piece,))
        elif pattern.size_name is None:
            header += _text_header(piece, encode, tables, pattern.latents_per_size)
        else:
            header += _named_header(piece, pattern, special, tables)
    if not header or not isinstance(header[0], tuple) or not isinstance(head_pieces[0], int):
        raise ConfigError(
            f"layout: image.block: expected a special token at its begin, found '{pattern.block}'"
        )
    if pattern.size_name is None and isinstance(head_pieces[-1], str):
        raise ConfigError(
            "layout: image.block: expected a special token between the sizes and {rows}, "
            f"found '{pattern.block}'"
        )
    if not end or not all(isinstance(piece, int) for piece in (*end, *row_end)):
        raise ConfigError(
            f"layout: image: expected special tokens at the end of block and rows, "
            f"found '{end_text}' and '{pattern.row_end}'"
        )
    ends = tuple(piece for piece in end if isinstance(piece, int))
    row_ends = tuple(piece for piece in row_end if isinstance(piece, int))
    return ImageLayout(
        tuple(header), tables["height"], tables["width"], row_ends, ends, pattern.latents_per_size
    )


def _placeholders(text: str) -> list[str]:
    return [part for part in re.split(r"(\{height\}|\{width\})", text) if part]


def _named_header(
    text: str,
    pattern: ImagePattern,
    special: Mapping[str, int],
    tables: dict[str, tuple[tuple[int, ...], ...]],
) -> Iterator[HeaderPart]:
    """Yield the parts of a header between special tokens, where each size has a token of its own."""
    for part in _placeholders(text):
        if part not in ("{height}", "{width}"):
            raise ConfigError(
                f"layout: image.block: '{part}' is no special token of the tokenizer or of `tokens`"
            )
        name: HeaderPart = "height" if part == "{height}" else "width"
        assert isinstance(name, str)
        tables[name] = tuple((special[pattern.name_of_size(units)],) for units in _grid(pattern))
        yield name


def _text_header(
    text: str, encode: _Numbers, tables: dict[str, tuple[tuple[int, ...], ...]], latents_per_size: int
) -> Iterator[HeaderPart]:
    """Yield the parts of a header between special tokens, where sizes are text.

    Raises:
        ConfigError: the tokenizer merges sizes with the text beside them.
    """
    numbers = range(1, MAX_GRID * 2 // latents_per_size + 1)
    parts = re.findall(r"(.*?)\{(height|width)\}", text)
    text_before = ""
    for literal, name in parts:  # the text before a number is encoded with it, as a space is a part of it
        begin = len(encode(text_before)) if text_before else 0
        tables[name] = tuple(encode(f"{text_before}{literal}{number}")[begin:] for number in numbers)
        text_before += f"{literal}1"
        yield "height" if name == "height" else "width"
    last = text[text.rindex("}") + 1 :] if parts else text
    ids_after = encode(text_before + last)[len(encode(text_before)) if text_before else 0 :]
    if ids_after:
        yield ids_after
    names = [name for _, name in parts]
    sides = itertools.chain(
        zip(numbers, numbers, strict=True), ((n, 1) for n in numbers), ((1, n) for n in numbers)
    )
    for sizes in sides if parts else ():
        values = dict(zip(("height", "width"), sizes, strict=True))
        whole = text.replace("{height}", str(values["height"])).replace("{width}", str(values["width"]))
        pieces = [tables[name][values[name] - 1] for name in names] + [ids_after]
        if tuple(itertools.chain.from_iterable(pieces)) != encode(whole):
            raise ConfigError(
                f"layout: image.block: the tokenizer merges the numbers of '{whole}' with the text beside "
                "them; give sizes tokens of their own (`size_name`)"
            )


def _check_ids(vocabulary: Vocabulary, name: str) -> None:
    """Raise ConfigError if one token has two meanings in a layout."""
    image = vocabulary.image
    single = [image.start, *image.end, *image.row_end, vocabulary.separator, *vocabulary.grid_ids]
    twice = {token for token in single if single.count(token) > 1}
    clash = (
        twice | ({*single} & {*vocabulary.image_ids}) | ({*single} & vocabulary.conversation.special_ids())
    )
    if clash or len({*vocabulary.image_ids}) < len(vocabulary.image_ids):
        raise ConfigError(f"layout: {name}: a token has two meanings: id {min(clash, default=-1)}")


def _of_chat_template(tokenizer: Any, codebook_size: int) -> Vocabulary:
    """Return the vocabulary in the layout of the tokenizer's chat template.

    Where the template marks what is generated, these tokens are trained on; otherwise what the assistant says
    and its end.

    Raises:
        ConfigError: there is no template, or one that can not be split.
    """
    for trains_lead, closing in itertools.product((False, True), ("end", "all", "nothing")):
        pattern = LayoutPattern(conversation=read_chat_template(tokenizer, trains_lead))
        vocabulary = _build(tokenizer, codebook_size, CHAT_TEMPLATE, pattern, closing)
        if _trains_what_is_marked(vocabulary, tokenizer):
            return vocabulary
    raise ConfigError(
        "layout: chat_template: the template can not be split at its marks of what is generated, which are "
        "neither the answers nor the answers and their end"
    )


def _trains_what_is_marked(vocabulary: Vocabulary, tokenizer: Any) -> bool:
    """Compare tokens and targets of a layout with those of the chat template.

    Raises:
        ConfigError: the template gives other tokens.
    """
    text = TextEncoder(tokenizer, vocabulary)
    for roles in ("ua", "uaua", "sua"):
        if roles.startswith("s") and vocabulary.conversation.system is None:
            continue
        texts = list(itertools.islice(itertools.cycle(EXAMPLES), len(roles)))
        names = {"s": "system", "u": "user", "a": "assistant"}
        messages = [
            {"role": names[role], "content": content} for role, content in zip(roles, texts, strict=True)
        ]
        record = lay_out(_conversation_of(roles, texts), [], [], text, vocabulary)
        expected = tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"]
        if record.tokens.tolist() != expected:
            raise ConfigError(
                f"layout: chat_template: the template can not be split at {messages}: "
                f"its tokens are {expected}, those of its parts {record.tokens.tolist()}"
            )
        marked = generated_tokens(tokenizer, messages)
        if marked is not None and (record.labels() != IGNORED).tolist() != marked:
            return False
    return True


def _conversation_of(roles: str, texts: Sequence[str]) -> Conversation:
    turns = [Turn((text,), trained=role == "a") for role, text in zip(roles, texts, strict=True)]
    if roles.startswith("s"):
        return Conversation("", tuple(turns[1:]), (), system=turns[0])
    return Conversation("", tuple(turns), ())
