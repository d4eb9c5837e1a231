"""Replies of a trained model: text and images, token by token, for many prompts at once.

model = load_model(config.model, config.save.folder)                     # the run's last checkpoint
replies = generate(model, vocabulary, prompts, Sampling(guidance=4.0), sizes=[(32, 32)])

Prompts are records (`Dialogue.encode`), so their images are laid out as in training. Prompts of different
lengths go through the model together, each at a position of its own, and where a reply is over, the next
prompt takes its row. With guidance each prompt has a second row, which gets its null prompt and, of the
reply, only the images, from the first image on; both rows take the same pass.

What an image's size decides (its rows' ends, its own end) is read together with the code before. So a guided
drawing of h x w codes takes h * w passes, and waits for the device once, at its end. Speculative decoding
(speculative.py) takes fewer passes, and waits after each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
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
from unitoken.generation.grammar import Grammar
from unitoken.streaming_data.reading.batch import Batch, unpack
from unitoken.streaming_data.reading.collate import Collate, featured_images, insert_features
from unitoken.streaming_data.reading.null_prompts import without_text
from unitoken.train.checkpoint.integrity import check_checkpoint
from unitoken.train.checkpoint.loading import load_weights
from unitoken.train.checkpoint.locations import find_origin, is_checkpoint
from unitoken.train.checkpoint.metadata import read_sizes
from unitoken.train.checkpoint.tensors import check_shapes, drop_tied_head, fit_norms, parameter_shapes
from unitoken.train.config import ModelConfig
from unitoken.train.generation.open_reply import LATEST, OpenReply
from unitoken.train.generation.rows import CachedRows
from unitoken.train.generation.sampling import (
    RandomNumbers,
    Sampling,
    allowed_logits,
    choose_tokens,
    probabilities,
)
from unitoken.train.generation.speculative import WINDOW, CodeGuesses
from unitoken.train.model.unitoken import UniToken, build_model
from unitoken.train.run import run_folder

DEFAULT_SAMPLING = Sampling()
Watch = Callable[[int, Callable[[], list[int]]], None]
"""Gets the place of a prompt, and a function that waits for the device and returns its reply so far."""


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
        """Collate one prompt per row, padded at the right.

        Args:
            prompts: one per row.
            lengths: the `length` of each prompt.
            vocabulary: names the separator and the newline.
        """
        collate = Collate(
            max(lengths), self.views, self.continuous, vocabulary.separator, vocabulary.newline, self.compat
        )
        batch = unpack(collate([[prompt] for prompt in prompts]))
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
    """What all replies of one call of `generate` have in common."""

    network: UniToken
    vocabulary: Vocabulary
    collate: PromptCollate
    sampling: Sampling
    broadcast: Callable[[Tensor], Tensor]
    watch: Watch | None

    def collate_prompts(self, prompts: Sequence[Record]) -> Batch:
        """Collate one prompt per row."""
        lengths = [self.collate.length(prompt) for prompt in prompts]
        return self.collate(prompts, lengths, self.vocabulary)


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
    watch: Watch | None = None,
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
        batch: prompts at a time. Each takes 0.5 MB per token of the 7B model in bf16, twice that if guided.
        broadcast: gives the first rank's tokens to all ranks of a sharded model; not the guesses.
        watch: called after each pass for each reply that grew; what it raises ends the call.
    """
    limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    assert sizes or not drawing
    assert min(limits, default=1) > 0
    if not prompts:
        return []
    collate = collate or PromptCollate(_views_of(model))
    grammar = Grammar(vocabulary, sizes, model.output_weight.device)
    lengths = [collate.length(prompt) for prompt in prompts]
    text = [0] * len(prompts) if drawing else limits
    longest = grammar.longest + max(map(sum, zip(lengths, text, strict=True)))
    shared = _Model(model, vocabulary, collate, sampling, broadcast, watch)
    replies = _ReplyBatch(shared, min(batch, len(prompts)), longest)
    begin = functools.partial(_begin_reply, shared, grammar, drawing)
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    number_of = numbers or range(len(prompts))
    replies.run((begin(place, number_of[place], limits[place]), prompts[place]) for place in order)
    return [replies.finished[place] for place in range(len(prompts))]


