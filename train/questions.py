"""What a model is asked, as the command line and a stage's `samples` say it; checked without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unitoken.codec.conversations import Conversation, ItemError, parse
from unitoken.codec.weights import find_weights
from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.vocabulary import IMAGE_PLACEHOLDER, LATENTS_PER_GRID_UNIT, MAX_GRID
from unitoken.train.config import StageConfig


def asked(text: str, images: Sequence[str] = (), name: str = "prompt") -> Conversation:
    """One question; its images stand where it says `<|image|>`, or before it. Raises ConfigError."""
    return conversation_of({"conversations": [{"from": "human", "value": text}], "image": list(images)}, name)


def conversation_of(item: Any, name: str) -> Conversation:
    """An item of the input format, without its last answer. Raises ConfigError."""
    try:
        return parse(_unanswered(item), name)
    except ItemError as error:
        raise ConfigError(f"{name}: {error}") from None


def _unanswered(item: Any) -> Any:
    """What was answered is kept from the model, and so are the images in it."""
    turns = item.get("conversations") if isinstance(item, dict) else None
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        return item
    item = {**item, "conversations": turns[:-1]}
    answer = turns[-1].get("value") if isinstance(turns[-1], dict) else None
    drawn = answer.count(IMAGE_PLACEHOLDER) if isinstance(answer, str) else 0
    for key in ("image", IMAGE_PLACEHOLDER):
        if drawn and item.get(key) is not None:
            images = item[key] if isinstance(item[key], list) else [item[key]]
            item[key] = images[: max(0, len(images) - drawn)]
    return item


def read_prompts(path: Path) -> list[Conversation]:
    """A text file with a prompt a line; or JSON lines, each `{"prompt": ..., "image": [...]}` or an item of the input format.

    Images are looked for beside the file. Raises ConfigError.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the prompts: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{path}:{number}"
        if path.suffix != ".jsonl":
            found.append(asked(line, (), name))
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{name}: not JSON: {error}") from None
        if isinstance(item, dict) and isinstance(prompt := item.get("prompt"), str):
            item = {"conversations": [{"from": "human", "value": prompt}], "image": item.get("image")}
        found.append(conversation_of(beside(item, path.parent), name))
    if not found:
        raise ConfigError(f"{path}: it holds no prompt")
    return found


def beside(item: Any, folder: Path) -> Any:
    """An item whose images are named as seen from `folder`."""
    if not isinstance(item, dict):
        return item
    found = {}
    for key in {"image", IMAGE_PLACEHOLDER} & set(item):
        images = item[key] if isinstance(item[key], list) else [item[key]]
        found[key] = [str(folder / image) if isinstance(image, str) else image for image in images if image is not None]
    return {**item, **found}


def prompt_text(conversation: Conversation) -> str:
    """The last question."""
    return IMAGE_PLACEHOLDER.join(conversation.turns[-1].segments)


def originals_of(conversation: Conversation) -> list[bytes]:
    """The encoded images. Raises ConfigError."""
    data = []
    for image in conversation.images:
        try:
            data.append(image if isinstance(image, bytes) else Path(image).read_bytes())
        except OSError as error:
            raise ConfigError(f"{image!s}: cannot read the image: {error.strerror or error}") from None
    return data


def check_images(conversations: Sequence[Conversation]) -> None:
    for conversation in conversations:
        for image in conversation.images:
            if isinstance(image, str) and not Path(image).is_file():
                raise ConfigError(f"{image}: no such image")


def parse_size(text: str) -> tuple[int, int]:
    """`768x512` -> (height, width): written as people do, the width first. Raises ConfigError."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if match is None:
        raise ConfigError(f"size: '{text}': expected pixels across x down, as 512x512")
    return int(match[2]), int(match[1])


def latents(pixels: tuple[int, int], downsampling: int, key: str = "size") -> tuple[int, int]:
    """(height, width) in pixels -> in latents. Raises ConfigError where the image tokenizer has no such image."""
    unit = downsampling * LATENTS_PER_GRID_UNIT
    for side in pixels:
        if side % unit or not unit <= side <= unit * MAX_GRID:
            raise ConfigError(
                f"{key}: {pixels[1]} x {pixels[0]} pixels: each side must be a multiple of {unit}, the image tokenizer's unit, "
                f"up to {unit * MAX_GRID}"
            )
    return pixels[0] // downsampling, pixels[1] // downsampling


def check_samples(config: StageConfig) -> None:
    """What a stage asks its model while it trains. Raises ConfigError."""
    samples, codec = config.samples, config.codec
    if samples is None:
        return
    if codec is None:
        raise ConfigError("samples: drawing and answering take the data's tokenizers: set codec.tokenizer and codec.vision.weights")
    if not samples.draw and not samples.answer:
        raise ConfigError("samples: there is nothing to draw and nothing to answer; set samples.draw or samples.answer")
    latents(samples.size, find_weights(codec.vision).downsampling, "samples.size")
    for picture, question in samples.answer.items():
        if not Path(picture).is_file():
            raise ConfigError(f"samples.answer: {picture}: no such picture")
        asked(question, [picture], f"samples.answer: {picture}")
    for text in samples.draw:
        asked(text, (), f"samples.draw: '{text}'")
