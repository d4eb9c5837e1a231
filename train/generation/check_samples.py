"""Checks of the sizes and the guidance of pictures to draw, and of a stage's `samples`."""

from __future__ import annotations

import re
from pathlib import Path

from unitoken.codec.image_tokenizer.files import find_image_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import decode
from unitoken.dataset.vocabulary import LATENTS_PER_GRID_UNIT, MAX_GRID
from unitoken.train.checkpoint.metadata import PictureCrops
from unitoken.train.config import StageConfig
from unitoken.train.generation.prompts import _original, asked

SIZE = (512, 512)  # of pictures, where nobody says how large the data's are


SAMPLES_GUIDANCE = 3.0  # of `samples`


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


def unusual(size: tuple[int, int], pictures: PictureCrops | None) -> str | None:
    """What is odd about drawing (height, width) pixels with a model whose data had `pictures`."""
    if pictures is None or not pictures.crops or size[::-1] in pictures.crops:
        return None
    had = [f"{width}x{height}" for width, height in pictures.crops]
    had = had if len(had) <= 4 else [*had[:3], f"{len(had) - 3} more"]
    return f"no picture of the data has {size[1]}x{size[0]} pixels, they have {', '.join(had)}"


def guidance_of(given: float | None, config: StageConfig, default: float) -> float:
    """Without a null prompt in training there is nothing to guide away from: 1 is none."""
    return given if given is not None else default if config.data.null_prompt_fraction else 1.0


def unguided(guidance: float, config: StageConfig) -> str | None:
    """What is odd about guidance."""
    if guidance == 1 or config.data.null_prompt_fraction:
        return None
    return f"guidance {guidance:g} is away from a prompt that training never showed: data.null_prompt_fraction is 0"


def check_samples(config: StageConfig, pictures: PictureCrops) -> list[str]:
    """What a stage asks its model while it trains: gives back what is odd about it, a line each. Raises ConfigError."""
    samples, codec = config.samples, config.codec
    if samples is None:
        return []
    if codec is None:
        raise ConfigError(
            "samples: drawing and answering take the data's tokenizers: set codec.tokenizer and codec.vision.weights"
        )
    if not samples.draw and not samples.answer:
        raise ConfigError(
            "samples: there is nothing to draw and nothing to answer; set samples.draw or samples.answer"
        )
    downsampling = find_image_tokenizer(codec.vision).downsampling
    for size in drawn_sizes(config, pictures):
        latents(size, downsampling, "samples.size")
    for picture, question in samples.answer.items():
        if not Path(picture).is_file():
            raise ConfigError(f"samples.answer: {picture}: no such picture")
        try:
            decode(_original(picture))
        except ImageError as error:
            raise ConfigError(f"samples.answer: {picture}: {error}") from None
        asked(question, [picture], f"samples.answer: {picture}")
    for text in samples.draw:
        asked(text, (), f"samples.draw: '{text}'")
    odd = [
        samples.size and unusual(samples.size, pictures),
        unguided(guidance_of(samples.guidance, config, SAMPLES_GUIDANCE), config),
    ]
    return [f"samples: {line}" for line in odd if line and samples.draw]


def drawn_sizes(config: StageConfig, pictures: PictureCrops | None) -> list[tuple[int, int]]:
    """(height, width) in pixels that a drawing may have: `samples.size`, or those of the data."""
    if config.samples is not None and config.samples.size is not None:
        return [config.samples.size]
    crops = pictures.crops if pictures is not None else []
    return [(height, width) for width, height in crops or [SIZE]]
