"""Convert a dataset that UniToken's or Lumina-mGPT's own tools tokenized into one of ours.

The reference leaves a `record.json`, a list of {"file": pickle, "len": tokens, "id": ...}, and a pickle for
each item: {"token": [...], "label": [...], "id": ..., "raw_image": [paths]}; Lumina-mGPT's have no
`raw_image`. The list is an input like any other: it is cut into chunks, the work continues after a stop, and
rejects are named by their place in it. Relative names of pickles and images start at the current folder, as
in the reference's trainer.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unitoken.codec.conversations import ItemError, brief, short_name
from unitoken.codec.sequence import check_length
from unitoken.codec.text import load_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.dataset import images
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.manifest import UNKNOWN, VisionTokenizer
from unitoken.dataset.record import IGNORED, Record, spans_of, token_type
from unitoken.dataset.vocabulary import Vocabulary, image_code_name
from unitoken.tokenize.checks.verify_records import MIGRATED, WITHOUT_IMAGES, crop_latents
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.executors.progress import progress_of, show_progress
from unitoken.tokenize.job import Chunk, Job, JobFile
from unitoken.tokenize.output import Output
from unitoken.tokenize.pipeline.item import Place, Rejects, Sample, Size, SourceItem
from unitoken.tokenize.pipeline.tokenizer import check_readable, read_items
from unitoken.tokenize.pipeline.writer import write_chunk_files
from unitoken.tokenize.plain_pickle import load_plain, read_pickle
from unitoken.tokenize.prepare import begin_job, check_output, cut_once
from unitoken.tokenize.sources.pictures import MAX_ITEM_BYTES, PictureReader
from unitoken.tokenize.sources.reader import find_files

DOWNSAMPLING = 16  # pixels a latent of Chameleon's image tokenizer, the only one that the reference has

Tokens = npt.NDArray[np.int64]


def migrate(record: Path, out: str, settings: TokenizeConfig, without_images: bool = False) -> None:
    """Write the chunks that are missing in `out`, without the merge.

    Args:
        record: the reference's `record.json`.
        out: path or URL of the dataset to make.
        settings: what the reference ran with.
        without_images: leave the originals out. Such a dataset trains with `data.continuous: none` alone.

    Raises:
        ConfigError: settings, record or output folder do not fit.
        StoreError: the output can not be written.
    """
    job = _prepare(record, out, settings, WITHOUT_IMAGES if without_images else MIGRATED)
    migration = Migration(job)
    with show_progress(progress_of(job, job.chunks())) as bar:

        def report(finished: int, rejected: int) -> None:
            bar.advance(finished, rejected)
            bar.show()

        for chunk in job.missing():
            migration.write_chunk(chunk, report)


def _prepare(record: Path, out: str, settings: TokenizeConfig, adapter: str) -> Job:
    """As `prepare`, but what is known of the reference takes the place of an image tokenizer's weights."""
    output = Output(out)
    check_output(output)
    files = find_files([str(record)])
    ids = load_tokenizer(settings.tokenizer).get_vocab()
    codes = next(code for code in range(len(ids) + 1) if image_code_name(code) not in ids)
    if not codes:
        raise ConfigError(
            f"tokenizer: {settings.tokenizer}: expected the tokenizer of the dataset, "
            "found no image codes in it"
        )
    vocabulary = Vocabulary.from_tokens(ids, codes)
    input = cut_once(output, files, settings.chunk_size)
    # Nothing in the reference's files names the weights: "unknown" differs from every fingerprint, so that a
    # mixture with other datasets is reported.
    vision = VisionTokenizer(
        kind="chameleon",
        weights=UNKNOWN,
        codebook_size=codes,
        downsampling=DOWNSAMPLING,
        precision=settings.vision.precision,
    )
    file = JobFile(
        source=input.fingerprint,
        vocabulary=vocabulary.fingerprint,
        vision=vision,
        adapter=adapter,
        compat="unitoken",
        **settings.model_dump(include=set(JobFile.model_fields) - {"vision", "adapter", "compat"}),
    )
    return begin_job(output, file, input, vocabulary, settings)


@dataclass(frozen=True, slots=True)
class MigratedItem:
    """An item of the reference: the content of its pickle and, once it is checked, the record made of it."""

    place: Place
    fields: dict[str, Any]
    record: Record | None = None


