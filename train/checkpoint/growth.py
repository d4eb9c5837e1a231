"""Rows for the ids that a tokenizer lacked, which a pretrained model gets when its weights are loaded.

The rows of the tokenizer's own ids stay as they are, so before any training the logits of these ids are the
original's. All rows behind them are new: those of image codes and special tokens, spare rows of a padded
checkpoint, and those that round the size up. Weights of our own runs and exports have a vocabulary beside
them, and their rows already.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from unitoken.codec.config import CodecConfig
from unitoken.codec.image_tokenizer.files import find_image_tokenizer
from unitoken.common.cli import report
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.metadata import read_metadata
from unitoken.train.checkpoint.tensors import Tensors, TensorSource
from unitoken.train.config import VOCABULARY_MATRICES, GrowConfig

# The covariance of new rows as a part of that of the old ones, as in transformers' `mean_resizing`.
SPREAD = 1e-9
NORMAL_SPREAD = 0.02  # the standard deviation of `normal`, that of new weights
SAMPLED_ROWS = 4096  # the most old rows of which new ones are random combinations


@dataclass(frozen=True)
class Growth:
    """What the new rows of a stage's model are.

    Attributes:
        config: how they are initialised.
        rows: the new rows of the grown matrices; its end is their size.
        vocabulary: of the datasets.
        codec: the stage's tokenizers, whose codebook `codebook` reads.
        seed: of the random draws.
    """

    config: GrowConfig
    rows: range
    vocabulary: Vocabulary
    codec: CodecConfig | None
    seed: int

    def grow(self, source: TensorSource, origin: Path) -> TensorSource:
        """Return the weights with the new rows; those of our own runs and exports as they are.

        Nothing is read before the result is.

        Args:
            source: the weights.
            origin: the file or folder that they are in.
        """
        if read_metadata(origin).vocabulary is not None:
            return source

        def read(names: Collection[str]) -> Tensors:
            tensors = source.read(names)
            for name in grown.keys() & tensors.keys():
                old = tensors[name]
                matrix = old.new_empty(grown[name])
                matrix[: self.rows.start] = old[: self.rows.start]
                self.fill(name, matrix)
                tensors[name] = matrix
            return tensors

        # A matrix that has too few or too many rows keeps its shape, which then does not fit.
        grown = {
            name: (self.rows.stop, *shape[1:])
            for name, shape in source.shapes.items()
            if name in VOCABULARY_MATRICES and self.rows.start <= shape[0] <= self.rows.stop
        }
        return TensorSource(source.where, source.shapes | grown, read)

    @torch.no_grad()
    def fill(self, name: str, matrix: Tensor) -> None:
        """Initialise the new rows of a matrix (vocabulary, hidden) in place, and report it.

        Args:
            name: the matrix' name. Each has random numbers of its own.
            matrix: the matrix, whose old rows are there.
        """
        old, new = matrix[: self.rows.start], matrix[self.rows.start :]
        generator = named_generator(self.seed, name)
        if self.config.init == "normal":
            new.normal_(0.0, NORMAL_SPREAD, generator=generator)
        else:
            new.copy_(_draw_alike(old, len(new), generator))
        if self.config.init == "codebook":
            self._fill_codes(old, matrix)
        report(f"{name}: rows {self.rows.start} to {self.rows.stop - 1} are new ({self.config.init})")

    def _fill_codes(self, old: Tensor, matrix: Tensor) -> None:
        """Give each image code without an old row its projected vector, moved and scaled as the old rows."""
        projected = self._projected_codebook(matrix.shape[1])  # (codes, hidden)
        mean = old.mean(0)
        scale = (old - mean).norm() / math.sqrt(len(old))  # the root of a row's mean squared distance
        ids = torch.tensor(self.vocabulary.image_ids)
        is_new = ids >= self.rows.start
        matrix[ids[is_new]] = mean + scale * projected[is_new]

    def _projected_codebook(self, hidden: int) -> Tensor:
        """Return the codebook's vectors (codes, hidden) in a random projection, with mean 0 and spread 1."""
        width = self._codebook.shape[1]
        projection = torch.randn(width, hidden, generator=named_generator(self.seed, "codebook"))
        projected = self._codebook @ projection
        centered = projected - projected.mean(0)
        scaled: Tensor = centered * (math.sqrt(len(centered)) / centered.norm())
        return scaled

    @cached_property
    def _codebook(self) -> Tensor:
        """The vectors (codes, width) that the image tokenizer compares latents with."""
        from unitoken.codec.image_tokenizer.network import load_network

        assert self.codec is not None, "check_stage"
        network = load_network(self.codec.vision.kind, find_image_tokenizer(self.codec.vision))
        vectors: Tensor = network.quantize.embedding.weight.detach().float().clone()
        return vectors


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return random numbers of a name's own, whatever else is drawn."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _draw_alike(old: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` rows around the mean of the old rows, with `SPREAD` times their covariance.

    A combination of centered rows with independent normal factors has exactly their covariance, which needs
    neither be computed nor be positive definite.
    """
    mean = old.mean(0)
    chosen = torch.randperm(len(old), generator=generator)[:SAMPLED_ROWS]
    factors = torch.randn(count, len(chosen), generator=generator)
    rows: Tensor = mean + math.sqrt(SPREAD / len(chosen)) * (factors @ (old[chosen] - mean))
    return rows
