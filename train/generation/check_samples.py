"""Checks of the sizes and the guidance of images to generate, and of a stage's `samples`."""

from __future__ import annotations

import re
from pathlib import Path

from unitoken.codec.config import CodecConfig
from unitoken.codec.image_tokenizer.files import check_decoder, find_image_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import decode
from unitoken.dataset.layout import MAX_GRID
from unitoken.dataset.vocabulary import LATENTS_PER_GRID_UNIT
from unitoken.train.checkpoint.metadata import PictureCrops
from unitoken.train.config import SamplesConfig
from unitoken.train.generation.prompts import build_prompt, read_image

DEFAULT_SIZE = (512, 512)  # of images, where the sizes of the data's images are unknown
SAMPLES_GUIDANCE = 3.0  # the default of `samples`


def parse_size(text: str) -> tuple[int, int]:
    """Parse `768x512`, width first, to (height, width). Raises ConfigError."""
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if match is None:
        raise ConfigError(f"size: '{text}': expected pixels across x down, as 512x512")
    return int(match[2]), int(match[1])


def latent_size(pixels: tuple[int, int], downsampling: int, key: str = "size") -> tuple[int, int]:
    """Convert (height, width) in pixels to latents.

    Raises:
        ConfigError: the image tokenizer has no image of that size; the message begins with `key`.
    """
    unit = downsampling * LATENTS_PER_GRID_UNIT
    for side in pixels:
        if side % unit or not unit <= side <= unit * MAX_GRID:
            raise ConfigError(
                f"{key}: {pixels[1]} x {pixels[0]} pixels: each side must be a multiple of {unit}, "
                f"the image tokenizer's unit, up to {unit * MAX_GRID}"
            )
    return pixels[0] // downsampling, pixels[1] // downsampling


def unusual_size(size: tuple[int, int], pictures: PictureCrops | None) -> str | None:
    """Return a warning if no image of the training data had `size`, (height, width) in pixels."""
    if pictures is None or not pictures.crops or size[::-1] in pictures.crops:
        return None
    sizes = [f"{width}x{height}" for width, height in pictures.crops]
    sizes = sizes if len(sizes) <= 4 else [*sizes[:3], f"{len(sizes) - 3} more"]
    return f"no picture of the data has {size[1]}x{size[0]} pixels, they have {', '.join(sizes)}"


def guidance_or_default(guidance: float | None, default: float, trained: bool) -> float:
    """Return the guidance to generate with.

    Args:
        guidance: the setting; None for the default.
        default: for a model that was trained on null prompts.
        trained: whether it was. Without a null prompt there is nothing to guide away from: 1, which is no
            guidance.
    """
    if guidance is not None:
        return guidance
    return default if trained else 1.0


def untrained_guidance(guidance: float, trained: bool) -> str | None:
    """Return a warning if guidance needs null prompts and the model was not trained on any."""
    if guidance == 1 or trained:
        return None
    return (
        f"guidance {guidance:g} is away from a prompt that training never showed: "
        "data.null_prompt_fraction is 0"
    )


def image_sizes(size: tuple[int, int] | None, pictures: PictureCrops | None) -> list[tuple[int, int]]:
    """Return the (height, width) in pixels of images to generate: `size`, or those of the data's images."""
    if size is not None:
        return [size]
    crops = pictures.crops if pictures is not None else []
    return [(height, width) for width, height in crops] or [DEFAULT_SIZE]


def check_samples(
    samples: SamplesConfig | None, codec: CodecConfig | None, pictures: PictureCrops, guidance_trained: bool
) -> list[str]:
    """Check what a stage generates during training, and return warnings.

    Args:
        samples: the settings; None: nothing is generated.
        codec: the tokenizers.
        pictures: sizes of the training data's images.
        guidance_trained: whether the data has null prompts.

    Raises:
        ConfigError: tokenizers or prompts are missing, a size does not suit the image tokenizer, it has no
            decoder and shall draw, or an image can not be read.
    """
    if samples is None:
        return []
    if codec is None:
        raise ConfigError(
            "samples: drawing and answering take the data's tokenizers: "
            "set codec.tokenizer and codec.vision.weights"
        )
    if not samples.draw and not samples.answer:
        raise ConfigError(
            "samples: there is nothing to draw and nothing to answer; set samples.draw or samples.answer"
        )
    image_tokenizer = find_image_tokenizer(codec.vision)
    for size in image_sizes(samples.size, pictures):
        latent_size(size, image_tokenizer.downsampling, "samples.size")
    if samples.draw:
        check_decoder(image_tokenizer, codec.vision.weights, "samples.draw: codec.vision.weights")
    for picture, text in samples.answer.items():
        if not Path(picture).is_file():
            raise ConfigError(f"samples.answer: {picture}: no such picture")
        try:
            decode(read_image(picture))
        except ImageError as error:
            raise ConfigError(f"samples.answer: {picture}: {error}") from None
        build_prompt(text, [picture], f"samples.answer: {picture}")
    for text in samples.draw:
        build_prompt(text, (), f"samples.draw: '{text}'")
    if not samples.draw:
        return []
    guidance = guidance_or_default(samples.guidance, SAMPLES_GUIDANCE, guidance_trained)
    warnings = [
        unusual_size(samples.size, pictures) if samples.size is not None else None,
        untrained_guidance(guidance, guidance_trained),
    ]
    return [f"samples: {warning}" for warning in warnings if warning is not None]
