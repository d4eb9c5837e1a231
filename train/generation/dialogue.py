"""Prompts and replies as people see them: text and pictures, by way of a stage's tokenizers (`codec`).

dialogue = Dialogue(config.codec)
prompts = dialogue.prompts([asked("What is it?", ["cat.jpg"])], crops=[(512, 512)])
said = dialogue.said(generate(model, dialogue.vocabulary, prompts))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unitoken.codec.config import CodecConfig
from unitoken.codec.conversations import Conversation, ItemError, short_name
from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.codec.sequence import lay_out
from unitoken.codec.text import TextEncoder, load_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import choose_crop, decoded, tokenizer_pixels
from unitoken.dataset.record import Record
from unitoken.dataset.vocabulary import IMAGE_PLACEHOLDER, Vocabulary
from unitoken.train.generation.check_samples import latents
from unitoken.train.generation.engine import parts_of
from unitoken.train.generation.prompts import originals_of

Picture = npt.NDArray[np.uint8]  # (H, W, 3)
Codes = npt.NDArray[np.int64]  # (h, w)
Crops = Sequence[tuple[int, int]]  # (width, height) in pixels


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

    def prompts(self, conversations: Sequence[Conversation], crops: Crops) -> list[Record]:
        """Conversations that end with a question, their pictures cut for the image tokenizer as the data's, to one of `crops`."""
        originals = [originals_of(conversation) for conversation in conversations]
        named = zip(
            itertools.chain(*(c.images for c in conversations)), itertools.chain(*originals), strict=True
        )
        distinct = {
            data: _cut(name, data, crops) for data, name in {data: name for name, data in named}.items()
        }
        codes = dict(
            zip(distinct, _by_shape(list(distinct.values()), self._batch, self.vision.encode), strict=True)
        )
        return [
            self._laid_out(conversation, [codes[image] for image in images], images)
            for conversation, images in zip(conversations, originals, strict=True)
        ]

    def outline(self, conversation: Conversation, crops: Crops) -> Record:
        """A prompt as long as it will be: all codes are 0, and nothing goes through the image tokenizer."""
        images = originals_of(conversation)
        shapes = [_cut(*image, crops).shape[:2] for image in zip(conversation.images, images, strict=True)]
        return self._laid_out(
            conversation, [np.zeros(self.latents(shape), np.int64) for shape in shapes], images
        )

    def _laid_out(
        self, conversation: Conversation, codes: Sequence[Codes], images: Sequence[bytes]
    ) -> Record:
        try:
            return lay_out(conversation, codes, images, self._text, self.vocabulary)
        except ItemError as error:
            raise ConfigError(f"{conversation.id}: can not be tokenized: {error}") from None

    def said(self, replies: Sequence[Sequence[int]]) -> list[Said]:
        parts = [parts_of(self.vocabulary, reply) for reply in replies]
        codes = [part for reply in parts for part in reply if isinstance(part, np.ndarray)]
        pictures = iter(_by_shape(codes, self._batch, self.vision.decode))
        result = []
        for reply in parts:
            drawn = [next(pictures) for part in reply if isinstance(part, np.ndarray)]
            texts = [
                IMAGE_PLACEHOLDER
                if isinstance(part, np.ndarray)
                else self.tokenizer.decode(part, skip_special_tokens=True)
                for part in reply
            ]
            result.append(Said("".join(texts), drawn))
        return result


def _cut(name: str | bytes, data: bytes, crops: Crops) -> Picture:
    try:
        with decoded(data) as image:
            return tokenizer_pixels(image, choose_crop(image.size, list(crops)))
    except ImageError as error:
        raise ConfigError(f"{short_name(name)}: {error}") from None


def _by_shape(arrays: Sequence[Any], batch: int, function: Callable[[Any], Any]) -> list[Any]:
    """What `function` makes of each array; it takes a stack of one shape, `batch` at most."""
    found: dict[int, Any] = {}
    for shape in dict.fromkeys(array.shape for array in arrays):
        same = [number for number, array in enumerate(arrays) if array.shape == shape]
        for first in range(0, len(same), batch):
            some = same[first : first + batch]
            found.update(zip(some, function(np.stack([arrays[number] for number in some])), strict=True))
    return [found[number] for number in range(len(arrays))]
