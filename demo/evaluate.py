"""What the trained model can do: it reads digits that it has never seen, and draws all ten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from demo.digits import REQUESTS, WORDS, small, split
from demo.report import Answer, Drawing
from unitoken.codec.config import VisionConfig
from unitoken.codec.conversations import parse
from unitoken.codec.sequence import assemble
from unitoken.codec.text import TextEncoder, load_tokenizer
from unitoken.codec.vision import load_vision
from unitoken.streaming_data.config import load_config
from unitoken.streaming_data.images import decode, tokenizer_pixels
from unitoken.streaming_data.loader import build_loader
from unitoken.streaming_data.manifest import load_vocabulary
from unitoken.streaming_data.report import Report
from unitoken.streaming_data.views import Views
from unitoken.train.check import check
from unitoken.train.config import StageConfig
from unitoken.train.generate import answer, generate_images, load_model, prompt_of

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "demo" / "assets"
SIDE = 4  # latents each way of the demo's pictures
EACH = 10  # drawings of each digit
TEMPERATURE = 0.8


class Evaluation:
    """The model of a finished run, and what it takes to ask it something."""

    def __init__(self, stage: str, run: Path, data: Path) -> None:
        self.config = load_config(StageConfig, ROOT / "yamls" / "demo" / f"{stage}.yaml")
        self.model = load_model(self.config, run)
        self.vocabulary = load_vocabulary(data / "captions")
        self.tokenizer = load_tokenizer(str(ASSETS / "tokenizer"))
        self.text = TextEncoder(self.tokenizer, self.vocabulary)
        self.vision = load_vision(VisionConfig(weights=str(ASSETS / "vqgan")))

    def read(self, file: Path) -> list[Answer]:
        """Ask for each item of `file` what digit it is; the item's own answer is kept from the model."""
        items = json.loads(file.read_text(encoding="utf-8"))
        conversations = [parse(item, str(position)) for position, item in enumerate(items)]
        originals = [(file.parent / conversation.images[0]).read_bytes() for conversation in conversations]
        side = SIDE * self.vision.downsampling
        pixels = np.stack([tokenizer_pixels(decode(original), (side, side)) for original in originals])
        prompts = [
            prompt_of(assemble(conversation, [codes], [original], self.text, self.vocabulary))
            for conversation, codes, original in zip(conversations, self.vision.encode(pixels), originals, strict=True)
        ]
        said = [self.tokenizer.decode(ids) for ids in answer(self.model, self.vocabulary, prompts, max_tokens=8)]
        return [
            Answer(np.asarray(decode(original)), item["conversations"][1]["value"], words)
            for original, item, words in zip(originals, items, said, strict=True)
        ]

    def draw(self) -> list[Drawing]:
        """EACH drawings of every digit, and what an ordinary classifier, trained on the real digits, reads in them."""
        asked = [word for word in WORDS for _ in range(EACH)]
        prompts = [
            np.array([self.vocabulary.bos, *self.text.encode(REQUESTS[0].format(word), start=True), self.vocabulary.end_of_turn])
            for word in asked
        ]
        pictures = self.vision.decode(
            generate_images(self.model, self.vocabulary, prompts, SIDE, SIDE, temperature=TEMPERATURE, seed=0)
        )
        digits, train = load_digits(), split()[0]
        classifier = SVC(gamma=0.001).fit(digits.data[train], digits.target[train])
        read = classifier.predict(np.stack([small(picture) for picture in pictures]))
        return [Drawing(*drawing) for drawing in zip(pictures, asked, (WORDS[digit] for digit in read), strict=True)]

    def plan(self) -> Report:
        """The plan that the stage was trained by."""
        checked = check(self.config, world_size=1)
        vision: Any = checked.vision
        loader = build_loader(
            self.config.data,
            views=Views(vision.image_size, vision.patch_size),
            vocabulary=checked.vocabulary,
            batch_packs=self.config.data.global_batch,
            compat=False,
        )
        return loader.dataset.plan.report
