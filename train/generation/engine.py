"""Replies of a trained model: text and images, token by token, for many prompts at once.

model = load_model(config.model, config.save.folder)                     # the run's last checkpoint
replies = generate(model, vocabulary, prompts, Sampling(guidance=4.0), sizes=[(32, 32)])

Prompts are records (`Dialogue.encode`), so their images are laid out as in training. Prompts of different
lengths go through the model together, padded at the left. With guidance each prompt has a second row, which
gets its null prompt and, of the reply, only the images, from the first image on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unitoken.dataset.images import decode
from unitoken.dataset.record import Record
from unitoken.dataset.vision_views import Views
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.generation.grammar import Grammar, GrammarSteps
from unitoken.streaming_data.reading.collate import Batch, Collate, featured_images, insert_features
from unitoken.streaming_data.reading.null_prompts import without_text
from unitoken.train.checkpoint import run_folder
from unitoken.train.checkpoint.integrity import check_checkpoint
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.checkpoint.locations import find_origin, is_checkpoint
from unitoken.train.checkpoint.metadata import read_sizes
from unitoken.train.checkpoint.tensors import check_shapes, drop_tied_head, fit_norms, parameter_shapes
from unitoken.train.config import ModelConfig
from unitoken.train.generation.sampling import Sampling, choose_tokens, generator_of
from unitoken.train.model.decoder import KVCache, dense_document_mask
from unitoken.train.model.unitoken import UniToken, build_model

DEFAULT_SAMPLING = Sampling()
MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "pixel_values",
    "feature_rows",
    "feature_columns",
    "feature_views",
    "feature_patches",
)


def load_model(config: ModelConfig, checkpoint: str | Path) -> UniToken:
    """Load a model for inference.

    Args:
        config: the stage's `model`; it gives the sizes if the checkpoint's folder does not.
        checkpoint: anything that `init_from` takes.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, or its tensors do not fit the model.
    """
    origin = find_origin(str(checkpoint))
    model = build_model(*read_sizes(origin, config), config)
    if is_checkpoint(origin):
        check_checkpoint(origin)
    expected = parameter_shapes(model)
    source = drop_tied_head(fit_norms(run_folder.open_weights(origin), expected), expected)
    check_shapes(source.shapes, expected, source.where)
    load_weights(model, {part: source for part, _ in model.named_children()}, seed=0)
    return model.eval()


def null_prompt(prompt: Record) -> Record:
    """Return the prompt without its text, from which images are guided away."""
    return without_text(prompt, len(prompt.tokens))


@dataclass(frozen=True)
class PromptCollate:
    """Collates prompts as training collates packs, so that their images are read in the same way.

    Attributes:
        views: how the vision tower sees an image; None: no image brings features.
        continuous: which images bring features, as in `data.continuous`.
        compat: read images as the reference does.
    """

    views: Views | None = None
    continuous: str = "questions"
    compat: bool = False

    def length(self, prompt: Record) -> int:
        """Return the number of positions of a prompt, features included."""
        if self.views is None or self.continuous == "none":
            return len(prompt.tokens)
        counts = {}
        for image in featured_images(prompt.labels(), prompt.image_spans, self.continuous):
            size = decode(prompt.images[image], self.compat).size if self.views.anyres else (1, 1)
            counts[image] = self.views.count(*size)
        return len(insert_features(prompt, counts, separator=0).ids)

    def __call__(self, prompts: Sequence[Record], lengths: Sequence[int], vocabulary: Vocabulary) -> Batch:
        """Collate one prompt per row, padded at the left so that all rows end together.

        Args:
            prompts: one per row.
            lengths: the `length` of each prompt.
            vocabulary: names the separator and the newline.
        """
        longest = max(lengths)
        collate = Collate(
            longest, self.views, self.continuous, vocabulary.separator, vocabulary.newline, self.compat
        )
        batch = collate([[prompt] for prompt in prompts])
        shift = longest - torch.tensor(lengths)  # (R,)
        columns = (torch.arange(longest) - shift[:, None]) % longest  # moves the padding from right to left
        for name in ("input_ids", "position_ids", "document_ids"):
            batch[name] = batch[name].gather(1, columns)
        batch["feature_columns"] = batch["feature_columns"] + shift[batch["feature_rows"]]
        _merge_equal_views(batch)
        return batch


def _merge_equal_views(batch: Batch) -> None:
    """Keep one copy of equal views, so that an image is computed once for all replies to a prompt."""
    number_of: dict[bytes, int] = {}  # of distinct views, by their pixels
    first_views = []
    distinct = []  # for each view the number of the distinct view that it is equal to
    for place, view in enumerate(batch["pixel_values"]):
        pixels = view.numpy().tobytes()
        if pixels not in number_of:
            number_of[pixels] = len(number_of)
            first_views.append(place)
        distinct.append(number_of[pixels])
    batch["pixel_values"] = batch["pixel_values"][first_views]
    batch["feature_views"] = torch.tensor(distinct, dtype=torch.int64)[batch["feature_views"]]


class _Model(NamedTuple):
    """What all batches of one call of `generate` have in common."""

    network: UniToken
    vocabulary: Vocabulary
    collate: PromptCollate
    sampling: Sampling
    broadcast: Callable[[Tensor], Tensor]

    def open(self, prompts: Sequence[Record], room: int) -> _Context:
        """Read the prompts, with room for so many more tokens."""
        lengths = [self.collate.length(prompt) for prompt in prompts]
        return _Context(self.network, self.collate(prompts, lengths, self.vocabulary), room)


def _views_of(model: UniToken) -> Views | None:
    return Views(model.vision.image_size, model.vision.patch_size) if model.vision else None


@torch.no_grad()
def generate(
    model: UniToken,
    vocabulary: Vocabulary,
    prompts: Sequence[Record],
    sampling: Sampling = DEFAULT_SAMPLING,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    drawing: bool = False,
    max_tokens: int | Sequence[int] = 64,
    numbers: Sequence[int] | None = None,
    collate: PromptCollate | None = None,
    batch: int = 8,
    broadcast: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> list[list[int]]:
    """Return the reply to each prompt, as ids without the end of the turn.

    A reply depends on its prompt, the seed and its number, but not on the other prompts.

    Args:
        model: the network.
        vocabulary: of the model.
        prompts: conversations that end with a human turn, as records.
        sampling: temperature, top-k, guidance and seed.
        sizes: the (height, width) in latents that an image may have; empty: replies are text only.
        drawing: a reply is one image and nothing else. Otherwise the model begins images itself.
        max_tokens: the most tokens of a reply with text, for all or for each; an image is finished.
        numbers: the number of each prompt, which seeds its random numbers; default: 0, 1, ...
        collate: how prompts are laid out; default: as in a stage with default settings.
        batch: prompts at a time. With guidance a prompt of a drawing takes a second row. A row's cache takes
            0.5 MB per token of the 7B model in bf16.
        broadcast: gives the first rank's tokens to all ranks, which go through a sharded model together.
    """
    assert sizes or not drawing
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    assert min(limits, default=1) > 0
    numbers = range(len(prompts)) if numbers is None else numbers
    collate = collate or PromptCollate(_views_of(model))
    shared = _Model(model, vocabulary, collate, sampling, broadcast)
    grammar = Grammar(vocabulary, sizes, model.output_weight.device)
    order = sorted(range(len(prompts)), key=[collate.length(prompt) for prompt in prompts].__getitem__)
    replies: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), batch):
        places = order[first : first + batch]
        turns = [grammar.drawing() if drawing else grammar.turn(limits[place]) for place in places]
        room = grammar.longest + (0 if drawing else max(limits[place] for place in places))
        generators = [generator_of(sampling.seed, numbers[place]) for place in places]
        generated = _generate_batch(shared, [prompts[place] for place in places], turns, generators, room)
        for place, reply in zip(places, generated, strict=True):
            replies[place] = reply
    return replies


def _generate_batch(
    model: _Model,
    prompts: Sequence[Record],
    turns: Sequence[GrammarSteps],
    generators: Sequence[torch.Generator],
    room: int,
) -> list[list[int]]:
    """Generate replies side by side; each prompt has its own turn of the grammar and random generator."""
    context = model.open(prompts, room)
    guidance = None
    if model.sampling.guidance != 1:
        null_prompts = [null_prompt(prompt) for prompt in prompts]
        guidance = _GuidanceContext(functools.partial(model.open, null_prompts, room))
    replies: list[list[int]] = [[] for _ in turns]
    choices, running = [next(turn) for turn in turns], set(range(len(turns)))
    while True:
        null_logits = guidance.logits if guidance else None
        tokens = model.broadcast(
            choose_tokens(choices, context.logits, null_logits, model.sampling, generators)
        )
        ids = tokens.tolist()
        in_image = [
            choice.of_image or token == model.vocabulary.image_start
            for choice, token in zip(choices, ids, strict=True)
        ]
        for row in sorted(running):
            if ids[row] != model.vocabulary.end_of_turn:
                replies[row].append(ids[row])
            try:
                choices[row] = turns[row].send(ids[row])
            except StopIteration:
                running.remove(row)
        if not running:
            return replies
        context.append(tokens, [True] * len(turns))
        if guidance:
            guidance.append(tokens, [row in running and in_image[row] for row in range(len(turns))])


class _GuidanceContext:
    """Rows that read the null prompts and, of the replies, only the images: images are guided away from them.

    They are opened with the first image, so that replies in text cost nothing more.
    """

    def __init__(self, open_context: Callable[[], _Context]) -> None:
        self._open = open_context
        self._context: _Context | None = None

    @property
    def logits(self) -> Tensor | None:
        return self._context.logits if self._context else None

    def append(self, tokens: Tensor, in_image: Sequence[bool]) -> None:
        """Read one more token in the rows where it belongs to an image."""
        if any(in_image):
            self._context = self._context or self._open()
            self._context.append(tokens, in_image)


class _Context:
    """The cache of the tokens read so far in each row, and `logits` (R, vocabulary) of the next token."""

    def __init__(self, model: UniToken, batch: Batch, room: int) -> None:
        self._model, device = model, model.output_weight.device
        documents = batch["document_ids"]
        rows, length = documents.shape
        # (R, length + room): which places of the cache hold a token.
        self._filled = torch.zeros(rows, length + room, dtype=torch.bool)
        self._filled[:, :length] = documents >= 0
        self._cache = KVCache(len(model.model.layers), length + room)
        self._no_pixels = batch["pixel_values"][:0].to(device)
        mask = None if bool((documents >= 0).all()) else dense_document_mask(documents.to(device))
        inputs = {name: batch[name].to(device) for name in MODEL_INPUTS}
        self.logits = model.predict(inputs, mask, self._cache)

    def append(self, tokens: Tensor, included: Sequence[bool]) -> None:
        """Read one more token (R,) in each row; a row that is not `included` stays as it is."""
        end = self._cache.seen + 1
        positions = self._filled[:, : end - 1].sum(1)
        self._filled[:, end - 1] = torch.tensor(included)
        filled, device = self._filled[:, :end], tokens.device
        mask = None if bool(filled.all()) else filled[:, None, None].to(device)
        inputs = {
            "input_ids": tokens[:, None],
            "position_ids": positions[:, None].to(device),
            "pixel_values": self._no_pixels,
        }
        self.logits = self._model.predict(inputs, mask, self._cache)


def split_reply(vocabulary: Vocabulary, reply: Sequence[int]) -> list[list[int] | npt.NDArray[np.int64]]:
    """Split a reply into its parts, in order: text as ids, images as codes (h, w)."""
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
