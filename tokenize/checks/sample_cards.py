"""A sample as HTML: its text, what is trained on, and each picture beside what its codes decode to."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from unitoken.codec.image_tokenizer.encoder import VisionCodec, load_vision
from unitoken.codec.image_tokenizer.files import check_decoder, find_image_tokenizer
from unitoken.codec.passages import describe
from unitoken.common.errors import ConfigError
from unitoken.dataset import images
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.kinds import KINDS, Kind
from unitoken.dataset.manifest import UNKNOWN, Manifest
from unitoken.dataset.record import Record
from unitoken.tokenize.checks.preview import Dataset
from unitoken.tokenize.checks.sample_table import SampleTable
from unitoken.tokenize.config import TokenizeConfig

GAP = 8  # pixels on the page between original and decoded picture
SHOWN_HEIGHT = 192  # smaller pictures are enlarged by a whole factor, up to this height
SHOWN_LETTERS = 4000  # of a passage; a page of long documents would otherwise take many megabytes
KIND_NAMES: dict[Kind, str] = {
    "text": "text only",
    "understanding": "reads pictures",
    "generation": "draws pictures",
}
PIXELS_AT_ONCE = 1 << 18  # that are decoded together
STYLE = """
.sample { content-visibility: auto; contain-intrinsic-size: auto 240px; margin-top: 14px }
.sample h2 { font-size: 15px; margin: 0 0 8px; overflow-wrap: anywhere }
.sample h2 small { color: var(--soft); font-weight: normal; font-size: 13px; margin-left: 6px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 15px }
.trained { color: var(--good) } .special { opacity: .6; font-size: 12px }
figure { margin: 10px 0 14px }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; white-space: normal }
figure img { display: block; image-rendering: pixelated }
figure.trained img { outline: 3px solid var(--good); outline-offset: 2px }
.cut, .unreadable { color: var(--bad); font-size: 13px }
"""


Picture = tuple[Record, int]  # an image of a record, by its number there


class Pair(NamedTuple):
    """An original beside its decoded picture, or the decoded picture alone."""

    pixels: npt.NDArray[np.uint8]  # (height, width, 4); the gap is transparent
    caption: str

    def png(self) -> bytes:
        """Encode the picture."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        return buffer.getvalue()


class Figure(NamedTuple):
    """How a page names a picture."""

    url: str
    width: int  # in its own pixels
    height: int
    caption: str


def load_codec(manifest: Manifest, settings: TokenizeConfig, out: str) -> VisionCodec | None:
    """Load the image tokenizer that made a dataset; None for a dataset without pictures.

    Raises:
        ConfigError: the settings name another one, or one without a decoder.
    """
    import torch

    if not manifest.images:
        return None
    given, expected = find_image_tokenizer(settings.vision), manifest.vision
    if expected.weights not in (UNKNOWN, given.fingerprint) or expected.codebook_size != given.codebook_size:
        raise ConfigError(
            f"vision.weights: {settings.vision.weights}: its fingerprint is {given.fingerprint} "
            f"({given.codebook_size} codes), {out} was made with {expected.weights} "
            f"({expected.codebook_size} codes)"
        )
    check_decoder(given, settings.vision.weights, "vision.weights")
    return load_vision(settings.vision, "cuda" if torch.cuda.is_available() else "cpu")


def codes_of(record: Record, dataset: Dataset, number: int) -> npt.NDArray[np.int64]:
    """Return the codes of a record's image, (height, width) in latents."""
    start, end = record.image_spans[number, :2].tolist()
    return dataset.vocabulary.image_codes(record.tokens[start:end])


