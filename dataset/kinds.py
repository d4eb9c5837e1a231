"""The kind of a sample, which follows from its images alone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["understanding", "generation", "text"]

# A sample's kind is stored as its place here. text: no image; understanding: images, and none is generated;
# generation: at least one image is generated, which means that the model is trained on its tokens.
KINDS: tuple[Kind, ...] = ("text", "understanding", "generation")


def kind_numbers(images: Any, question_images: Any) -> npt.NDArray[np.uint8]:
    """Return the places in KINDS of samples' kinds.

    Args:
        images: (n,) or one number, the images of each sample.
        question_images: the same shape, how many of these are not generated.
    """
    with_images = np.where(images == question_images, KINDS.index("understanding"), KINDS.index("generation"))
    return np.where(images == 0, KINDS.index("text"), with_images).astype(np.uint8)


def are_of_kinds(numbers: npt.NDArray[np.uint8], kinds: tuple[Kind, ...] | None) -> npt.NDArray[np.bool_]:
    """Return which samples (n,), given as places in KINDS, are of one of `kinds`; None stands for all."""
    if kinds is None:
        return np.ones(len(numbers), bool)
    return np.isin(numbers, [KINDS.index(kind) for kind in kinds])