def _begin_reply(
    model: _Model, grammar: Grammar, drawing: bool, place: int, number: int, limit: int
) -> OpenReply:
    sampling = model.sampling
    return OpenReply(
        place,
        grammar.drawing() if drawing else grammar.turn(limit),
        RandomNumbers(sampling.seed, number, grammar.device),
        model.vocabulary,
        ahead=sampling.temperature > 0 and not sampling.speculative,
    )


class _ReplyBatch:
    """Replies side by side, each in a slot: row s of the model, and row `slots` + s for guidance.

    Args:
        model: what all replies have in common.
        slots: the most replies at a time.
        length: the most tokens of a prompt with its reply.
    """

    def __init__(self, model: _Model, slots: int, length: int) -> None:
        self._model = model
        self._replies: list[OpenReply | None] = [None] * slots
        self._prompts: list[Record | None] = [None] * slots  # whose null prompt was not read so far
        self._rows = CachedRows(model.network, slots, length)
        device = model.network.output_weight.device
        self._latest = torch.zeros(slots, dtype=torch.int64, device=device)  # what each slot chose last
        self._guesses: CodeGuesses | None = None
        self.finished: dict[int, list[int]] = {}  # by the prompt's place

    @property
    def free(self) -> int:
        """The number of slots without a reply."""
        return self._replies.count(None)

    def run(self, waiting: Iterator[tuple[OpenReply, Record]]) -> None:
        """Finish all replies to prompts that wait for a slot."""
        while True:
            some = list(itertools.islice(waiting, self.free))
            if some:
                self.open([reply for reply, _ in some], [prompt for _, prompt in some])
            elif self.free == len(self._replies):
                return
            else:
                self.step()

    def open(self, replies: Sequence[OpenReply], prompts: Sequence[Record]) -> None:
        """Read prompts into free slots, and choose the first token of each reply."""
        slots = [slot for slot, reply in enumerate(self._replies) if reply is None][: len(replies)]
        pairs = list(zip(prompts, replies, strict=True))
        rows, records = slots, [_extended(prompt, reply.queue) for prompt, reply in pairs]
        guides = self._guides(replies)  # drawings, which begin with an image
        if guides:
            rows = rows + self._null_rows(slots)
            records += [_extended(null_prompt(prompt), reply.queue) for prompt, reply in pairs]
        for slot, reply, prompt in zip(slots, replies, prompts, strict=True):
            reply.queue.clear()
            self._replies[slot], self._prompts[slot] = reply, None if guides else prompt
        ids = _window(replies)
        logits = self._rows.open(rows, self._model.collate_prompts(records), ids)
        self._choose(slots, logits[: len(slots)], logits[len(slots) :] if guides else None, ids.start)

    def step(self) -> None:
        """Read one or more tokens in each slot, and choose the next where all that is chosen was read.

        Where codes are guessed, the slots that draw go first, and the others wait.
        """
        if self._model.sampling.speculative:
            replies = {slot: reply for slot, reply in enumerate(self._replies) if reply and reply.draws_codes}
            if replies:
                self._verify_guesses(replies)
                return
        running = [reply for reply in self._replies if reply is not None]
        count = min(len(reply.queue) for reply in running)
        used = [reply is not None for reply in self._replies]
        guides = self._guides(running)
        if guides:
            self._open_null_prompts()
            used += [reply is not None and reply.in_image for reply in self._replies]
        tokens = self._next_tokens(running, count)
        for reply in running:
            del reply.queue[:count]
        ready = [slot for slot, reply in enumerate(self._replies) if reply is not None and not reply.queue]
        ids = _window([reply for reply in running if not reply.queue])
        logits = self._rows.read(torch.cat([tokens, tokens]) if guides else tokens, used, ids)[:, 0]
        self._rows.advance([count * is_used for is_used in used])
        slots = len(self._replies)
        some = slice(None) if len(ready) == slots else ready
        self._choose(ready, logits[:slots][some], logits[slots:][some] if guides else None, ids.start)

    def _verify_guesses(self, replies: dict[int, OpenReply]) -> None:
        """Read guesses of the next codes in some slots, and keep those that are right."""
        sampling, slots = self._model.sampling, list(replies)
        codes = next(iter(replies.values())).plan[0]
        self._guesses = self._guesses or CodeGuesses(len(self._replies), codes)
        guides = self._guides(list(replies.values()))
        if guides:
            self._open_null_prompts()
        for slot, reply in replies.items():
            if not reply.guessed:
                self._guesses.begin(slot, reply)
        counts = [min(WINDOW, reply.codes_left) for reply in replies.values()]
        tokens, columns = self._guesses.tokens(replies, counts, self._latest)
        twice = 2 if guides else 1
        used = [slot in replies for slot in range(len(self._replies))] * twice
        window = slice(codes.first, codes.end)
        logits = self._rows.read(tokens.repeat(twice, 1), used, window, columns.repeat(twice, 1))
        null = logits[len(self._replies) :][slots] if guides else None
        allowed = allowed_logits(codes, logits[slots], null, codes.first, sampling.guidance)
        now = probabilities(allowed, sampling.temperature, sampling.top_k_image)
        read = [0] * len(self._replies)
        final = self._guesses.update(replies, now, counts)
        for (slot, reply), ids in zip(replies.items(), final, strict=True):
            read[slot] = reply.take_codes(ids)
            self._watch_and_finish(slot, reply)
        self._rows.advance(read * twice)

    def _watch_and_finish(self, slot: int, reply: OpenReply) -> None:
        """Show a reply that has grown; free its slot if it is over."""
        if self._model.watch is not None:
            self._model.watch(reply.place, functools.partial(reply.ids, slot))
        if not reply.plan:
            self.finished[reply.place] = reply.ids(slot)
            self._replies[slot] = None

    def _guides(self, replies: Sequence[OpenReply]) -> bool:
        return self._model.sampling.guidance != 1 and any(reply.in_image for reply in replies)

    def _null_rows(self, slots: Sequence[int]) -> list[int]:
        """Return the rows of null prompts; the first image of all makes room for them."""
        if self._rows.count == len(self._replies):
            self._rows.grow(2 * len(self._replies))
        return [len(self._replies) + slot for slot in slots]

    def _open_null_prompts(self) -> None:
        """Read the null prompts of the slots that begin their first image."""
        slots, prompts = [], []
        for slot, (reply, prompt) in enumerate(zip(self._replies, self._prompts, strict=True)):
            if reply is not None and reply.in_image and prompt is not None:
                slots.append(slot)
                prompts.append(null_prompt(prompt))
                self._prompts[slot] = None
        if slots:
            self._rows.open(self._null_rows(slots), self._model.collate_prompts(prompts), slice(0, 1))

    def _next_tokens(self, running: Sequence[OpenReply], count: int) -> Tensor:
        """Return the next tokens (slots, count) of the queues; free slots read what another reads."""
        columns = []
        for column in range(count):
            filler = running[0].queue[column]
            known = [filler if reply is None else reply.queue[column] for reply in self._replies]
            if set(known) == {LATEST}:
                columns.append(self._latest)
            elif len(set(known)) == 1:
                columns.append(torch.full_like(self._latest, filler))
            else:
                ids = torch.tensor(known, device=self._latest.device)
                columns.append(torch.where(ids == LATEST, self._latest, ids))
        return torch.stack(columns, dim=1)

    def _choose(self, slots: Sequence[int], logits: Tensor, null: Tensor | None, first: int) -> None:
        """Choose the next token of some slots by logits (len(slots), W) of the ids from `first` on."""
        replies = [reply for slot in slots if (reply := self._replies[slot]) is not None]
        choices = [reply.plan[0] for reply in replies]
        numbers = [reply.numbers for reply in replies]
        chosen = self._model.broadcast(
            choose_tokens(choices, logits, null, first, self._model.sampling, numbers)
        )
        if len(slots) == len(self._replies):
            self._latest = chosen
        else:
            places = torch.tensor(slots, device=chosen.device)
            self._latest = self._latest.index_copy(0, places, chosen)
        # The one wait for the device: for tokens that decide what follows, of which an image has none.
        branches = any(choice.branches for choice in choices)
        known = chosen.tolist() if branches else [None] * len(slots)
        for slot, reply, token in zip(slots, replies, known, strict=True):
            reply.choose(self._latest, token)
            self._watch_and_finish(slot, reply)


def _window(replies: Sequence[OpenReply]) -> slice:
    """Return the range of ids that holds all that may come next."""
    return slice(min(reply.plan[0].first for reply in replies), max(reply.plan[0].end for reply in replies))


def _extended(prompt: Record, ids: Sequence[int]) -> Record:
    """Return the prompt with the first ids of its reply behind it."""
    tokens = np.concatenate([prompt.tokens, np.array(ids, prompt.tokens.dtype)])
    return dataclasses.replace(prompt, tokens=tokens)


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
