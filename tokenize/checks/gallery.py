"""Show samples as a page: their text, and each picture beside the picture that its codes decode to.

What is lost between the two can not be learned by any training.

    out/index.html    the samples in order, what is trained on in green
    out/0003-1.png    image 1 of sample 3: the original as it was cropped for the image tokenizer | decoded
"""

from __future__ import annotations

import html
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from unitoken.codec.image_tokenizer.encoder import VisionCodec, load_vision
from unitoken.codec.image_tokenizer.files import check_decoder, find_image_tokenizer
from unitoken.codec.passages import describe
from unitoken.common.cli import report
from unitoken.common.errors import ConfigError
from unitoken.common.files import write_aside
from unitoken.dataset import images
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.manifest import UNKNOWN, Manifest
from unitoken.dataset.record import Record
from unitoken.tokenize.checks.preview import Dataset, open_dataset, read_records
from unitoken.tokenize.config import TokenizeConfig

GAP = 8  # white pixels between original and decoded picture
SHOWN_HEIGHT = 256  # smaller pictures are enlarged by a whole factor, up to this height
STYLE = """
body { margin: 0 auto; max-width: 1120px; padding: 32px 24px; color: #1c2330 }
body { font: 15px/1.6 system-ui, "DejaVu Sans", sans-serif }
h1 { font-size: 22px } h2 { font-size: 15px; margin: 0 0 8px }
h2 small, figcaption, p { color: #667085; font-weight: normal }
section { border: 1px solid #e4e7ec; border-radius: 10px; padding: 16px 20px; margin-top: 16px }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.trained { color: #14804a } .special { opacity: .55; font-size: 12px }
figure { margin: 10px 0 14px } figcaption { font-size: 13px; white-space: normal }
figure.trained img { outline: 3px solid #14804a; outline-offset: 2px }
img { max-width: 100%; image-rendering: pixelated }
"""


class Pair(NamedTuple):
    """An original beside its decoded picture, or the decoded picture alone."""

    pixels: npt.NDArray[np.uint8]
    caption: str


def write_page(out: str, settings: TokenizeConfig, count: int, folder: Path) -> None:
    """Write a page with the first samples of a dataset.

    Args:
        out: path or URL of the dataset.
        settings: name its text tokenizer and its image tokenizer.
        count: how many samples.
        folder: where to write.

    Raises:
        ConfigError: no dataset, another tokenizer than its own, or the folder can not be written.
    """
    dataset = open_dataset(out, settings.tokenizer)
    codec = _load_codec(dataset.manifest, settings, out)
    sections = []
    for number, record in enumerate(itertools.islice(read_records(dataset.store), count)):
        pairs = list(_decoded_pairs(record, dataset, codec))
        names = [f"{number:04d}-{image}.png" for image in range(len(pairs))]
        for name, pair in zip(names, pairs, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pair.pixels).save(buffer, "PNG")
            _write_file(folder, name, buffer.getvalue())
        sections.append(_section(record, dataset, names, pairs))
    _write_file(folder, "index.html", _page(out, dataset.manifest, sections).encode())
    report(f"{folder / 'index.html'}: {len(sections)} samples")


def _load_codec(manifest: Manifest, settings: TokenizeConfig, out: str) -> VisionCodec:
    import torch

    given, expected = find_image_tokenizer(settings.vision), manifest.vision
    if expected.weights not in (UNKNOWN, given.fingerprint) or expected.codebook_size != given.codebook_size:
        raise ConfigError(
            f"vision.weights: {settings.vision.weights}: its fingerprint is {given.fingerprint} "
            f"({given.codebook_size} codes), {out} was made with {expected.weights} "
            f"({expected.codebook_size} codes)"
        )
    check_decoder(given, settings.vision.weights, "vision.weights")
    return load_vision(settings.vision, "cuda" if torch.cuda.is_available() else "cpu")


def _decoded_pairs(record: Record, dataset: Dataset, codec: VisionCodec) -> Iterator[Pair]:
    """Yield the pictures of a record, in order."""
    manifest = dataset.manifest
    for number, ((start, end, *_), data) in enumerate(zip(record.image_spans, record.images, strict=True)):
        codes = dataset.vocabulary.image_codes(record.tokens[start:end])
        decoded = codec.decode(codes[None])[0]
        height, width = decoded.shape[:2]
        if not len(data):
            yield Pair(decoded, f"from its {codes.size} codes; the dataset has no originals")
            continue
        chance = None
        if manifest.crop_position == "random":
            chance = images.crop_generator(manifest.seed, record.id, number)
        try:
            with images.decoded(data, compat=manifest.compat is not None) as original:
                size = original.size
                cropped = images.tokenizer_pixels(original, (width, height), chance)
        except ImageError as error:
            yield Pair(decoded, f"from its {codes.size} codes; the original can not be read: {error}")
            continue
        gap = np.full((height, GAP, 3), 255, np.uint8)
        yield Pair(
            np.hstack([cropped, gap, decoded]),
            f"{size[0]} x {size[1]}, cut to {width} x {height}  |  from its {codes.size} codes",
        )


def _section(record: Record, dataset: Dataset, names: list[str], pairs: list[Pair]) -> str:
    """Return the HTML of a sample."""
    targets = int((record.labels() >= 0).sum())
    figures = iter(zip(names, pairs, strict=True))
    parts = []
    for kind, text, trained in describe(record, dataset.vocabulary, dataset.tokenizer):
        style = f"{kind} trained" if trained else kind
        if kind == "image":
            name, pair = next(figures)
            height, width = pair.pixels.shape[:2]
            picture = f'<img src="{name}" width="{width * max(1, SHOWN_HEIGHT // height)}" alt="{text}">'
            parts.append(f'<figure class="{style}">{picture}<figcaption>{pair.caption}</figcaption></figure>')
        else:
            parts.append(f'<span class="{style}">{html.escape(text)}</span>')
    head = f"{html.escape(record.id)} <small>{len(record.tokens):,} tokens, {targets:,} trained on</small>"
    return f'<section><h2>{head}</h2><div class="text">{"".join(parts)}</div></section>'


def _page(out: str, manifest: Manifest, sections: list[str]) -> str:
    name, vision = html.escape(out), manifest.vision
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    about = (
        f"the first {len(sections)} of {manifest.samples:,} samples; "
        f"{vision.kind} {vision.weights}, {vision.precision}"
    )
    legend = (
        "Each picture: as it was cropped | decoded from its codes. "
        '<span class="trained">Green</span> is trained on.'
    )
    return f"{head}<h1>{name}</h1><p>{about}<br>{legend}</p>{''.join(sections)}</html>\n"


def _write_file(folder: Path, name: str, data: bytes) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / name, data)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write there: {error.strerror}") from None
