"""Scores of drawings: a classifier of the user's own, and CLIP by transformers.

The CLIP score is 100 times the cosine of a drawing's and its prompt's embedding, or 0 if that is negative
(Hessel et al., arXiv:2104.08718, without the factor 2.5). The distance between drawings and reference
pictures is the maximum mean discrepancy of their embeddings, CMMD (Jayasumana et al., arXiv:2401.09603).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from unitoken.codec.conversations import PICTURE_SUFFIXES
from unitoken.common.errors import ConfigError, one_line
from unitoken.common.hashing import sha256_of_file
from unitoken.common.user_functions import load_user_function
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import decode
from unitoken.train.evaluation.answers import MetricScores, normalized_text
from unitoken.train.evaluation.items import TaskItem

SIGMA, SCALE = 10.0, 1000.0  # of the distance, as in CMMD
BATCH = 32  # pictures or texts at a time
ROWS = 1024  # of the kernel's matrix at a time

Embeddings = npt.NDArray[np.float64]  # (N, D), each of length 1


def classify(function: str, where: str, items: Sequence[TaskItem], pictures: Sequence[Path]) -> MetricScores:
    """Return the share of drawings in which a user's function sees what was asked for.

    Args:
        function: `path/to/file.py:function`; it takes a PIL image and returns a name.
        where: the setting, for messages.
        items: the prompt of each drawing.
        pictures: files of the drawings.

    Raises:
        ConfigError: the function can not be imported, fails, or returns something else than text.
    """
    classifier = load_user_function(function, where)
    names: list[str] = []
    for path in pictures:
        with Image.open(path) as picture:
            try:
                name = classifier(picture.convert("RGB"))
            except Exception as error:  # a user's function may fail in any way
                reason = one_line(error, 200)
                raise ConfigError(f"{where}: {function}: {type(error).__name__}: {reason}") from None
        if not isinstance(name, str):
            raise ConfigError(f"{where}: {function}: expected text, it returned {type(name).__name__}")
        names.append(name)
    right = [
        normalized_text(name) in {normalized_text(answer) for answer in item.answers}
        for name, item in zip(names, items, strict=True)
    ]
    return MetricScores({"classifier": sum(right) / len(right)}, names)


class ClipEmbedder:
    """Embeds texts and pictures with a CLIP.

    Args:
        folder: in transformers' layout, with safetensors.
        device: where it computes.
        where: the setting, for messages.

    Raises:
        ConfigError: there is no CLIP in the folder.
    """

    def __init__(self, folder: Path, device: str, where: str) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        self._device = device
        try:
            self._model: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._processor: Any = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{where}: {folder}: no CLIP of transformers: {one_line(error, 200)}") from None
        self._model.to(device).eval()
        self._longest = int(self._model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts, cut to CLIP's longest."""
        found = []
        for first in range(0, len(texts), BATCH):
            tokens = self._tokenizer(
                list(texts[first : first + BATCH]),
                padding=True,
                truncation=True,
                max_length=self._longest,
                return_tensors="pt",
            ).to(self._device)
            output = self._model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"])
            found.append(_normalized(self._model.text_projection(output.pooler_output)))
        return np.concatenate(found)

    @torch.no_grad()
    def embed_pictures(self, pictures: Iterable[Image.Image]) -> Embeddings:
        """Embed pictures, each resized and cropped to CLIP's size."""
        found, waiting = [], []
        for picture in pictures:
            waiting.append(self._processor(picture, return_tensors="pt")["pixel_values"])
            if len(waiting) == BATCH:
                found.append(self._embed_pixels(torch.cat(waiting)))
                waiting = []
        if waiting:
            found.append(self._embed_pixels(torch.cat(waiting)))
        return np.concatenate(found)

    def _embed_pixels(self, pixels: Tensor) -> Embeddings:
        output = self._model.vision_model(pixels.to(self._device))
        return _normalized(self._model.visual_projection(output.pooler_output))


def _normalized(vectors: Tensor) -> Embeddings:
    vectors = vectors.double()
    return np.asarray((vectors / vectors.norm(dim=-1, keepdim=True)).cpu().numpy())


def score_clip(texts: Embeddings, drawings: Embeddings) -> MetricScores:
    """Return the mean CLIP score of drawings (N, D) and their texts (N, D)."""
    scores = (100 * (texts * drawings).sum(axis=1)).clip(min=0)
    return MetricScores({"clip_score": float(scores.mean())}, scores.tolist())


def clip_distance(drawings: Embeddings, references: Embeddings) -> float:
    """Return the distance of drawings (N, D) from reference pictures (M, D); 0 for equal sets."""
    return SCALE * (
        _mean_kernel(drawings, drawings)
        + _mean_kernel(references, references)
        - 2 * _mean_kernel(drawings, references)
    )


def _mean_kernel(left: Embeddings, right: Embeddings) -> float:
    """Return the mean of exp(-|x - y|^2 / (2 sigma^2)) over all pairs."""
    total, squares = 0.0, (right**2).sum(axis=1)
    for first in range(0, len(left), ROWS):
        rows = left[first : first + ROWS]
        distances = (rows**2).sum(axis=1)[:, None] + squares - 2 * rows @ right.T
        total += float(np.exp(-distances / (2 * SIGMA**2)).sum())
    return total / (len(left) * len(right))


def reference_files(folder: Path) -> list[Path]:
    """Return the pictures in a folder and its sub-folders. Raises ConfigError if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower()[1:] in PICTURE_SUFFIXES)
    if not files:
        raise ConfigError(f"{folder}: no pictures in it")
    return files


def open_pictures(files: Sequence[Path]) -> Iterable[Image.Image]:
    """Yield decoded pictures. Raises ConfigError for one that can not be read."""
    for path in files:
        try:
            yield decode(path.read_bytes())
        except (OSError, ImageError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None


def hash_files(files: Sequence[Path]) -> str:
    """Return one SHA-256 of the contents of files, in their order."""
    return hashlib.sha256("".join(map(sha256_of_file, files)).encode()).hexdigest()
