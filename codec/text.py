"""Text -> token ids, piece by piece, so that the pieces of a conversation add up to what it is as a whole.

By default a user's text can not become a token that only the system may write: `<eoss>` in a caption is seven
characters. With `compat: unitoken` it is parsed, as the reference does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unitoken.codec.config import FOLDERS_BEGIN_WITH, how_to_get
from unitoken.codec.conversations import ItemError, brief
from unitoken.common.errors import ConfigError, one_line
from unitoken.dataset.vocabulary import Vocabulary

# Characters that rarely merge with what follows, so that a text can be encoded behind one of them and it be dropped:
# this keeps the tokenizer from putting a space before the text.
PREFIXES = ("@", "\n", "\\", "=", ">", "`")

TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
CACHED_TEXTS, CACHED_LENGTH = 1 << 14, 200  # characters


def check_tokenizer_folder(name: str) -> None:
    """Raises ConfigError where `name` can only be a folder and is none; else the hub would be asked for it."""
    if (name.startswith(FOLDERS_BEGIN_WITH) or name.count("/") > 1) and not Path(name).is_dir():
        raise ConfigError(f"tokenizer: {name}: no such folder{how_to_get(name)}")


def load_tokenizer(name: str) -> Any:
    """Any text tokenizer that `AutoTokenizer` loads, from a folder or the hub. No code from the hub is run."""
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer  # 2 to 4 s

    check_tokenizer_folder(name)
    try:
        # By one request: without a network, AutoTokenizer asks for each of its files again and again, 46 s long.
        folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=TOKENIZER_FILES)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except KeyError:  # the model's kind has no tokenizer: its message is a class
        raise ConfigError(f"tokenizer: {name}: there is no text tokenizer in it") from None
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError, tokenizers' bare Exception, ...
        reason = one_line(error)
        raise ConfigError(
            f"tokenizer: {name}: cannot be loaded as a folder or from the hub: {reason[:300]}"
        ) from None


class TextEncoder:
    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, compat: bool = False) -> None:
        self._tokenizer = tokenizer
        self._encode_short = functools.lru_cache(CACHED_TEXTS)(self._encode_any)
        self._compat = compat
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # An unknown character is no forgery.
        self._forbidden = (vocabulary.special_ids | added | set(tokenizer.all_special_ids)) - {
            tokenizer.unk_token_id
        }
        # A tokenizer that puts a space before its text encodes the tail of a sentence as it encodes the sentence's tail.
        tail = self._encode("my darling")
        self._adds_space = self._encode("Hi my darling")[-len(tail) :] == tail

    def encode(self, text: str, start: bool) -> Sequence[int]:
        """`start`: the text begins the conversation. Later pieces get no space put before them."""
        ids = self._encode(text) if start or not self._adds_space else self._without_prefix(text)
        if self._compat or self._forbidden.isdisjoint(ids):
            return ids
        # Some tokenizers hold special tokens as ordinary words. Cutting the text cuts the word.
        if len(text) == 1:
            raise ItemError(f"text that forges a special token: {brief(text)} is one by itself")
        middle = len(text) // 2
        return [*self.encode(text[:middle], start), *self.encode(text[middle:], start=False)]

    def _encode(self, text: str) -> tuple[int, ...]:
        """Questions repeat, and most images have an empty text beside them: to encode a short text again takes 50 us."""
        return self._encode_short(text) if len(text) <= CACHED_LENGTH else self._encode_any(text)

    def _encode_any(self, text: str) -> tuple[int, ...]:
        # verbose=False: no warning that a text is longer than the model's context.
        encoding = self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=not self._compat, verbose=False
        )
        return tuple(encoding["input_ids"])

    def _without_prefix(self, text: str) -> Sequence[int]:
        for prefix in PREFIXES:
            alone, together = self._encode(prefix), self._encode(prefix + text)
            if together[: len(alone)] == alone:
                return together[len(alone) :]
        raise ItemError(
            f"text that merges with all of {' '.join(map(repr, PREFIXES))} before it: {brief(text)}"
        )
