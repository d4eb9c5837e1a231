"""The common id space of text tokens, image codes and special tokens.

Ids are looked up by the **names** of tokens, never computed from other ids. In Chameleon's layout the names
are Chameleon's (`IMGIMG…Z` for image codes, `<racm3:break>` for the start of an image, ...); other layouts
bring names of their own (layout.py). Tokens that a tokenizer lacks are appended after its last id in a fixed
order, so any text tokenizer gets an image vocabulary.

Chameleon's image of h x w latents (UniToken, `FlexARItemProcessor.process_image`):

    image_start, grid(h/2), grid(w/2), row 0 (w codes), newline, ..., row h-1, newline, image_end
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError
from unitoken.common.files import write_aside
from unitoken.common.hashing import fingerprint
from unitoken.dataset.layout import (
    MAX_GRID,
    ConversationLayout,
    HeaderPart,
    ImageLayout,
    ImagePattern,
    Layout,
    TurnLayout,
    layout_from_json,
    name_of_code,
)

IMAGE_PLACEHOLDER = "<|image|>"
CHAMELEON = "chameleon"  # the name of the default layout
LATENTS_PER_GRID_UNIT = 2  # pictures are cut to multiples of 2 latents; a grid token counts 2
CHAMELEON_IMAGE = ImagePattern()

SPECIAL_NAMES = {
    "bos": "<s>",
    "image_end": "<eoss>",
    "image_start": "<racm3:break>",
    "separator": "<sentinel:0>",
    "end_of_turn": "<reserved08706>",
    "newline": "<reserved08799>",
}


def chameleon_names(codebook_size: int) -> Iterator[str]:
    """Yield the names of Chameleon's layout, in the order in which a tokenizer gets those it lacks."""
    yield from SPECIAL_NAMES.values()
    yield from (grid_name(units) for units in range(1, MAX_GRID + 1))
    yield from (image_code_name(code) for code in range(codebook_size))


def image_code_name(code: int) -> str:
    """Return Chameleon's name of an image code: its decimal digits as letters A-J, so 12 is `IMGIMGBCZ`."""
    return CHAMELEON_IMAGE.name_of_code(code)


def grid_name(units: int) -> str:
    """Return Chameleon's name of the token for an image side of `units` times 32 pixels."""
    return CHAMELEON_IMAGE.name_of_size(units)


def appended_ids(tokens: Mapping[str, int], names: Iterable[str]) -> dict[str, int]:
    """Return the id of each name: the tokenizer's, or for those that it lacks ids after its last one."""
    size, ids = max(tokens.values()) + 1, {}
    for name in names:
        if name in tokens:
            ids[name] = tokens[name]
        elif name not in ids:
            ids[name] = size
            size += 1
    return ids


def without_appended(tokens: Mapping[str, int], names: Iterable[str]) -> Mapping[str, int]:
    """Return a tokenizer's tokens as they were before `names` were added to it, as an export does.

    Args:
        tokens: of a tokenizer, by name.
        names: in the order in which the missing ones are appended.
    """
    names = list(names)
    ours = set(names)
    last = max((token for name, token in tokens.items() if name not in ours), default=-1)
    base = {name: token for name, token in tokens.items() if name not in ours or token <= last}
    if not base or len(base) == len(tokens):
        return tokens
    is_grown = (
        appended_ids(base, names).items() >= {name: tokens[name] for name in tokens.keys() - base}.items()
    )
    return base if is_grown else tokens


