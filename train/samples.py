"""What the model can do so far: at an interval it draws pictures and answers questions (`samples:` of a stage).

    save.folder/samples/step-00001000/0.png, 1.png, ...   a drawing for each text in `draw`
    save.folder/samples/step-00001000/answers.txt         a line for each picture in `answer`

A sheet of the drawings goes to the loggers that take images. The random numbers are the same each time, so that what
changes is the model. Training goes on as if nothing had been asked.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from composer import Callback, Logger, State

from unitoken.streaming_data.files import AsideFolder
from unitoken.streaming_data.vocabulary import Vocabulary
from unitoken.train import parallel, ranks
from unitoken.train.ask import check_vocabulary, png
from unitoken.train.config import SamplesConfig, StageConfig
from unitoken.train.dialogue import Dialogue, Picture, Said
from unitoken.train.generate import Reading, generate
from unitoken.train.questions import asked
from unitoken.train.sampling import Sampling

SAMPLES = "samples"


class Samples(Callback):  # type: ignore[misc]
    """All ranks go through the model together, whose shards they gather; the first one writes."""

    def __init__(self, config: StageConfig, samples: SamplesConfig, vocabulary: Vocabulary) -> None:
        assert config.codec is not None, "checked with the settings"
        self._vocabulary = vocabulary
        self._config, self._samples, self._codec = config, samples, config.codec
        self._folder = Path(config.save.folder) / SAMPLES
        self._number, self._unit = int(samples.interval[:-2]), samples.interval[-2:]

    def fit_start(self, state: State, logger: Logger) -> None:  # noqa: ARG002
        """Load the tokenizers, and tokenize what will be asked, which is always the same."""
        samples = self._samples
        with ranks.together(), parallel.paused(state) as network:
            self._dialogue = Dialogue(self._codec, str(network.lm_head.weight.device))
            check_vocabulary(self._dialogue.vocabulary, self._vocabulary, "the data")
            self._requests = self._dialogue.prompts([asked(text) for text in samples.draw], samples.size)
            questions = [asked(text, [picture]) for picture, text in samples.answer.items()]
            self._questions = self._dialogue.prompts(questions, samples.size)

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
            lines = [f"{picture}\t{question}\t{said.text}" for (picture, question), said in answers]
            (folder.path / "answers.txt").write_text("".join(f"{' '.join(line.splitlines())}\n" for line in lines), "utf-8")
            folder.publish()
        if drawings:
            logger.log_images(sheet(drawings), name="samples", channels_last=True, step=step)

    def _ask(self, state: State) -> tuple[list[Picture], list[tuple[tuple[str, str], Said]]]:
        samples, dialogue = self._samples, self._dialogue
        drawn, likeliest = (
            Sampling(samples.temperature, None, samples.top_k, samples.guidance, self._config.seed),
            Sampling(temperature=0.0),
        )
        with parallel.paused(state) as network, torch.no_grad():
            reading, agree = Reading.of(self._config, network), ranks.first_ranks
            size = dialogue.latents(samples.size)
            drawings = generate(
                network, dialogue.vocabulary, self._requests, drawn, sizes=[size], drawing=True, reading=reading, agree=agree
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
            return pictures, list(zip(samples.answer.items(), dialogue.said(answers), strict=True))


def samples_of(config: StageConfig, vocabulary: Vocabulary) -> list[Samples]:
    """The callback where a stage asks for it. `vocabulary` is the data's."""
    return [Samples(config, config.samples, vocabulary)] if config.samples else []


def sheet(pictures: list[Picture]) -> Picture:
    """Pictures of one size side by side in a square, the rest of it black."""
    side = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / side)
    height, width, _ = pictures[0].shape
    padded = np.zeros((rows * side, height, width, 3), np.uint8)
    padded[: len(pictures)] = pictures
    return padded.reshape(rows, side, height, width, 3).transpose(0, 2, 1, 3, 4).reshape(rows * height, side * width, 3)