def decode_pairs(pictures: Sequence[Picture], dataset: Dataset, codec: VisionCodec) -> list[Pair]:
    """Return pictures as they were cropped for the image tokenizer, and as decoded from their codes."""
    codes = [codes_of(record, dataset, number) for record, number in pictures]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for place, of_picture in enumerate(codes):
        by_shape.setdefault(of_picture.shape, []).append(place)
    pairs: dict[int, Pair] = {}
    for shape, places in by_shape.items():
        at_once = max(1, PIXELS_AT_ONCE // (shape[0] * shape[1] * codec.downsampling**2))
        for start in range(0, len(places), at_once):
            some = places[start : start + at_once]
            decoded = codec.decode(np.stack([codes[place] for place in some]))
            for place, pixels in zip(some, decoded, strict=True):
                pairs[place] = _pair(*pictures[place], dataset.manifest, pixels)
    return [pairs[place] for place in range(len(pictures))]


def _pair(record: Record, number: int, manifest: Manifest, decoded: npt.NDArray[np.uint8]) -> Pair:
    height, width = decoded.shape[:2]
    codes = f"from its {record.image_spans[number, 2:].prod()} codes"
    data = record.images[number]
    if not len(data):
        return Pair(_opaque(decoded), f"{codes}; the dataset has no originals")
    chance = None
    if manifest.crop_position == "random":
        chance = images.crop_generator(manifest.seed, record.id, number)
    try:
        with images.decoded(data, compat=manifest.compat is not None) as original:
            size = original.size
            cropped = images.tokenizer_pixels(original, (width, height), chance)
    except ImageError as error:
        return Pair(_opaque(decoded), f"{codes}; the original can not be read: {error}")
    gap = np.zeros((height, gap_width(height), 4), np.uint8)
    return Pair(
        np.hstack([_opaque(cropped), gap, _opaque(decoded)]),
        f"{size[0]} x {size[1]}, cut to {width} x {height}  |  {codes}",
    )


def gap_width(height: int) -> int:
    """Return the pixels between two pictures of a height, before they are enlarged."""
    return max(1, GAP // _scale(height))


def _scale(height: int) -> int:
    return max(1, SHOWN_HEIGHT // max(1, height))


def _opaque(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Add a full alpha channel to (height, width, 3)."""
    return np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])


def sample_card(
    number: int, record: Record, dataset: Dataset, table: SampleTable, figures: Sequence[Figure]
) -> str:
    """Return the HTML of a sample. The attributes of its element are what the page's filters look at."""
    pictures = iter(figures)
    parts = []
    for kind, text, trained in describe(record, dataset.vocabulary, dataset.tokenizer):
        style = f"{kind} trained" if trained else kind
        if kind == "image":
            parts.append(_figure(next(pictures), style, text))
        else:
            parts.append(f'<span class="{style}">{_shortened(text)}</span>')
    kind_name, source = KINDS[table.kinds[number]], int(table.sources[number])
    about = [
        f"{len(record.tokens):,} tokens, {table.target_tokens[number]:,} trained on",
        KIND_NAMES[kind_name],
        *table.source_names[source : source + 1],
    ]
    name = html.escape(record.id)
    attributes = (
        f'data-number="{number}" data-kind="{kind_name}" data-tokens="{len(record.tokens)}" '
        f'data-source="{source}" data-id="{name}"'
    )
    head = f"<h2>{name} <small>{html.escape(' · '.join(about))}</small></h2>"
    return f'<section class="sample" {attributes}>{head}<div class="text">{"".join(parts)}</div></section>'


def _figure(figure: Figure, style: str, text: str) -> str:
    scale = _scale(figure.height)
    size = f'width="{figure.width * scale}" height="{figure.height * scale}"'
    picture = f'<img src="{figure.url}" {size} loading="lazy" alt="{html.escape(text)}">'
    caption = f"<figcaption>{html.escape(figure.caption)}</figcaption>"
    return f'<figure class="{style}">{picture}{caption}</figure>'


def _shortened(text: str) -> str:
    shown = html.escape(text[:SHOWN_LETTERS])
    if len(text) <= SHOWN_LETTERS:
        return shown
    return f'{shown} <span class="cut">[and {len(text) - SHOWN_LETTERS:,} more letters]</span>'
