"""Show samples as a page: their text, and each picture beside the picture that its codes decode to.

What is lost between the two can not be learned by any training.

    out/index.html    the dataset in figures, then samples from all over it, what is trained on in green
    out/0003-1.png    image 1 of sample 3: the original as it was cropped for the image tokenizer | decoded
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unitoken.codec.image_tokenizer.encoder import VisionCodec
from unitoken.common.cli import notify, report
from unitoken.common.errors import ConfigError
from unitoken.common.files import write_aside
from unitoken.common.html_page import html_page
from unitoken.dataset.record import Record
from unitoken.tokenize.checks import dataset_figures, sample_cards, sample_filters
from unitoken.tokenize.checks.dataset_figures import CodeUsage, dataset_sections, dataset_tiles
from unitoken.tokenize.checks.preview import Dataset, open_dataset
from unitoken.tokenize.checks.sample_cards import Figure, decode_pairs, load_codec, sample_card
from unitoken.tokenize.checks.sample_filters import filter_form
from unitoken.tokenize.checks.sample_reader import SampleReader, spread_numbers
from unitoken.tokenize.checks.sample_table import Filters, SampleTable
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.finished_chunks import map_in_threads
from unitoken.tokenize.rejects import group_rejects

STYLE = dataset_figures.STYLE + sample_cards.STYLE + sample_filters.STYLE
LEGEND = (
    "Each picture: as it was cropped | decoded from its codes. "
    '<span class="trained">Green</span> is trained on.'
)
SAMPLES_AT_ONCE = 64
PROGRESS_SECONDS = 10.0


def write_page(out: str, settings: TokenizeConfig, count: int, folder: Path) -> None:
    """Write a page with a dataset in figures and with samples from all over it.

    Args:
        out: path or URL of the dataset.
        settings: name its text tokenizer and its image tokenizer.
        count: how many samples.
        folder: where to write.

    Raises:
        ConfigError: no dataset, another tokenizer than its own, or the folder can not be written.
    """
    dataset = open_dataset(out, settings.tokenizer)
    codec = load_codec(dataset.manifest, settings, out)
    reader = SampleReader(dataset.store)
    usage = CodeUsage(np.zeros(dataset.manifest.vision.codebook_size, np.int64))
    cards: list[str] = []
    with SampleTable(dataset.store, reader.entries) as table:
        for numbers, records in _read_spread(reader, count):
            usage.add(records, dataset)
            shown = _write_pictures(numbers, records, dataset, codec, folder)
            for number, record, figures in zip(numbers, records, shown, strict=True):
                cards.append(sample_card(number, record, dataset, table, figures))
    usage.is_whole = len(cards) == len(reader)
    page = _page(out, dataset, table, dataset_sections(table, usage, group_rejects(out)), cards)
    _write_file(folder, "index.html", page.encode())
    report(f"{folder / 'index.html'}: {len(cards)} samples")


def _read_spread(reader: SampleReader, count: int) -> Iterator[tuple[list[int], list[Record]]]:
    """Yield samples from all over the dataset, some at once, with their numbers; print progress."""
    numbers = spread_numbers(len(reader), count)
    last_notice = time.monotonic()
    for start in range(0, len(numbers), SAMPLES_AT_ONCE):
        some = numbers[start : start + SAMPLES_AT_ONCE]
        yield some, list(map_in_threads(reader.read, some))
        if time.monotonic() - last_notice > PROGRESS_SECONDS:
            last_notice = time.monotonic()
            notify(f"preview: {start + len(some):,} of {len(numbers):,} samples")


def _write_pictures(
    numbers: list[int], records: list[Record], dataset: Dataset, codec: VisionCodec | None, folder: Path
) -> list[list[Figure]]:
    """Write the pictures of samples beside the page; return those of each sample."""
    if codec is None:
        return [[] for _ in records]
    places = [
        (place, image) for place, record in enumerate(records) for image in range(len(record.image_spans))
    ]
    pairs = decode_pairs([(records[place], image) for place, image in places], dataset, codec)
    figures: list[list[Figure]] = [[] for _ in records]
    for (place, image), pair in zip(places, pairs, strict=True):
        name = f"{numbers[place]:04d}-{image}.png"
        _write_file(folder, name, pair.png())
        height, width = pair.pixels.shape[:2]
        figures[place].append(Figure(name, width, height, pair.caption))
    return figures


def _page(out: str, dataset: Dataset, table: SampleTable, figures: str, cards: list[str]) -> str:
    manifest = dataset.manifest
    chosen = "all of them" if len(cards) == manifest.samples else "chosen from all over the dataset"
    body = f"""<h1>{html.escape(out)}</h1><p>{about(dataset)}</p>
<p><a href="#samples">Samples</a> are below the figures.</p>{dataset_tiles(manifest, table)}{figures}
<h2 class="samples" id="samples">{len(cards):,} samples, {chosen}</h2>
<p>{LEGEND}</p>
{filter_form(table, Filters(), "", button=False)}
{"".join(cards)}"""
    return html_page(out, body, STYLE, sample_filters.SCRIPT, files=True)


def about(dataset: Dataset) -> str:
    """Return what a dataset was made with, as HTML."""
    vision = dataset.manifest.vision
    crop = f"crop {dataset.manifest.crop}, target size {dataset.manifest.target_size}"
    return html.escape(f"image tokenizer {vision.kind} {vision.weights}, {vision.precision}; {crop}")


def _write_file(folder: Path, name: str, data: bytes) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / name, data)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write there: {error.strerror}") from None
