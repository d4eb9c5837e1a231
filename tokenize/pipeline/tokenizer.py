"""The stages that make tokens of a chunk's items: source, adapter, conversation, image and sequence.

Each is a method of `Tokenizer` for one item. Between image and sequence the image tokenizer encodes the
pictures, in batches over several items (concurrency.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

from unitoken.codec.conversations import ItemError, item_id, parse, refuse_empty, short_name
from unitoken.codec.image_tokenizer.encoder import load_vision
from unitoken.codec.sequence import assemble, check_length
from unitoken.codec.text import TextEncoder, load_tokenizer
from unitoken.dataset import images
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.vocabulary import LATENTS_PER_GRID_UNIT
from unitoken.storage.store import is_url, split
from unitoken.tokenize.job import Chunk, Job
from unitoken.tokenize.pipeline.item import Item, Picture, Place, Rejects, Sample, SourceItem
from unitoken.tokenize.sources import reader
from unitoken.tokenize.sources.adapters import find_adapter, prepends_system
from unitoken.tokenize.sources.pictures import MAX_ITEM_BYTES, PictureReader

MAX_THREADS = 8  # that open pictures, where the settings name no number


class Tokenizer:
    """What a worker loads once for all its chunks, and the stages that use it.

    Args:
        job: the run; its settings and vocabulary.
        device: where the image tokenizer computes, `cpu` or `cuda`.
    """

    def __init__(self, job: Job, device: str) -> None:
        config = job.config
        self.job, self._config = job, config
        self._compat = config.compat is not None
        self.vocabulary = job.vocabulary()
        self._text = TextEncoder(load_tokenizer(config.tokenizer), self.vocabulary, self._compat)
        self.vision = load_vision(config.vision, device)
        self._adapter = find_adapter(config.adapter)
        self._prepends_system = prepends_system(config, self.vocabulary)
        self._pictures = PictureReader(config.allow_http, config.allow_private, config.timeout_seconds)
        self.threads = config.threads or min(MAX_THREADS, os.cpu_count() or 1)
        unit = self.vision.downsampling * LATENTS_PER_GRID_UNIT
        self._crops = images.allowed_crops(config.crop, config.target_size, unit)

    def conversations(self, chunk: Chunk, rejects: Rejects) -> Iterator[Item]:
        """Read a chunk's items and parse their conversations."""
        return self.parsed(read_items(self.job.input, chunk), rejects)

    def parsed(self, items: Iterable[SourceItem], rejects: Rejects) -> Iterator[Item]:
        """Adapt items and parse their conversations."""
        readable = rejects.apply("source", check_readable, items)
        adapted = rejects.apply("adapter", self.adapt, readable)
        return rejects.apply("conversation", self.parse, adapted)

    def with_pictures(self, items: Iterable[Item], rejects: Rejects) -> Iterator[Item]:
        """Fetch, decode and crop the items' pictures."""
        return rejects.apply("image", self.open_pictures, items)

    def samples(self, items: Iterable[Item], rejects: Rejects) -> Iterator[Sample]:
        """Make records of items whose pictures have codes."""
        return rejects.apply("sequence", self.assemble, items)

    # --- the stages of one item; each raises ItemError for an item that can not be used ---

    def adapt(self, item: SourceItem) -> SourceItem:
        """Bring an item into the standard form."""
        return replace(item, value=self._adapter(item.value))  # type: ignore[arg-type]

    def parse(self, item: SourceItem) -> Item:
        """Check an item in the standard form."""
        conversation = parse(item.value, item.place.id, self._prepends_system)
        if not self._compat:
            refuse_empty(conversation)
        return Item(item.place, conversation, item.folder)

    def open_pictures(self, item: Item) -> Item:
        """Fetch, decode and crop an item's pictures. One unusable picture rejects the item."""
        pictures: list[Picture] = []
        remaining_bytes = MAX_ITEM_BYTES
        tokens = 0
        for number, source in enumerate(item.conversation.images):
            data = self._pictures.read(item.folder, source, remaining_bytes)
            remaining_bytes -= len(data)
            try:
                picture = self._crop(data, item.conversation.id, number)
            except ImageError as error:
                raise ItemError(f"unusable image: {short_name(source)}: {error}") from None
            height, width = picture.pixels.shape[:2]
            latent = self.vision.downsampling
            tokens += self.vocabulary.image.count(height // latent, width // latent)
            check_length(tokens, self._config.max_tokens, "tokens in its images alone")
            pictures.append(picture)
        return replace(item, pictures=tuple(pictures))

    def _crop(self, data: bytes, item_id: str, number: int) -> Picture:
        with images.decoded(data, self._compat) as image:
            crop = images.choose_crop(image.size, self._crops)
            chance = None
            if self._config.crop_position == "random":
                chance = images.crop_generator(self._config.seed, item_id, number)
            return Picture(data, image.size, images.tokenizer_pixels(image, crop, chance))

    def assemble(self, item: Item) -> Sample:
        """Make the record of an item whose pictures have codes."""
        codes = [picture.codes for picture in item.pictures if picture.codes is not None]
        originals = [picture.original for picture in item.pictures]
        record = assemble(item.conversation, codes, originals, self._text, self.vocabulary)
        check_length(len(record.tokens), self._config.max_tokens)
        sizes = tuple(picture.size for picture in item.pictures)
        return Sample(item.place, record, sizes, item.conversation.turns_left_out)


def read_items(input: reader.Input, chunk: Chunk) -> Iterator[SourceItem]:
    """Read the items of a chunk, in the order of the input."""
    for piece, positions in chunk.parts:
        folder = reader.folder_of(input, input.pieces[piece].file)
        for item in reader.read_piece(input, piece, positions):
            yield SourceItem(_place_of(input, item), item.value, folder)


def _place_of(input: reader.Input, item: reader.RawItem) -> Place:
    name = reader.item_name(input, item)
    with contextlib.suppress(ItemError):  # a bad id, which a later stage rejects
        name = item_id(item.value, name)
    return Place(item.piece, base_name(input.files[item.file].name), item.position, name)


def base_name(name: str) -> str:
    """Return a file's name without its folder, on which no byte may depend, and a URL's signature."""
    return split(name.partition("?")[0] if is_url(name) else name)[1]


def check_readable(item: SourceItem) -> SourceItem:
    """Raise the ItemError that the source left in place of an item that it could not read."""
    if isinstance(item.value, ItemError):
        raise item.value
    return item


def group_items(items: Iterable[Item], max_items: int, max_images: int) -> Iterator[list[Item]]:
    """Cut items into groups of `max_items`; a group with at least `max_images` images ends sooner."""
    group: list[Item] = []
    pictures = 0
    for item in items:
        group.append(item)
        pictures += len(item.conversation.images)
        if len(group) == max_items or pictures >= max_images:
            yield group
            group, pictures = [], 0
    if group:
        yield group
