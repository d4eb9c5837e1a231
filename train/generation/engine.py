"""Replies of a trained model: text and images, token by token, for many prompts at once.

model = load_model(config)                                               # of a stage: its last checkpoint
replies = generate(model, vocabulary, prompts, Sampling(guidance=4.0), sizes=[(32, 32)])

Prompts are records (`prompt_of`, `Dialogue.prompts`), so their pictures are read as in training. Those of several lengths
go through the model side by side, padded at their left; with guidance each has a second row that reads its null prompt
and, of the reply, the images alone, from the first image on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unitoken.dataset.images import decode
from unitoken.dataset.record import Record
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.reading.collate import Batch, Collate, featured_images, insert_features
from unitoken.streaming_data.reading.null_prompts import without_text
from unitoken.train.checkpoint import run_folder
from unitoken.train.checkpoint.integrity import check_checkpoint
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.checkpoint.locations import find_origin
from unitoken.train.checkpoint.metadata import read_sizes
from unitoken.train.checkpoint.tensors import check_shapes, fit_norms, parameter_shapes
from unitoken.train.config import StageConfig, VisionTowerConfig
from unitoken.train.generation.sampling import Grammar, GrammarSteps, Sampling, draw, generator_of
from unitoken.train.model.decoder import KVCache, dense_document_mask
from unitoken.train.model.unitoken import UniToken, build_model

PLAIN = Sampling()
NO_TARGETS = np.zeros((0, 2), np.uint32)
READ = (
    "input_ids",
    "position_ids",
    "pixel_values",
    "feature_rows",
    "feature_columns",
    "feature_views",
    "feature_patches",
)


def load_model(config: StageConfig, checkpoint: str | Path | None = None) -> UniToken:
    """The model of a stage with the weights of `checkpoint`, or of the stage's own last one. Raises ConfigError."""
    origin = find_origin(str(checkpoint or config.save.folder))
    model = build_model(*read_sizes(origin, config.model), config.model)
    if origin.is_file():
        check_checkpoint(origin)
    source = fit_norms(run_folder.open_weights(origin), parameter_shapes(model))
    check_shapes(source.shapes, parameter_shapes(model), source.where)
    load_weights(model, {part: source for part, _ in model.named_children()}, seed=0)
    return model.eval()


def prompt_of(record: Record) -> Record:
    """A record up to the first token that is trained on: what a model is asked."""
    end = int(record.target_spans[0][0])
    images = int((record.image_spans[:, 1] <= end).sum())
    return Record(
        record.id, record.tokens[:end], NO_TARGETS, record.image_spans[:images], record.images[:images]
    )


def null_prompt(prompt: Record) -> Record:
    return without_text(prompt, len(prompt.tokens))


@dataclass(frozen=True)
class Reading:
    """How the pictures of a prompt are read: as in training."""

    views: Views | None = None  # None: no features
    continuous: str = "questions"
    compat: bool = False

    @classmethod
    def of(cls, config: StageConfig, vision: VisionTowerConfig | None) -> Reading:
        compat = config.compat == "unitoken"
        views = Views(vision.image_size, vision.patch_size, config.data.anyres) if vision else None
        return cls(views, config.data.continuous, compat)

    @property
    def _continuous(self) -> str:
        """Which images have features: `continuous`, or all where the reference is reproduced."""
        return "all" if self.compat and self.continuous == "questions" else self.continuous

    def length(self, prompt: Record) -> int:
        """Positions of a prompt, features included."""
        if self.views is None or self.continuous == "none":
            return len(prompt.tokens)
        images = featured_images(prompt.labels(), prompt.image_spans, self._continuous)
        sizes = {
            image: decode(prompt.images[image], self.compat).size if self.views.anyres else (1, 1)
            for image in images
        }
        return len(
            insert_features(prompt, {image: self.views.count(*size) for image, size in sizes.items()}, 0).ids
        )

    def batch(self, prompts: Sequence[Record], lengths: Sequence[int], vocabulary: Vocabulary) -> Batch:
        """A prompt a row, of `lengths` positions each, and all end together: what is missing is at the left."""
        longest = max(lengths)
        collate = Collate(
            longest, self.views, self._continuous, vocabulary.separator, vocabulary.newline, self.compat
        )
        batch = collate([[prompt] for prompt in prompts])
        shift = longest - torch.tensor(lengths)
        places = (torch.arange(longest) - shift[:, None]) % longest  # the padding comes round to the left
        for name in ("input_ids", "position_ids", "document_ids"):
            batch[name] = batch[name].gather(1, places)
        batch["feature_columns"] = batch["feature_columns"] + shift[batch["feature_rows"]]
        distinct: dict[bytes, int] = {}  # several replies to one prompt show the tower one picture
        which = [distinct.setdefault(view.numpy().tobytes(), len(distinct)) for view in batch["pixel_values"]]
        batch["pixel_values"] = batch["pixel_values"][[which.index(view) for view in range(len(distinct))]]
        batch["feature_views"] = torch.tensor(which, dtype=torch.int64)[batch["feature_views"]]
        return batch


