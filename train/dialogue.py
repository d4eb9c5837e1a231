"""Prompts and replies as people see them: text and pictures, by way of a stage's tokenizers (`codec`).

dialogue = Dialogue(config.codec)
prompts = dialogue.prompts([asked("What is it?", ["cat.jpg"])], pixels=(512, 512))
said = dialogue.said(generate(model, dialogue.vocabulary, prompts))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unitoken.codec.config import CodecConfig
from unitoken.codec.conversations import Conversation, ItemError
from unitoken.codec.sequence import lay_out
from unitoken.codec.text import TextEncoder, load_tokenizer
from unitoken.codec.vision import load_vision
from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.images import ImageError, decode, tokenizer_pixels
from unitoken.streaming_data.record import Record
from unitoken.streaming_data.vocabulary import IMAGE_PLACEHOLDER, Vocabulary
from unitoken.train.generate import parts_of
from unitoken.train.questions import latents, originals_of

Picture = npt.NDArray[np.uint8]  # (H, W, 3)


class Said(NamedTuple):
    text: str  # `<|image|>` where a picture stands
    pictures: list[Picture]


class Dialogue:
    """Raises ConfigError where a tokenizer can not be had."""

    def __init__(self, config: CodecConfig, device: str = "cpu") -> None:
        self.tokenizer: Any = load_tokenizer(config.tokenizer)
        self.vision = load_vision(config.vision, device)
        self.vocabulary = Vocabulary.from_tokens(self.tokenizer.get_vocab(), self.vision.codebook_size)
        self._text = TextEncoder(self.tokenizer, self.vocabulary)
        self._batch = config.vision.batch_size

    def latents(self, pixels: tuple[int, int]) -> tuple[int, int]:
        return latents(pixels, self.vision.downsampling)

    def prompts(self, conversations: Sequence[Conversation], pixels: tuple[int, int]) -> list[Record]:
        """Conversations that end with a question, their pictures cut to `pixels` (height, width) for the image tokenizer."""
        originals = [originals_of(conversation) for conversation in conversations]
        crop = pixels[::-1]
        cut: list[Picture] = []
        for conversation, images in zip(conversations, originals, strict=True):
            for name, data in zip(conversation.images, images, strict=True):
                try:
                    cut.append(tokenizer_pixels(decode(data), crop))
                except ImageError as error:
                    raise ConfigError(f"{name if isinstance(name, str) else 'an image'}: {error}") from None
        codes = self._encoded(cut)
        try:
            return [
                lay_out(conversation, [next(codes) for _ in images], images, self._text, self.vocabulary)
                for conversation, images in zip(conversations, originals, strict=True)
            ]
        except ItemError as error:
            raise ConfigError(f"a prompt can not be tokenized: {error}") from None

    def said(self, replies: Sequence[Sequence[int]]) -> list[Said]:
        parts = [parts_of(self.vocabulary, reply) for reply in replies]
        codes = [part for reply in parts for part in reply if isinstance(part, np.ndarray)]
        pictures = iter(self._decoded(codes))
        result = []
        for reply in parts:
            drawn = [next(pictures) for part in reply if isinstance(part, np.ndarray)]
            texts = [
                IMAGE_PLACEHOLDER if isinstance(part, np.ndarray) else self.tokenizer.decode(part, skip_special_tokens=True)
                for part in reply
            ]
            result.append(Said("".join(texts), drawn))
        return result

    def _encoded(self, pictures: Sequence[Picture]) -> Iterator[npt.NDArray[np.int64]]:
        for first in range(0, len(pictures), self._batch):
            yield from self.vision.encode(np.stack(pictures[first : first + self._batch]))

    def _decoded(self, codes: Sequence[npt.NDArray[np.int64]]) -> list[Picture]:
        """Those of one size together."""
        pictures: dict[int, Picture] = {}
        for shape in {one.shape for one in codes}:
            same = [number for number, one in enumerate(codes) if one.shape == shape]
            for first in range(0, len(same), self._batch):
                some = same[first : first + self._batch]
                pictures.update(zip(some, self.vision.decode(np.stack([codes[number] for number in some])), strict=True))
        return [pictures[number] for number in range(len(codes))]
