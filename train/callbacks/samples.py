"""Samples of a model in training: images and answers, generated at an interval (`samples:` of a stage).

    save.folder/samples/step-00001000/0.png, 1.png, ...   an image for each prompt in `draw`
    save.folder/samples/step-00001000/drawings.txt        a line for each: file and prompt
    save.folder/samples/step-00001000/answers.txt         a line for each image in `answer`, with the answer

The images go to loggers in one sheet, the answers in one table. The random numbers are the same each time, so
that differences are the model's. Training is not affected.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from composer import Callback, Logger, State

from unitoken.codec.config import CodecConfig
from unitoken.common.files import AsideFolder
from unitoken.dataset.vision_views import Pixels
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.callbacks.intervals import is_due
from unitoken.train.checkpoint.metadata import PictureCrops
from unitoken.train.config import SamplesConfig
from unitoken.train.distributed import composer_trainer, ranks
from unitoken.train.generation.check_samples import image_sizes
from unitoken.train.generation.command import png
from unitoken.train.generation.dialogue import Dialogue
from unitoken.train.generation.engine import PromptCollate, generate
from unitoken.train.generation.prompts import build_prompt
from unitoken.train.generation.sampling import Sampling
from unitoken.train.generation.settings import check_trained_vocabulary
from unitoken.train.model.unitoken import UniToken
from unitoken.train.run.log_files import ANSWERS, DRAWINGS, SAMPLES, write_rows


class _Answer(NamedTuple):
    """A row of the table of answers."""

    picture: str
    question: str
    answer: str


class Samples(Callback):  # type: ignore[misc]
    """Generates samples; all ranks go through the sharded model together, and the first one writes.

    Args:
        config: prompts and sizes.
        codec: the tokenizers.
        vocabulary: of the training data; the tokenizers must have the same.
        pictures: sizes of the training data's images.
        collate: how prompts are laid out.
        sampling: of images; answers are greedy.
        folder: the run's folder.
        every: steps between two times.
    """

    def __init__(
        self,
        config: SamplesConfig,
        codec: CodecConfig,
        *,
        vocabulary: Vocabulary,
        pictures: PictureCrops,
        collate: PromptCollate,
        sampling: Sampling,
        folder: Path,
        every: int,
    ) -> None:
        self._config, self._codec, self._vocabulary = config, codec, vocabulary
        self._collate, self._sampling, self._every = collate, sampling, every
        self._folder = folder / SAMPLES
        self._sizes = image_sizes(config.size, pictures)
        # Data without images has no crops, but prompts may have images.
        self._crops = pictures.crops or [(width, height) for height, width in self._sizes]

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Load the tokenizers and encode the prompts, which are the same each time."""
        with ranks.share_errors(), composer_trainer.evaluation_mode(state) as network:
            device = str(network.output_weight.device)
            self._dialogue = Dialogue(self._codec, self._vocabulary, device)
            check_trained_vocabulary(self._dialogue.vocabulary, self._vocabulary, "the data")
            requests = [build_prompt(text) for text in self._config.draw]
            self._requests = self._dialogue.encode(requests, self._crops)
            questions = [build_prompt(text, [picture]) for picture, text in self._config.answer.items()]
            self._questions = self._dialogue.encode(questions, self._crops)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Generate samples if they are due; write and log them."""
        step = state.timestamp.batch.value
        if not is_due(step, self._every):
            return
        with composer_trainer.evaluation_mode(state) as network, torch.no_grad():
            images = self._generate_images(network)
            answers = self._generate_answers(network)
        if ranks.is_first_rank():
            self._write(self._folder / f"step-{step:08d}", images, answers)
            if images:
                logger.log_images(sheet(images), name="samples", channels_last=True, step=step)
            if answers:
                table = [list(answer) for answer in answers]
                logger.log_table(list(_Answer._fields), table, name="samples/answers", step=step)

    def _generate_images(self, network: UniToken) -> list[Pixels]:
        replies = generate(
            network,
            self._dialogue.vocabulary,
            self._requests,
            self._sampling,
            sizes=[self._dialogue.latents(size) for size in self._sizes],
            drawing=True,
            collate=self._collate,
            broadcast=ranks.broadcast_from_first_rank,
        )
        return [reply.pictures[0] for reply in self._dialogue.decode(replies)]

    def _generate_answers(self, network: UniToken) -> list[_Answer]:
        replies = generate(
            network,
            self._dialogue.vocabulary,
            self._questions,
            Sampling(temperature=0.0),
            max_tokens=self._config.max_tokens,
            collate=self._collate,
            broadcast=ranks.broadcast_from_first_rank,
        )
        texts = [reply.text for reply in self._dialogue.decode(replies)]
        questions = self._config.answer.items()
        return [
            _Answer(picture, question, text)
            for (picture, question), text in zip(questions, texts, strict=True)
        ]

    def _write(self, target: Path, images: list[Pixels], answers: list[_Answer]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with AsideFolder(target) as folder:
            for number, image in enumerate(images):
                (folder.path / f"{number}.png").write_bytes(png(image))
            drawings = [(f"{number}.png", text) for number, text in enumerate(self._config.draw)]
            write_rows(folder.path / DRAWINGS, drawings)
            write_rows(folder.path / ANSWERS, answers)
            # A run that goes on from an older checkpoint repeats steps; a folder of that step is of the
            # earlier model.
            shutil.rmtree(target, ignore_errors=True)
            folder.publish()


def sheet(pictures: list[Pixels]) -> Pixels:
    """Arrange images (H, W, 3), row by row, in a square whose unused part is black."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height = max(picture.shape[0] for picture in pictures)
    width = max(picture.shape[1] for picture in pictures)
    cells = np.zeros((rows, columns, height, width, 3), np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        cells[row, column, : picture.shape[0], : picture.shape[1]] = picture
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
