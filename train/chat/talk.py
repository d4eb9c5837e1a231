"""A conversation on the page: questions are checked as prompts are, and replies become turns of it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unitoken.codec.conversations import Conversation, Turn
from unitoken.common.errors import ConfigError
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import decoded
from unitoken.train.generation.check_samples import parse_size
from unitoken.train.generation.prompts import build_prompt

LARGEST_PICTURE = 20 << 20
"""Bytes of an uploaded picture."""
MOST_PICTURES = 16
"""Pictures of one question."""
PREVIEW_SIDE = 512
"""Pixels of the longer side of an uploaded picture on the page."""

ReplyKind = Literal["free", "picture", "text"]
Part = str | bytes
"""A text, or a picture as PNG."""


class PageAbout(NamedTuple):
    """What the page says about the model.

    Attributes:
        name: of the run or the exported model.
        sizes: the (height, width) in pixels of the data's pictures; empty if the model can not draw.
        guidance: the default.
        guidance_trained: whether the model was trained on null prompts.
        packed_length: the most tokens of a conversation with its reply.
    """

    name: str
    sizes: list[tuple[int, int]]
    guidance: float
    guidance_trained: bool
    packed_length: int


class ChatSettings(NamedTuple):
    """The settings at the side of the page.

    Attributes:
        kind: a free reply has text and pictures as the model likes; the others have one of them alone.
        size: of pictures, as `768x512`; empty: as in the data.
        temperature: 0 always takes the likeliest token.
        top_k_text: text is drawn from this many tokens; 0 is all of them.
        top_k_image: pictures are drawn from this many codes; 0 is all of them.
        guidance: of pictures; 1 is none.
        seed: of the random numbers.
        max_tokens: the most tokens of a reply; a picture that was begun is finished.
    """

    kind: ReplyKind = "free"
    size: str = ""
    temperature: float = 1.0
    top_k_text: int = 10
    top_k_image: int = 2000
    guidance: float = 1.0
    seed: int = 0
    max_tokens: int = 2048

    def check(self) -> None:
        """Raise ConfigError for a number that is missing or out of range."""
        for name, least in (
            *(("temperature", 0), ("top_k_text", 0), ("top_k_image", 0)),
            *(("guidance", 0), ("seed", 0), ("max_tokens", 1)),
        ):
            value = getattr(self, name)
            words = name.replace("_", " ")
            if not isinstance(value, int | float) or not math.isfinite(value) or value < least:
                raise ConfigError(f"{words}: expected a number from {least} on, found {value}")
            if name not in ("temperature", "guidance") and value != int(value):
                raise ConfigError(f"{words}: expected a whole number, found {value}")

    def sizes(self, of_the_data: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the (height, width) in pixels that a picture of the reply may have. Raises ConfigError."""
        if self.kind == "text":
            return []
        if self.kind == "picture" and not of_the_data:
            raise ConfigError("the image tokenizer has no decoder, so there are no pictures: ask for text")
        return [parse_size(self.size)] if self.size and of_the_data else list(of_the_data)


def preview(picture: bytes, name: str) -> bytes:
    """Decode an uploaded picture within the limits of all pictures, and return a small copy as PNG.

    Args:
        picture: the encoded picture.
        name: of its file, for the message.

    Raises:
        ConfigError: it has too many bytes or pixels, or is not a picture.
    """
    if len(picture) > LARGEST_PICTURE:
        raise ConfigError(
            f"{name}: {len(picture) / 1e6:.0f} MB, a picture may have {LARGEST_PICTURE / 1e6:.0f} MB at most"
        )
    try:
        with decoded(picture) as image:
            image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
    except ImageError as error:
        raise ConfigError(f"{name}: {error}") from None
    return buffer.getvalue()


@dataclass
class Talk:
    """The turns so far, as the model reads them before the next question."""

    turns: tuple[Turn, ...] = ()
    pictures: tuple[str | bytes, ...] = ()

    def ask(self, text: str, pictures: Sequence[bytes]) -> Conversation:
        """Return the conversation with one more question.

        Args:
            text: pictures take the places of its `<|image|>`, or come before a text that has none.
            pictures: checked, encoded pictures.

        Raises:
            ConfigError: the question is empty, or has another number of pictures than its text has places.
        """
        if not text.strip() and not pictures:
            raise ConfigError("write a question first, or add a picture")
        if len(pictures) > MOST_PICTURES:
            raise ConfigError(f"{len(pictures)} pictures, a question may have {MOST_PICTURES} at most")
        question = build_prompt(text, pictures, "question")
        turns = (*self.turns, *question.turns)
        return Conversation("conversation", turns, (*self.pictures, *question.images))

    def take(self, conversation: Conversation, reply: Sequence[Part]) -> None:
        """Go on behind a question and its reply; without a reply, the question is as if never asked."""
        segments, pictures = [""], []
        for part in reply:
            if isinstance(part, bytes):
                pictures.append(part)
                segments.append("")
            else:
                segments[-1] += part
        if pictures or segments[0].strip():
            self.turns = (*conversation.turns, Turn(tuple(segments), trained=True))
            self.pictures = (*conversation.images, *pictures)
