"""What the model can do so far: at an interval it draws pictures and answers questions (`samples:` of a stage).

    save.folder/samples/step-00001000/0.png, 1.png, ...   a drawing for each text in `draw`
    save.folder/samples/step-00001000/drawings.txt        a line for each: its file, and what was asked for
    save.folder/samples/step-00001000/answers.txt         a line for each picture in `answer`

A sheet of the drawings goes to the loggers that take images, a table of the answers to those that take tables. The
random numbers are the same each time, so that what changes is the model. Training goes on as if nothing had been asked.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import torch
from composer import Callback, Logger, State

from unitoken.common.files import AsideFolder
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.train.checkpoint.metadata import PictureCrops
from unitoken.train.config import SamplesConfig, StageConfig
from unitoken.train.distributed import composer_trainer, ranks
from unitoken.train.generation.check_samples import SAMPLES_GUIDANCE, drawn_sizes, guidance_of
from unitoken.train.generation.command import png
from unitoken.train.generation.dialogue import Dialogue, Picture
from unitoken.train.generation.engine import Reading, generate
from unitoken.train.generation.prompts import asked
from unitoken.train.generation.sampling import Sampling
from unitoken.train.generation.settings import check_trained_vocabulary

SAMPLES = "samples"


class Samples(Callback):  # type: ignore[misc]
    """All ranks go through the model together, whose shards they gather; the first one writes."""

    def __init__(
        self, config: StageConfig, samples: SamplesConfig, vocabulary: Vocabulary, pictures: PictureCrops
    ) -> None:
        assert config.codec is not None, "checked with the settings"
        self._vocabulary = vocabulary
        self._sizes = drawn_sizes(config, pictures)
        self._crops = pictures.crops or [
            (width, height) for height, width in self._sizes
        ]  # also where only prompts have pictures
        self._config, self._samples, self._codec = config, samples, config.codec
        self._folder = Path(config.save.folder) / SAMPLES
        self._number, self._unit = int(samples.interval[:-2]), samples.interval[-2:]

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Load the tokenizers, and tokenize what will be asked, which is always the same."""
        samples = self._samples
        with ranks.share_errors(), composer_trainer.evaluation_mode(state) as network:
            self._dialogue = Dialogue(self._codec, str(network.lm_head.weight.device))
            check_trained_vocabulary(self._dialogue.vocabulary, self._vocabulary, "the data")
            self._requests = self._dialogue.prompts([asked(text) for text in samples.draw], self._crops)
            questions = [asked(text, [picture]) for picture, text in samples.answer.items()]
            self._questions = self._dialogue.prompts(questions, self._crops)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._unit == "ba" and state.timestamp.batch.value % self._number == 0:
            self._take(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self._unit == "ep" and state.timestamp.epoch.value % self._number == 0:
            self._take(state, logger)

    def _take(self, state: State, logger: Logger) -> None:
        drawings, answers = self._ask(state)
        if not ranks.is_first_rank():
            return
        step = state.timestamp.batch.value
        self._folder.mkdir(parents=True, exist_ok=True)
        with AsideFolder(self._folder / f"step-{step:08d}") as folder:
            for number, picture in enumerate(drawings):
                (folder.path / f"{number}.png").write_bytes(png(picture))
            asked_for = [[f"{number}.png", text] for number, text in enumerate(self._samples.draw)]
            _write_rows(folder.path / "drawings.txt", asked_for)
            _write_rows(folder.path / "answers.txt", answers)
            # A run that goes on from an older checkpoint does steps again: what is there then is not of this model.
            shutil.rmtree(self._folder / f"step-{step:08d}", ignore_errors=True)
            folder.publish()
        if drawings:
            logger.log_images(sheet(drawings), name="samples", channels_last=True, step=step)
        if answers:
            logger.log_table(["picture", "question", "answer"], answers, name="samples/answers", step=step)

    def _ask(self, state: State) -> tuple[list[Picture], list[list[str]]]:
        """The drawings, and of each answer picture, question and answer."""
        samples, dialogue = self._samples, self._dialogue
        guidance = guidance_of(samples.guidance, self._config, SAMPLES_GUIDANCE)
        drawn, likeliest = (
            Sampling(samples.temperature, None, samples.top_k, guidance, self._config.seed),
            Sampling(temperature=0.0),
        )
        with composer_trainer.evaluation_mode(state) as network, torch.no_grad():
            reading, agree = Reading.of(self._config, network.vision), ranks.broadcast_from_first_rank
            sizes = [dialogue.latents(size) for size in self._sizes]
            drawings = generate(
                network,
                dialogue.vocabulary,
                self._requests,
                drawn,
                sizes=sizes,
                drawing=True,
                reading=reading,
                agree=agree,
            )
            answers = generate(
                network,
                dialogue.vocabulary,
                self._questions,
                likeliest,
                max_tokens=samples.max_tokens,
                reading=reading,
                agree=agree,
            )
            pictures = [said.pictures[0] for said in dialogue.said(drawings)]
            said = [one.text for one in dialogue.said(answers)]
            return pictures, [
                [*asked, text] for asked, text in zip(samples.answer.items(), said, strict=True)
            ]


def samples_of(config: StageConfig, vocabulary: Vocabulary, pictures: PictureCrops) -> list[Samples]:
    """The callback where a stage asks for it. `vocabulary` and `pictures` are the data's."""
    return [Samples(config, config.samples, vocabulary, pictures)] if config.samples else []


def _write_rows(path: Path, rows: list[list[str]]) -> None:
    path.write_text("".join(" ".join("\t".join(row).splitlines()) + "\n" for row in rows), "utf-8")


def sheet(pictures: list[Picture]) -> Picture:
    """Pictures side by side in a square, the rest of it black."""
    side = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / side)
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    padded = np.zeros((rows * side, height, width, 3), np.uint8)
    for number, picture in enumerate(pictures):
        padded[number, : picture.shape[0], : picture.shape[1]] = picture
    return (
        padded.reshape(rows, side, height, width, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * height, side * width, 3)
    )
