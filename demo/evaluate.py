"""What a model reads, draws and answers, and the results of a suite as the demo's report shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from streaming import StreamingDataset

from demo.classify import name_digit
from demo.digits import REQUESTS, WORDS
from demo.report import Answer, Drawing
from unitoken.common.config import load_config
from unitoken.dataset.images import decode
from unitoken.dataset.record import Record
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.plan.report import PlanReport
from unitoken.streaming_data.reading.batch import target_places
from unitoken.streaming_data.reading.loader import build_loader
from unitoken.train.check import check_stage
from unitoken.train.checkpoint.metadata import STAGE
from unitoken.train.config import StageConfig
from unitoken.train.generation.dialogue import Dialogue
from unitoken.train.generation.engine import PromptCollate, generate, load_model
from unitoken.train.generation.prompts import build_prompt, parse_prompt, resolve_image_paths
from unitoken.train.generation.sampling import Sampling
from unitoken.train.model.unitoken import UniToken

DRAWINGS_PER_DIGIT = 10
SIZE = (16, 16)  # pixels of the demo's pictures for the image tokenizer: 4 x 4 latents
DRAWING = Sampling(temperature=0.8, guidance=3.0)
READING = Sampling(temperature=0.0)


class Evaluation:
    """A model, with what is needed to prompt it.

    Args:
        config: the settings of a stage.
        model: the network.
        vocabulary: of the datasets; None: the demo's own.
    """

    def __init__(self, config: StageConfig, model: UniToken, vocabulary: Vocabulary | None = None) -> None:
        self.config, self.model = config, model
        assert config.codec is not None
        self.dialogue = Dialogue(config.codec, vocabulary)

    @classmethod
    def of_run(cls, run: Path, vocabulary: Vocabulary | None = None) -> Evaluation:
        """Load the model of a finished run."""
        config = load_config(StageConfig, run / STAGE)
        return cls(config, load_model(config.model, run), vocabulary)

    def read(self, file: Path) -> list[Answer]:
        """Let the model answer the question of each item in `file`, without seeing the item's own answer."""
        items = json.loads(file.read_text(encoding="utf-8"))
        conversations = [
            parse_prompt(resolve_image_paths(item, file.parent), str(number))
            for number, item in enumerate(items)
        ]
        prompts = self.dialogue.encode(conversations, [SIZE])
        vision, data = self.model.vision, self.config.data
        views = Views(vision.image_size, vision.patch_size, data.anyres) if vision else None
        replies = generate(
            self.model,
            self.dialogue.vocabulary,
            prompts,
            READING,
            max_tokens=8,
            collate=PromptCollate(views, data.continuous),
            batch=64,
        )
        answers = []
        for prompt, item, reply in zip(prompts, items, self.dialogue.decode(replies), strict=True):
            digit = item["conversations"][-1]["value"]
            answers.append(Answer(np.asarray(decode(prompt.images[0])), digit, reply.text))
        return answers

    def draw(self, sampling: Sampling = DRAWING, system: str | None = None) -> list[Drawing]:
        """Draw every digit ten times, and read the drawings with a classifier trained on real digits."""
        words = [word for word in WORDS for _ in range(DRAWINGS_PER_DIGIT)]
        before = [{"from": "system", "value": system}] if system else []
        requests = [
            parse_prompt({"conversations": [*before, {"from": "human", "value": request}]}, request)
            for request in (REQUESTS[0].format(word) for word in words)
        ]
        prompts = self.dialogue.encode(requests, [SIZE])
        sizes = [self.dialogue.latents(SIZE)]
        replies = generate(
            self.model, self.dialogue.vocabulary, prompts, sampling, sizes=sizes, drawing=True, batch=64
        )
        pictures = [reply.pictures[0] for reply in self.dialogue.decode(replies)]
        return [
            Drawing(picture, word, name_digit(Image.fromarray(picture)))
            for picture, word in zip(pictures, words, strict=True)
        ]

    def answer(self, questions: Sequence[str], max_tokens: int) -> list[str]:
        """Answer questions without images; an answer of more than `max_tokens` ends with a whole sentence."""
        prompts = self.dialogue.encode([build_prompt(question) for question in questions], [SIZE])
        replies = generate(
            self.model, self.dialogue.vocabulary, prompts, READING, max_tokens=max_tokens, batch=32
        )
        texts = [reply.text for reply in self.dialogue.decode(replies)]
        return [
            text if len(reply) < max_tokens else text[: max(map(text.rfind, ".!?")) + 1]
            for text, reply in zip(texts, replies, strict=True)
        ]

    @torch.no_grad()
    def loss(self, dataset: Path) -> float:
        """Return the mean cross-entropy of the tokens that a dataset without images trains on."""
        total, count = 0.0, 0
        for sample in StreamingDataset(local=str(dataset), batch_size=1):
            record = Record.from_mds(sample)
            ids = torch.from_numpy(record.tokens.astype(np.int64))[None]
            labels = torch.from_numpy(record.labels().astype(np.int64))[None]
            loss = self.model(
                {
                    "input_ids": ids,
                    "labels": labels,
                    **target_places(labels),
                    "position_ids": torch.arange(ids.shape[1])[None],
                    "document_ids": torch.zeros_like(ids),
                    "pixel_values": torch.empty(0),
                }
            )
            total, count = total + loss.token_ce.sum().item(), count + len(loss.token_ce)
        return total / count


def trained_plan(run: Path) -> PlanReport:
    """Load the report of the plan that a run was trained with."""
    config = load_config(StageConfig, run / STAGE)
    resolved = check_stage(config, world_size=1)
    loader = build_loader(
        config.data,
        views=resolved.views,
        vocabulary=resolved.vocabulary,
        batch_packs=config.data.global_batch,
        compat=resolved.compat,
        sources=resolved.train.sources,
    )
    return loader.dataset.plan.report


def answers_of_suite(results: Path, data: Path) -> list[Answer]:
    """Return the answers that `unitoken evaluate` wrote, with the pictures that they are about."""
    items = json.loads((data / "heldout.json").read_text(encoding="utf-8"))
    return [
        Answer(_pixels(data / item["image"][0]), line["expected"][0], line["text"])
        for item, line in zip(items, _lines(results / "reading"), strict=True)
    ]


def drawings_of_suite(results: Path) -> list[Drawing]:
    """Return the drawings that `unitoken evaluate` wrote, and which digits the classifier sees in them."""
    folder = results / "drawing"
    return [
        Drawing(_pixels(folder / "pictures" / line["picture"]), line["expected"][0], line["classifier"])
        for line in _lines(folder)
    ]


def _lines(task: Path) -> list[dict[str, Any]]:
    text = (task / "replies.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _pixels(path: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(decode(path.read_bytes()))