def tokens_digest(tokens: Mapping[str, int]) -> str:
    """Return the SHA-256 of every (name, id) of a tokenizer."""
    digest = hashlib.sha256()
    for name, token_id in sorted(tokens.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token_id}\t{name}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Vocabulary:
    """The ids of all tokens with a meaning of their own.

    Ids run from 0 to `size - 1`. `image_ids[code]` is the id of an image code, `grid_ids[n - 1]` that of
    grid size n, where sizes have tokens of their own. `layout` is None for Chameleon's.
    """

    size: int
    bos: int
    end_of_turn: int
    image_start: int
    image_end: int
    separator: int
    newline: int
    grid_ids: tuple[int, ...]
    image_ids: tuple[int, ...]
    # Of every (name, id) of the tokenizer: any other text vocabulary is another vocabulary.
    tokens_sha256: str
    layout: Layout | None = None
    first_new_id: int | None = None  # of those that the tokenizer lacked; None: see `new_ids`

    @classmethod
    def from_tokens(cls, tokens: Mapping[str, int], codebook_size: int) -> Vocabulary:
        """Create a vocabulary in Chameleon's layout.

        Args:
            tokens: `tokenizer.get_vocab()`: token -> id.
            codebook_size: the number of image codes.
        """
        names = list(chameleon_names(codebook_size))
        tokens = without_appended(tokens, names)
        ids = appended_ids(tokens, names)
        special: dict[str, Any] = {field: ids[name] for field, name in SPECIAL_NAMES.items()}
        after_special = iter(names[len(SPECIAL_NAMES) :])
        return cls(
            size=max(*tokens.values(), *ids.values()) + 1,
            grid_ids=tuple(ids[next(after_special)] for _ in range(MAX_GRID)),
            image_ids=tuple(ids[name] for name in after_special),
            tokens_sha256=tokens_digest(tokens),
            **special,
        )

    def from_tokenizer(self, tokens: Mapping[str, int], codebook_size: int) -> Vocabulary:
        """Return the vocabulary that tokenizers give in the same layout; it is equal to this if they do.

        Args:
            tokens: of a text tokenizer, which may have been grown by the tokens of this vocabulary.
            codebook_size: of an image tokenizer.
        """
        if self.layout is None:
            return Vocabulary.from_tokens(tokens, codebook_size)
        new = dict(zip(self.new_names(), self.new_ids, strict=True))
        tokens = {name: token for name, token in tokens.items() if new.get(name) != token}
        size = max([*tokens.values(), self.size - 1]) + 1
        image_ids = self.image_ids if len(self.image_ids) == codebook_size else (-1,) * codebook_size
        digest = tokens_digest(tokens)
        return dataclasses.replace(self, size=size, image_ids=image_ids, tokens_sha256=digest)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the vocabulary: 16 hex digits."""
        fields = asdict(self)
        del fields["first_new_id"]  # it follows from the tokens
        if self.layout is None:
            del fields["layout"]  # as older versions wrote it
        return fingerprint(json.dumps(fields, sort_keys=True).encode())

    @property
    def layout_name(self) -> str:
        """The name of the layout."""
        return CHAMELEON if self.layout is None else self.layout.name

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that only the system may write: a user's text never becomes one of these."""
        single = {self.bos, self.end_of_turn, self.image_start, self.image_end, self.separator, self.newline}
        single |= self.conversation.special_ids()
        if self.layout is not None:
            single |= {token for _, token in self.layout.names}
        return frozenset(single | set(self.grid_ids) | set(self.image_ids))

    @cached_property
    def placed_ids(self) -> frozenset[int]:
        """The special ids that are found in images and nowhere else, and Chameleon's first token."""
        if self.layout is None:
            return self.special_ids - {self.end_of_turn}
        return self.special_ids - self.conversation.special_ids() - {self.bos}

    @cached_property
    def conversation(self) -> ConversationLayout:
        """How turns are laid out."""
        if self.layout is not None:
            return self.layout.conversation
        end = (self.end_of_turn,)
        assistant = TurnLayout(opening=end, closing=end)
        human = TurnLayout(opening=(self.bos,))
        return ConversationLayout(human, TurnLayout(), assistant, assistant, text_starts_anew=False)

    @cached_property
    def image(self) -> ImageLayout:
        """How an image is laid out."""
        if self.layout is not None:
            return self.layout.image
        sizes = tuple((token,) for token in self.grid_ids)
        header: tuple[HeaderPart, ...] = ((self.image_start,), "height", "width")
        return ImageLayout(
            header, sizes, sizes, (self.newline,), (self.image_end,), CHAMELEON_IMAGE.latents_per_size
        )

    @cached_property
    def new_ids(self) -> range:
        """The ids that the tokenizer lacked. A model grows by them."""
        if self.first_new_id is not None:
            return range(self.first_new_id, self.size)
        first = self.size  # in Chameleon's layout: those at the end that are all special
        while first - 1 in self.special_ids:
            first -= 1
        return range(first, self.size)

    @cached_property
    def _id_of_code(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.image_ids, np.int64)

    @cached_property
    def _code_of_id(self) -> npt.NDArray[np.int64]:
        codes = np.full(self.size, -1, np.int64)
        codes[self._id_of_code] = np.arange(len(self.image_ids))
        return codes

    def new_names(self) -> list[str]:
        """Return the names of `new_ids`, with which a tokenizer grows."""
        if self.layout is None:
            special = [getattr(self, field) for field in SPECIAL_NAMES]
            ids = [*special, *self.grid_ids, *self.image_ids]
            names = dict(zip(ids, chameleon_names(len(self.image_ids)), strict=True))
        else:
            names = {token: name for name, token in self.layout.names}
            pattern = self.layout.code_name
            names |= {token: name_of_code(pattern, code) for code, token in enumerate(self.image_ids)}
        return [names[token] for token in self.new_ids]

    def image_block(self, codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return the ids of an image block for codes (h, w). Raises ValueError for a size without tokens."""
        height, width = codes.shape
        image = self.image
        row_end = np.broadcast_to(np.array(image.row_end, np.int64), (height, len(image.row_end)))
        rows = np.concatenate([self._id_of_code[codes], row_end], axis=1)  # (h, w + row end)
        return np.concatenate(
            [
                np.array(image.header_ids(height, width), np.int64),
                rows.reshape(-1),
                np.array(image.end, np.int64),
            ]
        )

    def image_codes(self, block: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return the codes (h, w) of an image block. Raises ValueError if the block breaks the layout."""
        ids, image = np.asarray(block, np.int64), self.image
        height, width, begin = image.read_header(ids)
        end = len(ids) - len(image.end)
        if ids[end:].tolist() != list(image.end):
            raise ValueError(f"{len(ids)} ids are no image block of {height} x {width} latents")
        rows = ids[begin:end].reshape(height, width + len(image.row_end))
        codes: npt.NDArray[np.int64] = self._code_of_id[rows[:, :width]]
        if (codes < 0).any() or (rows[:, width:] != image.row_end).any():
            raise ValueError("an image block with a token that is neither a code nor a newline in its place")
        return codes

    def image_grammar(self, height: int, width: int) -> Iterator[tuple[int, ...]]:
        """Yield the ids that are allowed at each position of an image block of height x width latents."""
        for token in self.image.header_ids(height, width):
            yield (token,)
        for _ in range(height):
            for _ in range(width):
                yield self.image_ids
            for token in self.image.row_end:
                yield (token,)
        for token in self.image.end:
            yield (token,)

    def dump(self) -> bytes:
        """Return the content of a vocabulary file."""
        fields = asdict(self)
        if self.layout is None:  # as older versions wrote it
            del fields["layout"], fields["first_new_id"]
        return json.dumps(fields, sort_keys=True).encode() + b"\n"

    def save(self, path: Path) -> None:
        """Write a vocabulary file."""
        write_aside(path, self.dump())

    @classmethod
    def parse(cls, data: bytes, where: str) -> Vocabulary:
        """Parse a vocabulary file.

        Args:
            data: its content.
            where: its origin, for messages.

        Raises:
            ConfigError: it is not a vocabulary file.
        """
        try:
            fields = json.loads(data)
            fields["grid_ids"] = tuple(fields["grid_ids"])
            fields["image_ids"] = tuple(fields["image_ids"])
            if "layout" in fields:
                fields["layout"] = layout_from_json(fields["layout"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{where}: not a vocabulary file: {error}") from None

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a vocabulary file. Raises ConfigError."""
        try:
            return cls.parse(path.read_bytes(), str(path))
        except OSError as error:
            raise ConfigError(f"{path}: not a vocabulary file: {error}") from None


def check_same_vocabulary(
    vocabulary: Vocabulary, owner: str, other: Vocabulary, other_owner: str, hint: str = ""
) -> None:
    """Check that two parts of a run use the same vocabulary.

    Args:
        vocabulary: of `owner`.
        owner: for the message: a stream and its folder, a setting, a checkpoint.
        other: of `other_owner`.
        other_owner: as `owner`.
        hint: what to do about a difference.

    Raises:
        ConfigError: they differ; the message names both owners, fingerprints and sizes.
    """
    if vocabulary.layout_name != other.layout_name:
        raise ConfigError(
            f"{owner} is in the layout '{vocabulary.layout_name}', {other_owner} in '{other.layout_name}'"
            f"{f'; {hint}' if hint else ''}"
        )
    if vocabulary.fingerprint != other.fingerprint:
        raise ConfigError(
            f"{owner} has a vocabulary with fingerprint {vocabulary.fingerprint} ({vocabulary.size} tokens), "
            f"{other_owner} has {other.fingerprint} ({other.size} tokens){f'; {hint}' if hint else ''}"
        )
