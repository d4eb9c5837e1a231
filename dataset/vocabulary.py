"""The common id space of text tokens, image codes and special tokens.

Ids are looked up by the **names** of tokens, which are Chameleon's (`IMGIMG…Z` for image codes,
`<racm3:break>` for the start of an image, ...), never computed from other ids. Tokens that a tokenizer
lacks are appended after its last id in a fixed order, so any text tokenizer gets an image vocabulary.

Layout of an image of h x w latents (UniToken, `FlexARItemProcessor.process_image`):

    image_start, grid(h/2), grid(w/2), row 0 (w codes), newline, ..., row h-1, newline, image_end
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.common.errors import ConfigError
from unitoken.common.files import write_aside
from unitoken.common.hashing import fingerprint

IMAGE_PLACEHOLDER = "<|image|>"
LATENTS_PER_GRID_UNIT = 2  # a grid token counts 32 pixels = 2 latents of 16 pixels
MAX_GRID = 99  # <reserved08801> .. <reserved08899>

SPECIAL_NAMES = {
    "bos": "<s>",
    "image_end": "<eoss>",
    "image_start": "<racm3:break>",
    "separator": "<sentinel:0>",
    "end_of_turn": "<reserved08706>",
    "newline": "<reserved08799>",
}

_DIGITS = str.maketrans("0123456789", "ABCDEFGHIJ")


def image_code_name(code: int) -> str:
    """Return Chameleon's name of an image code: its decimal digits as letters A-J, so 12 is `IMGIMGBCZ`."""
    return f"IMGIMG{str(code).translate(_DIGITS)}Z"


def grid_name(units: int) -> str:
    """Return Chameleon's name of the token for an image side of `units` times 32 pixels."""
    return f"<reserved{8800 + units:05d}>"


def image_tokens(height: int, width: int) -> int:
    """Return the number of tokens of an image block of height x width latents."""
    return 4 + height * (width + 1)


@dataclass(frozen=True)
class Vocabulary:
    """The ids of all tokens with a meaning of their own.

    Ids run from 0 to `size - 1`. `image_ids[code]` is the id of an image code, `grid_ids[n - 1]` that of
    grid size n.
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
    tokens_sha256: (
        str  # of every (name, id) of the tokenizer: any other text vocabulary is another vocabulary
    )

    @classmethod
    def from_tokens(cls, ids: Mapping[str, int], codebook_size: int) -> Vocabulary:
        """Create a vocabulary from `tokenizer.get_vocab()` (token -> id) and the number of image codes."""
        digest = hashlib.sha256()
        for name, token_id in sorted(ids.items(), key=lambda item: (item[1], item[0])):
            digest.update(f"{token_id}\t{name}\n".encode())
        size = max(ids.values()) + 1

        def find(name: str) -> int:
            nonlocal size
            if name in ids:
                return ids[name]
            size += 1
            return size - 1

        special = {field: find(name) for field, name in SPECIAL_NAMES.items()}
        grid = tuple(find(grid_name(n)) for n in range(1, MAX_GRID + 1))
        image = tuple(find(image_code_name(code)) for code in range(codebook_size))
        return cls(size=size, grid_ids=grid, image_ids=image, tokens_sha256=digest.hexdigest(), **special)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the vocabulary: 16 hex digits."""
        return fingerprint(json.dumps(asdict(self), sort_keys=True).encode())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that only the system may write: a user's text never becomes one of these."""
        single = {self.bos, self.end_of_turn, self.image_start, self.image_end, self.separator, self.newline}
        return frozenset(single | set(self.grid_ids) | set(self.image_ids))

    @cached_property
    def new_ids(self) -> range:
        """The ids that the tokenizer lacked: those at the end that are all special. A model grows by them."""
        first = self.size
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

    def image_block(self, codes: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return the ids of an image block, (image_tokens(h, w),), for codes (h, w). h and w must be even."""
        height, width = codes.shape
        grid = [self._grid_id(height), self._grid_id(width)]
        rows = np.column_stack([self._id_of_code[codes], np.full(height, self.newline)])  # (h, w + 1)
        return np.concatenate([[self.image_start, *grid], rows.reshape(-1), [self.image_end]])

    def _grid_id(self, latents: int) -> int:
        units, odd = divmod(latents, LATENTS_PER_GRID_UNIT)
        if odd or not 1 <= units <= len(self.grid_ids):
            raise ValueError(
                f"an image side of {latents} latents: "
                f"expected an even number from 2 to {2 * len(self.grid_ids)}"
            )
        return self.grid_ids[units - 1]

    def image_codes(self, block: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return the codes (h, w) of an image block. Raises ValueError if the block breaks the layout."""
        ids = np.asarray(block, np.int64)
        sizes = {token: LATENTS_PER_GRID_UNIT * (n + 1) for n, token in enumerate(self.grid_ids)}
        height, width = sizes.get(int(ids[1]), 0), sizes.get(int(ids[2]), 0)
        if len(ids) != 4 + height * (width + 1) or ids[0] != self.image_start or ids[-1] != self.image_end:
            raise ValueError(f"{len(ids)} ids are no image block of {height} x {width} latents")
        rows = ids[3:-1].reshape(height, width + 1)
        codes: npt.NDArray[np.int64] = self._code_of_id[rows[:, :-1]]
        if (codes < 0).any() or (rows[:, -1] != self.newline).any():
            raise ValueError("an image block with a token that is neither a code nor a newline in its place")
        return codes

    def image_grammar(self, height: int, width: int) -> Iterator[tuple[int, ...]]:
        """Yield the ids that are allowed at each position of an image block of height x width latents."""
        yield (self.image_start,)
        yield (self._grid_id(height),)
        yield (self._grid_id(width),)
        for _ in range(height):
            for _ in range(width):
                yield self.image_ids
            yield (self.newline,)
        yield (self.image_end,)

    def dump(self) -> bytes:
        """Return the content of a vocabulary file."""
        return json.dumps(asdict(self), sort_keys=True).encode() + b"\n"

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
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
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
    if vocabulary.fingerprint != other.fingerprint:
        raise ConfigError(
            f"{owner} has a vocabulary with fingerprint {vocabulary.fingerprint} ({vocabulary.size} tokens), "
            f"{other_owner} has {other.fingerprint} ({other.size} tokens){f'; {hint}' if hint else ''}"
        )
