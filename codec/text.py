"""Text -> token ids, piece by piece: the pieces of a conversation add up to the ids of the whole text.

By default a user's text can not become a token that only the system may write: `<eoss>` in a caption is six
plain characters. With `compat: unitoken` it becomes the token, as in the reference.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unitoken.codec.config import FOLDERS_BEGIN_WITH, how_to_get
from unitoken.codec.conversations import ItemError, brief
from unitoken.common.errors import ConfigError, one_line
from unitoken.common.missing_paths import where_looked
from unitoken.dataset.vocabulary import Vocabulary

# Characters that rarely merge with the text after them. A text is encoded with one of them before it, whose
# ids are then dropped: so the tokenizer puts no space before the text.
SEPARATORS = ("@", "\n", "\\", "=", ">", "`")

TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
CACHED_TEXTS, CACHED_LENGTH = 1 << 14, 200
"""The ids of so many texts are cached, of at most this many characters each."""


def check_tokenizer_folder(name: str) -> None:
    """Raise ConfigError if `name` can only be a folder and is missing; it would be looked up on the hub."""
    if (name.startswith(FOLDERS_BEGIN_WITH) or name.count("/") > 1) and not Path(name).is_dir():
        raise ConfigError(f"tokenizer: {name}: no such folder{where_looked(name)}{how_to_get(name)}")


def load_tokenizer(name: str) -> Any:
    """Load a text tokenizer with `AutoTokenizer` from a folder or the hub. No code from the hub is run.

    Raises:
        ConfigError: there is no such folder, or no tokenizer that can be loaded.
    """
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer  # 2 to 4 s

    check_tokenizer_folder(name)
    try:
        # One request: without a network, AutoTokenizer would retry each of its files, for 46 s.
        folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=TOKENIZER_FILES)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except KeyError:  # this kind of model has no tokenizer; the error's message is only a class
        raise ConfigError(f"tokenizer: {name}: there is no text tokenizer in it") from None
    except Exception as error:  # transformers raises OSError, ValueError, tokenizers' bare Exception, ...
        reason = one_line(error, 300)
        raise ConfigError(
            f"tokenizer: {name}: cannot be loaded as a folder or from the hub: {reason}"
        ) from None


class TextEncoder:
    """Encodes the texts of conversations.

    Args:
        tokenizer: a tokenizer of transformers.
        vocabulary: names the special tokens that no text may become.
        compat: whether special tokens in a text are parsed, as in the reference.
    """

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, compat: bool = False) -> None:
        self._tokenizer = tokenizer
        self._encode_short = functools.lru_cache(CACHED_TEXTS)(self._encode_any)
        self._compat = compat
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special = vocabulary.special_ids | added | set(tokenizer.all_special_ids)
        self._forbidden = special - {tokenizer.unk_token_id}  # an unknown character is no forgery
        # A tokenizer that prepends a space gives "my darling" the same ids alone and inside a sentence.
        alone = self._encode("my darling")
        self._adds_space = self._encode("Hi my darling")[-len(alone) :] == alone

    def encode(self, text: str, start: bool) -> Sequence[int]:
        """Return the ids of a piece of text.

        Args:
            text: the piece.
            start: whether it begins the conversation. No space is put before later pieces.

        Raises:
            ItemError: the text cannot be encoded without a special token in it.
        """
        ids = self._encode(text) if start or not self._adds_space else self._encode_after_separator(text)
        if self._compat or self._forbidden.isdisjoint(ids):
            return ids
        # Some tokenizers hold special tokens as ordinary words. Splitting the text splits the word.
        if len(text) == 1:
            raise ItemError(f"text that forges a special token: {brief(text)} is one by itself")
        middle = len(text) // 2
        return [*self.encode(text[:middle], start), *self.encode(text[middle:], start=False)]

    def count_of_beginning(
        self, text: str, ids: Sequence[int], length: int, start: bool, *, shared: bool
    ) -> int:
        """Return how many of a text's ids belong to its first `length` characters.

        Args:
            text: the whole text.
            ids: what `encode` returned for it.
            length: of the beginning.
            start: as for `encode`.
            shared: count a token that begins there and ends behind it.
        """
        if length == 0:
            return 0
        if self._tokenizer.is_fast:
            encoding = self._tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=not self._compat,
                return_offsets_mapping=True,
                verbose=False,
            )
            if tuple(encoding["input_ids"]) == tuple(ids):
                return sum(
                    (begin if shared else end - 1) < length for begin, end in encoding["offset_mapping"]
                )
        alone = self.encode(text[:length], start)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, alone, strict=False))
        count = sum(1 for _ in same)
        return count + (shared and count < len(alone))

    def _encode(self, text: str) -> tuple[int, ...]:
        """Return the ids; short texts are cached: questions and empty texts repeat, and each takes 50 us."""
        return self._encode_short(text) if len(text) <= CACHED_LENGTH else self._encode_any(text)

    def _encode_any(self, text: str) -> tuple[int, ...]:
        # verbose=False: no warning that a text is longer than the model's context.
        encoding = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=not self._compat, verbose=False
        )
        return tuple(encoding["input_ids"])

    def _encode_after_separator(self, text: str) -> Sequence[int]:
        for separator in SEPARATORS:
            alone, together = self._encode(separator), self._encode(separator + text)
            if together[: len(alone)] == alone:
                return together[len(alone) :]
        raise ItemError(
            f"text that merges with all of {' '.join(map(repr, SEPARATORS))} before it: {brief(text)}"
        )