class Migration:
    """Writes the chunks of a prepared migration."""

    def __init__(self, job: Job) -> None:
        config, file = job.config, job.file
        self._job, self._vocabulary = job, job.vocabulary()
        self._with_images = file.adapter == MIGRATED
        self._pictures = PictureReader(config.allow_http, config.allow_private, config.timeout_seconds)
        self._sizes = crop_latents(file.crop, file.target_size, DOWNSAMPLING)

    def write_chunk(self, chunk: Chunk, report: Callable[[int, int], None]) -> None:
        """Write and publish one chunk.

        Args:
            chunk: the chunk.
            report: called with (items finished, of them rejected) since the last call.
        """
        rejects = Rejects()
        items = read_items(self._job.input, chunk)
        opened = rejects.apply("source", self.open_pickle, items)
        assembled = rejects.apply("sequence", self.make_record, opened)
        samples = rejects.apply("image", self.add_images, assembled)
        with self._job.output.chunk(chunk.name) as folder:
            write_chunk_files(samples, rejects, folder.path, self._vocabulary, report)
            folder.publish()
        report(len(rejects.lines), len(rejects.lines))

    # --- the stages of one item; each raises ItemError for an item that can not be used ---

    def open_pickle(self, item: SourceItem) -> MigratedItem:
        """Read the pickle that an entry of `record.json` names."""
        entry = check_readable(item).value
        if not isinstance(entry, dict) or not isinstance(name := entry.get("file"), str):
            raise ItemError(
                f'bad record: expected {{"file": ..., "len": ..., "id": ...}}, found {brief(entry)}'
            )
        fields = load_plain(read_pickle(Path(name)), name)
        if not isinstance(fields, dict) or not isinstance(tokens := fields.get("token"), list):
            raise ItemError(
                f"bad pickle: {short_name(name)}: expected a dict with 'token' and 'label', "
                f"found {brief(fields)}"
            )
        if entry.get("len", len(tokens)) != len(tokens):
            raise ItemError(f"length differs: {len(tokens)} tokens, the record says {brief(entry['len'])}")
        return MigratedItem(item.place, fields)

    def make_record(self, item: MigratedItem) -> MigratedItem:
        """Check the tokens, labels and images, and make a record that has no originals yet."""
        tokens, labels = _integers(item.fields, "token"), _integers(item.fields, "label")
        if len(tokens) == 0 or tokens.min() < 0 or tokens.max() >= self._vocabulary.size:
            raise ItemError(
                f"bad tokens: expected some from 0 to {self._vocabulary.size - 1}, "
                f"found {brief(item.fields['token'])}"
            )
        trained = labels != IGNORED
        if len(labels) != len(tokens) or (labels[trained] != tokens[trained]).any():
            raise ItemError(
                f"bad labels: expected {IGNORED} or the token itself at each of {len(tokens)} places"
            )
        if not trained.any():
            raise ItemError("nothing to train on: all labels are masked")
        check_length(len(tokens), self._job.file.max_tokens)
        record = Record(
            id=item.place.id,
            tokens=tokens.astype(token_type(self._vocabulary.size)),
            target_spans=spans_of(trained),
            image_spans=np.array(list(self._image_spans(tokens)), np.uint32).reshape(-1, 4),
            images=(),
        )
        return replace(item, record=record)

    def _image_spans(self, tokens: Tokens) -> Iterable[tuple[int, int, int, int]]:
        """Yield each image: first token, end, height and width in latents.

        An image reaches from a start token to the next end token; a text may have forged either, which makes
        no image.
        """
        starts = np.flatnonzero(tokens == self._vocabulary.image_start)
        ends = np.flatnonzero(tokens == self._vocabulary.image_end)
        if len(starts) != len(ends):
            raise ItemError(f"broken image: {len(starts)} starts and {len(ends)} ends of an image")
        for start, last in zip(starts.tolist(), ends.tolist(), strict=True):
            try:
                height, width = self._vocabulary.image_codes(tokens[start : last + 1]).shape
            except (ValueError, IndexError) as error:
                raise ItemError(f"broken image: at token {start}: {error}") from None
            if (height, width) not in self._sizes:
                raise ItemError(
                    f"image of another size: {height} x {width} latents, "
                    "which target_size and crop do not make"
                )
            yield start, last + 1, height, width

    def add_images(self, item: MigratedItem) -> Sample:
        """Add the originals to the record, or empty ones to a dataset without images."""
        assert item.record is not None
        count = len(item.record.image_spans)
        if self._with_images:
            originals, sizes = self._read_originals(item.fields, count)
        else:
            originals, sizes = (b"",) * count, ((0, 0),) * count
        return Sample(item.place, replace(item.record, images=originals), sizes)

    def _read_originals(
        self, fields: dict[str, Any], count: int
    ) -> tuple[tuple[bytes, ...], tuple[Size, ...]]:
        """Return the bytes and the sizes of an item's images."""
        names = fields.get("raw_image") or []
        if not isinstance(names, list):
            names = [names]  # the reference's tokenizer takes a string, too
        if len(names) != count or not all(isinstance(name, str) for name in names):
            raise ItemError(
                f"no originals: {count} images in the tokens, 'raw_image' is {brief(fields.get('raw_image'))}"
            )
        originals: list[bytes] = []
        sizes: list[Size] = []
        for name in names:
            data = self._pictures.read(".", name, MAX_ITEM_BYTES - sum(map(len, originals)))
            try:
                with images.decoded(data, compat=True) as image:
                    sizes.append(image.size)
            except ImageError as error:
                raise ItemError(f"unusable image: {short_name(name)}: {error}") from None
            originals.append(data)
        return tuple(originals), tuple(sizes)


def _integers(fields: dict[str, Any], name: str) -> Tokens:
    """Return a list of whole numbers as an array.

    `array` accepts nothing else; numpy would follow lists in lists, which may hold themselves.
    """
    try:
        return np.array(array("q", fields.get(name) or []), np.int64)
    except (TypeError, ValueError, OverflowError):
        raise ItemError(
            f"bad {name}s: expected a list of whole numbers, found {brief(fields.get(name))}"
        ) from None