@torch.no_grad()
def generate(
    model: UniToken,
    vocabulary: Vocabulary,
    prompts: Sequence[Record],
    sampling: Sampling = PLAIN,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    drawing: bool = False,
    max_tokens: int | Sequence[int] = 64,
    numbers: Sequence[int] | None = None,
    reading: Reading | None = None,
    batch: int = 8,
    agree: Callable[[Tensor], Tensor] = lambda chosen: chosen,
) -> list[list[int]]:
    """The reply to each prompt, as ids without the end of the turn.

    What is drawn for a prompt depends on (seed, its number), not on the prompts beside it.

    Args:
        sizes: the (height, width) in latents that an image may have; without any, a reply is text alone.
        drawing: a reply is one image and nothing else. Otherwise the model says what it likes, and begins images itself.
        max_tokens: a reply that is no drawing ends with the turn or after so many, each prompt's or all; an image that has begun
            is finished.
        numbers: the prompts' own, where they are some of many; else 0, 1, ...
        batch: prompts at a time; one that is drawn for with guidance takes a second row. A row's cache takes 0.5 MB a token of
            the 7B model in bf16.
        agree: gives the first rank's choice to all, where several go through the same sharded model together.
    """
    assert sizes or not drawing
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    assert min(limits, default=1) > 0
    numbers = range(len(prompts)) if numbers is None else numbers
    if reading is None:
        reading = Reading(Views(model.vision.image_size, model.vision.patch_size) if model.vision else None)
    grammar = Grammar(vocabulary, sizes, model.lm_head.weight.device)
    lengths = [reading.length(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    replies: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), batch):
        places = order[first : first + batch]
        rows = [prompts[place] for place in places]
        turns = [grammar.drawing() if drawing else grammar.turn(limits[place]) for place in places]
        generators = [generator_of(sampling.seed, numbers[place]) for place in places]
        room = grammar.longest + (0 if drawing else max(limits[place] for place in places))
        opened = functools.partial(_open, model, reading, vocabulary, room)
        guide = (
            Guide(functools.partial(opened, [null_prompt(row) for row in rows]))
            if sampling.guidance != 1
            else None
        )
        found = _replies(opened(rows), guide, vocabulary, turns, sampling, generators, agree)
        for place, reply in zip(places, found, strict=True):
            replies[place] = reply
    return replies


def _open(
    model: UniToken, reading: Reading, vocabulary: Vocabulary, room: int, rows: Sequence[Record]
) -> _Context:
    return _Context(model, reading.batch(rows, [reading.length(row) for row in rows], vocabulary), room)


def _replies(
    context: _Context,
    guide: Guide | None,
    vocabulary: Vocabulary,
    turns: Sequence[GrammarSteps],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    agree: Callable[[Tensor], Tensor],
) -> list[list[int]]:
    """A reply for each turn, which has a row in the context and in the guide."""
    replies: list[list[int]] = [[] for _ in turns]
    choices, running = [next(turn) for turn in turns], set(range(len(turns)))
    while True:
        chosen = agree(draw(choices, context.logits, guide.logits if guide else None, sampling, generators))
        tokens = chosen.tolist()
        of_image = [
            kind.of_image or token == vocabulary.image_start
            for kind, token in zip(choices, tokens, strict=True)
        ]
        for row in sorted(running):
            if tokens[row] != vocabulary.end_of_turn:
                replies[row].append(tokens[row])
            try:
                choices[row] = turns[row].send(tokens[row])
            except StopIteration:
                running.remove(row)
        if not running:
            return replies
        context.read(chosen, [True] * len(turns))
        if guide:
            guide.read(chosen, [row in running and heard for row, heard in enumerate(of_image)])


class Guide:
    """What images are guided away from: rows that read the null prompts and, of the replies, the images alone.

    They are opened with the first image: replies in words cost nothing more.
    """

    def __init__(self, open_context: Callable[[], _Context]) -> None:
        self._open = open_context
        self._context: _Context | None = None

    @property
    def logits(self) -> Tensor | None:
        return self._context.logits if self._context else None

    def read(self, tokens: Tensor, of_image: Sequence[bool]) -> None:
        """One more token in the rows where it is of an image."""
        if any(of_image):
            self._context = self._context or self._open()
            self._context.read(tokens, of_image)


class _Context:
    """What the model has read in each row, and what it expects next: `logits` (R, vocabulary)."""

    def __init__(self, model: UniToken, batch: Batch, room: int) -> None:
        self._model, device = model, model.lm_head.weight.device
        documents = batch["document_ids"]
        rows, length = documents.shape
        self._read = torch.zeros(
            rows, length + room, dtype=torch.bool
        )  # which places of the cache hold something
        self._read[:, :length] = documents >= 0
        self._cache = KVCache(len(model.model.layers), length + room)
        self._no_pixels = batch["pixel_values"][:0].to(device)
        mask = None if bool((documents >= 0).all()) else dense_document_mask(documents.to(device))
        self.logits = model.predict({name: batch[name].to(device) for name in READ}, mask, self._cache)

    def read(self, tokens: Tensor, heard: Sequence[bool]) -> None:
        """One more token (R,) in each row; where it is not `heard`, the row stays as it is."""
        end = self._cache.seen + 1
        positions = self._read[:, : end - 1].sum(1)
        self._read[:, end - 1] = torch.tensor(heard)
        read, device = self._read[:, :end], tokens.device
        mask = None if bool(read.all()) else read[:, None, None].to(device)
        batch = {
            "input_ids": tokens[:, None],
            "position_ids": positions[:, None].to(device),
            "pixel_values": self._no_pixels,
        }
        self.logits = self._model.predict(batch, mask, self._cache)


def parts_of(vocabulary: Vocabulary, reply: Sequence[int]) -> list[list[int] | npt.NDArray[np.int64]]:
    """A reply in parts: text as ids, images as codes (h, w), in their order."""
    parts: list[list[int] | npt.NDArray[np.int64]] = []
    ids = list(reply)
    while ids:
        if ids[0] == vocabulary.image_start:
            end = ids.index(vocabulary.image_end) + 1  # the grammar finishes every image
            parts.append(vocabulary.image_codes(np.array(ids[:end])))
        else:
            end = ids.index(vocabulary.image_start) if vocabulary.image_start in ids else len(ids)
            parts.append(ids[:end])
        ids = ids[end:]
    return parts
