"""Prompts and replies as people see them, text and images, through a stage's tokenizers (`codec`).

dialogue = Dialogue(config.codec)
prompts = dialogue.encode([build_prompt("What is it?", ["cat.jpg"])], crops=[(512, 512)])
replies = dialogue.decode(generate(model, dialogue.vocabulary, prompts))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from unitoken.codec.config import CodecConfig
from unitoken.codec.conversations import Conversation, ItemError, short_name
from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.codec.sequence import lay_out
from unitoken.codec.text import TextEncoder, load_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import choose_crop, decoded, tokenizer_pixels
from unitoken.dataset.record import Record
from unitoken.dataset.vision_views import Ids, Pixels
from unitoken.dataset.vocabulary import IMAGE_PLACEHOLDER, Vocabulary
from unitoken.train.generation.check_samples import latent_size
from unitoken.train.generation.engine import split_reply
from unitoken.train.generation.prompts import read_images


class Reply(NamedTuple):
    """A decoded reply: its text, with `<|image|>` in the place of each image, and the images (H, W, 3)."""

    text: str
    pictures: list[Pixels]


class Dialogue:
    """Encodes prompts and decodes replies.

    Args:
        config: the text tokenizer and the image tokenizer.
        trained: the vocabulary of the model, which names the layout; None: Chameleon's layout.
        device: of the image tokenizer.

    Raises:
        ConfigError: one of them can not be loaded.
    """

    def __init__(self, config: CodecConfig, trained: Vocabulary | None = None, device: str = "cpu") -> None:
        self.tokenizer: Any = load_tokenizer(config.tokenizer)
        self.vision = load_vision(config.vision, device)
        tokens, codes = self.tokenizer.get_vocab(), self.vision.codebook_size
        self.vocabulary = (
            trained.from_tokenizer(tokens, codes) if trained else Vocabulary.from_tokens(tokens, codes)
        )
        self._text = TextEncoder(self.tokenizer, self.vocabulary)
        self._batch = config.vision.batch_size

    def latents(self, pixels: tuple[int, int]) -> tuple[int, int]:
        """Convert (height, width) in pixels to latents. Raises ConfigError."""
        return latent_size(pixels, self.vision.downsampling)

    def encode(self, conversations: Sequence[Conversation], crops: Sequence[tuple[int, int]]) -> list[Record]:
        """Encode prompts: conversations that end with a human turn.

        Args:
            conversations: the prompts; an image in several of them is encoded once.
            crops: (width, height) in pixels to which the training data's images were cropped; each image is
                cropped to the one that keeps most of it.

        Raises:
            ConfigError: an image can not be read or decoded, or a prompt can not be tokenized.
        """
        images_of = [read_images(conversation) for conversation in conversations]
        pixels: dict[bytes, Pixels] = {}  # by the encoded image
        for conversation, images in zip(conversations, images_of, strict=True):
            for name, image in zip(conversation.images, images, strict=True):
                if image not in pixels:
                    pixels[image] = _cropped(name, image, crops)
        encoded = _map_by_shape(self.vision.encode, list(pixels.values()), self._batch)
        codes = dict(zip(pixels, encoded, strict=True))
        return [
            self._record(conversation, [codes[image] for image in images], images)
            for conversation, images in zip(conversations, images_of, strict=True)
        ]

    def encode_layout(self, conversation: Conversation, crops: Sequence[tuple[int, int]]) -> Record:
        """Encode a prompt with codes of 0: as long as the real one, without running the image tokenizer."""
        images = read_images(conversation)
        codes = []
        for name, image in zip(conversation.images, images, strict=True):
            height, width = _cropped(name, image, crops).shape[:2]
            codes.append(np.zeros(self.latents((height, width)), np.int64))
        return self._record(conversation, codes, images)

    def _record(self, conversation: Conversation, codes: Sequence[Ids], images: Sequence[bytes]) -> Record:
        try:
            return lay_out(conversation, codes, images, self._text, self.vocabulary)
        except ItemError as error:
            raise ConfigError(f"{conversation.id}: can not be tokenized: {error}") from None

    def decode(self, replies: Sequence[Sequence[int]]) -> list[Reply]:
        """Decode replies to text and images."""
        parts_of = [split_reply(self.vocabulary, reply) for reply in replies]
        codes = [part for parts in parts_of for part in parts if isinstance(part, np.ndarray)]
        images = iter(_map_by_shape(self.vision.decode, codes, self._batch))
        decoded_replies = []
        for parts in parts_of:
            texts, pictures = [], []
            for part in parts:
                if isinstance(part, np.ndarray):
                    texts.append(IMAGE_PLACEHOLDER)
                    pictures.append(next(images))
                else:
                    texts.append(self.tokenizer.decode(part, skip_special_tokens=True))
            decoded_replies.append(Reply("".join(texts), pictures))
        return decoded_replies


def _cropped(name: str | bytes, image: bytes, crops: Sequence[tuple[int, int]]) -> Pixels:
    try:
        with decoded(image) as picture:
            return tokenizer_pixels(picture, choose_crop(picture.size, list(crops)))
    except ImageError as error:
        raise ConfigError(f"{short_name(name)}: {error}") from None


def _map_by_shape(function: Callable[[Any], Any], arrays: Sequence[Any], batch: int) -> list[Any]:
    """Apply a function of a stack of equal shapes to arrays of any shapes, at most `batch` at a time."""
    results: dict[int, Any] = {}
    for shape in dict.fromkeys(array.shape for array in arrays):
        places = [place for place, array in enumerate(arrays) if array.shape == shape]
        for first in range(0, len(places), batch):
            some = places[first : first + batch]
            results.update(zip(some, function(np.stack([arrays[place] for place in some])), strict=True))
    return [results[place] for place in range(len(arrays))]
