"""Evaluate the trained model: it reads digits that it has never seen, and draws all ten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from demo.digits import REQUESTS, WORDS, small, split
from demo.report import Answer, Drawing
from unitoken.common.config import load_config
from unitoken.dataset.images import decode
from unitoken.dataset.vision_views import Views
from unitoken.streaming_data.plan.report import PlanReport
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.metadata import STAGE
from unitoken.train.config import StageConfig
from unitoken.train.generation.dialogue import Dialogue
from unitoken.train.generation.engine import Reading, generate, load_model
from unitoken.train.generation.prompts import asked, beside, conversation_of
from unitoken.train.generation.sampling import Sampling

DRAWINGS_PER_DIGIT = 10
SIZE = (16, 16)  # pixels of the demo's pictures for the image tokenizer: 4 x 4 latents
# A classifier recognizes 85 to 93 % of the digits drawn with guidance 1 (none), 96 to 99 % with 2,
# 98 to 100 % with 3 (three seeds).
DRAWING = Sampling(temperature=0.8, guidance=3.0)
READING = Sampling(temperature=0.0)


class Evaluation:
    """The model of a finished run, with what is needed to prompt it."""

    def __init__(self, run: Path) -> None:
        self.config = load_config(StageConfig, run / STAGE)
        assert self.config.codec is not None
        self.model = load_model(self.config, run)
        self.dialogue = Dialogue(self.config.codec)

    def read(self, file: Path) -> list[Answer]:
        """Let the model answer the question of each item in `file`, without seeing the item's own answer."""
        items = json.loads(file.read_text(encoding="utf-8"))
        conversations = [
            conversation_of(beside(item, file.parent), str(number)) for number, item in enumerate(items)
        ]
        prompts = self.dialogue.prompts(conversations, [SIZE])
        replies = generate(
            self.model,
            self.dialogue.vocabulary,
            prompts,
            READING,
            max_tokens=8,
            reading=Reading.of(self.config, self.model.vision),
            batch=64,
        )
        answers = []
        for prompt, item, reply in zip(prompts, items, self.dialogue.said(replies), strict=True):
            digit = item["conversations"][1]["value"]
            answers.append(Answer(np.asarray(decode(prompt.images[0])), digit, reply.text))
        return answers

    def draw(self, sampling: Sampling = DRAWING) -> list[Drawing]:
        """Draw every digit ten times, and read the drawings with a classifier trained on real digits."""
        words = [word for word in WORDS for _ in range(DRAWINGS_PER_DIGIT)]
        prompts = self.dialogue.prompts([asked(REQUESTS[0].format(word)) for word in words], [SIZE])
        sizes = [self.dialogue.latents(SIZE)]
        replies = generate(
            self.model, self.dialogue.vocabulary, prompts, sampling, sizes=sizes, drawing=True, batch=64
        )
        pictures = [reply.pictures[0] for reply in self.dialogue.said(replies)]
        digits, train = load_digits(), split()[0]
        classifier = SVC(gamma=0.001).fit(digits.data[train], digits.target[train])
        labels = classifier.predict(np.stack([small(picture) for picture in pictures]))
        return [
            Drawing(picture, word, WORDS[label])
            for picture, word, label in zip(pictures, words, labels, strict=True)
        ]

    def plan(self) -> PlanReport:
        """Load the report of the plan that the stage was trained with."""
        checked = check_stage(self.config, world_size=1)
        vision = checked.vision
        assert vision is not None, "the demo's last stage has a vision tower"
        loader = build_loader(
            self.config.data,
            views=Views(vision.image_size, vision.patch_size, self.config.data.anyres),
            vocabulary=checked.vocabulary,
            batch_packs=self.config.data.global_batch,
            compat=False,
        )
        return loader.dataset.plan.report
