"""A dataset that UniToken's or Lumina-mGPT's own tools tokenized -> one of ours.

The reference leaves a `record.json`, a list of {"file": pickle, "len": tokens, "id": ...}, and a pickle an item:
{"token": [...], "label": [...], "id": ..., "raw_image": [paths]}; Lumina-mGPT's have no `raw_image`. The list is an
input like any other: cut into chunks, gone on with after a stop, rejects named by their place in it. Names of pickles
and images are meant from where the command runs, as the reference's trainer reads them.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from unitoken.codec.conversations import ItemError, brief, item_id, short_name
from unitoken.codec.sequence import check_length
from unitoken.codec.text import load_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.dataset import images
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.manifest import REJECTS, UNKNOWN, VisionTokenizer
from unitoken.dataset.record import IGNORED, Record, spans_of, token_type
from unitoken.dataset.vocabulary import Vocabulary, image_code_name
from unitoken.storage.store import split
from unitoken.tokenize.checks.verify_records import MIGRATED, WITHOUT_IMAGES, crop_latents
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.executors.progress import share_of, show_progress
from unitoken.tokenize.job import Chunk, Job, JobFile, begin, check_out_folder, pieces_of
from unitoken.tokenize.output import Output
from unitoken.tokenize.pipeline.item import Place, Rejects
from unitoken.tokenize.pipeline.writer import PictureSizes, write
from unitoken.tokenize.sources import reader
from unitoken.tokenize.sources.pictures import MAX_ITEM_BYTES, PictureReader

MAX_PICKLE = 1 << 26  # bytes; an item of 4,096 tokens has 25 KB
DOWNSAMPLING = 16  # pixels a latent of Chameleon's image tokenizer, the only one that the reference has

Tokens = npt.NDArray[np.int64]


def migrate(record: Path, out: str, settings: TokenizeConfig, without_images: bool = False) -> None:
    """Write the chunks that are missing in `out`; the merge is the caller's.

    without_images: leave the originals out. Such a dataset trains with `data.continuous: none` alone.

    Raises:
        ConfigError: settings, record or output folder do not fit.
        StoreError: the output can not be written.
    """
    job = _prepare(record, out, settings, WITHOUT_IMAGES if without_images else MIGRATED)
    migration = Migration(job)
    with show_progress(share_of(job, job.chunks())) as bar:

        def report(finished: int, rejected: int) -> None:
            bar.advance(finished, rejected)
            bar.show()

        for chunk in job.missing():
            migration.write_chunk(chunk, report)


def _prepare(record: Path, out: str, settings: TokenizeConfig, adapter: str) -> Job:
    """As `job.prepare`, with what is known of the reference in place of an image tokenizer's weights."""
    output = Output(out)
    check_out_folder(output)
    files = reader.find_files([str(record)])
    ids = load_tokenizer(settings.tokenizer).get_vocab()
    codes = next(code for code in range(len(ids) + 1) if image_code_name(code) not in ids)
    if not codes:
        raise ConfigError(
            f"tokenizer: {settings.tokenizer}: expected the one of the dataset, found no image codes in it"
        )
    vocabulary = Vocabulary.from_tokens(ids, codes)
    pieces = pieces_of(output, files, settings.chunk_size)
    # Nothing in the reference's files names the weights: "unknown" differs from every fingerprint, so that a mixture
    # with other datasets says so.
    vision = VisionTokenizer(
        kind="chameleon",
        weights=UNKNOWN,
        codebook_size=codes,
        downsampling=DOWNSAMPLING,
        precision=settings.vision.precision,
    )
    same = settings.model_dump(include=set(JobFile.model_fields) - {"vision", "adapter", "compat"})
    file = JobFile(
        source=pieces.fingerprint,
        vocabulary=vocabulary.fingerprint,
        vision=vision,
        adapter=adapter,
        compat="unitoken",
        **same,
    )
    return begin(output, file, pieces, vocabulary, settings)


class Migration:
    def __init__(self, job: Job) -> None:
        self._job, self._vocabulary = job, job.vocabulary()
        self._with_images = job.file.adapter == MIGRATED
        self._pictures = PictureReader(
            job.config.allow_http, job.config.allow_private, job.config.timeout_seconds
        )
        self._sizes = crop_latents(job.file.crop, job.file.target_size, DOWNSAMPLING)

    def write_chunk(self, chunk: Chunk, report: Callable[[int, int], None]) -> None:
        rejects = Rejects()
        raw = (
            (self._place(item), item)
            for piece, taken in chunk.parts
            for item in reader.read_piece(self._job.input, piece, taken)
        )
        items = rejects.sift("source", self._open, raw)
        assembled = rejects.sift("sequence", self._assemble, items)
        records = rejects.sift("image", self._add_images, assembled)
        with self._job.output.chunk(chunk.name) as folder:
            write((value for _, value in records), folder.path, self._vocabulary, report)
            (folder.path / REJECTS).write_bytes(rejects.dump())
            folder.publish()
        report(len(rejects.lines), len(rejects.lines))

    def _place(self, item: reader.Item) -> Place:
        name = split(self._job.input.files[item.file].name)[1]
        try:
            found = item_id(item.value, reader.item_name(self._job.input, item))
        except ItemError:
            found = str(item.position)
        return Place(item.piece, name, item.position, found)

    def _open(self, _: Place, item: reader.Item) -> dict[str, Any]:
        """The pickle that a line of the record names."""
        entry = item.value
        if isinstance(entry, ItemError):
            raise entry
        if not isinstance(entry, dict) or not isinstance(name := entry.get("file"), str):
            raise ItemError(
                f'bad record: expected {{"file": ..., "len": ..., "id": ...}}, found {brief(entry)}'
            )
        value = load_plain(_read(Path(name)), name)
        if not isinstance(value, dict) or not isinstance(tokens := value.get("token"), list):
            raise ItemError(
                f"bad pickle: {short_name(name)}: expected a dict with 'token' and 'label', found {brief(value)}"
            )
        if entry.get("len", len(tokens)) != len(tokens):
            raise ItemError(f"length differs: {len(tokens)} tokens, the record says {brief(entry['len'])}")
        return value

    def _assemble(self, place: Place, value: dict[str, Any]) -> tuple[Record, dict[str, Any]]:
        tokens, labels = _integers(value, "token"), _integers(value, "label")
        if len(tokens) == 0 or tokens.min() < 0 or tokens.max() >= self._vocabulary.size:
            raise ItemError(
                f"bad tokens: expected some from 0 to {self._vocabulary.size - 1}, found {brief(value['token'])}"
            )
        trained = labels != IGNORED
        if len(labels) != len(tokens) or (labels[trained] != tokens[trained]).any():
            raise ItemError(
                f"bad labels: expected {IGNORED} or the token itself at each of {len(tokens)} places"
            )
        if not trained.any():
            raise ItemError("nothing to train on: all labels are masked")
        check_length(len(tokens), self._job.file.max_tokens)
        spans = np.array(list(self._image_spans(tokens)), np.uint32).reshape(-1, 4)
        record = Record(
            place.id, tokens.astype(token_type(self._vocabulary.size)), spans_of(trained), spans, ()
        )
        return record, value

    def _image_spans(self, tokens: Tokens) -> Iterable[tuple[int, int, int, int]]:
        """From each start of an image to the next end; a text may have forged either, which makes no image."""
        starts, ends = (
            np.flatnonzero(tokens == i) for i in (self._vocabulary.image_start, self._vocabulary.image_end)
        )
        if len(starts) != len(ends):
            raise ItemError(f"broken image: {len(starts)} starts and {len(ends)} ends of an image")
        for start, last in zip(starts.tolist(), ends.tolist(), strict=True):
            try:
                height, width = self._vocabulary.image_codes(tokens[start : last + 1]).shape
            except (ValueError, IndexError) as error:
                raise ItemError(f"broken image: at token {start}: {error}") from None
            if (height, width) not in self._sizes:
                raise ItemError(
                    f"image of another size: {height} x {width} latents, which target_size and crop do not make"
                )
            yield start, last + 1, height, width

    def _add_images(self, _: Place, value: tuple[Record, dict[str, Any]]) -> tuple[Record, PictureSizes]:
        record, item = value
        count = len(record.image_spans)
        if not self._with_images:
            return _with(record, [b""] * count), [(0, 0)] * count
        names = item.get("raw_image") or []
        names = names if isinstance(names, list) else [names]  # the reference's tokenizer takes a string, too
        if len(names) != count or not all(isinstance(name, str) for name in names):
            raise ItemError(
                f"no originals: {count} images in the tokens, 'raw_image' is {brief(item.get('raw_image'))}"
            )
        originals: list[bytes] = []
        sizes: PictureSizes = []
        for name in names:
            originals.append(self._pictures.read(".", name, MAX_ITEM_BYTES - sum(map(len, originals))))
            try:
                with images.decoded(originals[-1], compat=True) as image:
                    sizes.append(image.size)
            except ImageError as error:
                raise ItemError(f"unusable image: {short_name(name)}: {error}") from None
        return _with(record, originals), sizes


def _with(record: Record, originals: Iterable[bytes]) -> Record:
    return Record(record.id, record.tokens, record.target_spans, record.image_spans, tuple(originals))


def _integers(value: dict[str, Any], name: str) -> Tokens:
    """`array` takes whole numbers alone; numpy would follow lists in lists, which may hold themselves."""
    try:
        return np.array(array("q", value.get(name) or []), np.int64)
    except (TypeError, ValueError, OverflowError):
        raise ItemError(
            f"bad {name}s: expected a list of whole numbers, found {brief(value.get(name))}"
        ) from None


# --- pickles ---------------------------------------------------------------------------------------------------------

# What a list, a dict, a number, a bool, None and the memo are written with, lengths and memo numbers bounded. A memo
# number is a size that Python reserves: nine bytes that name 2**31 would take 32 GB.
_FIXED = re.compile(rb"(?:[]}(Naseu\x88\x89\x94]|[Kqh\x80].|M..|J.{4}|[rj]..\0\0|[G\x95].{8})*+", re.DOTALL)
_COUNTED = {b"\x8c": 1, b"X": 4, b"\x8a": 1}  # texts and large numbers: bytes of the length before them
_STOP = b"."


def load_plain(data: bytes, name: str) -> object:
    """What is pickled, if that is lists, dicts, texts and numbers. Raises ItemError for anything else: it is not run."""
    at = _end(data, 0)
    while (code := data[at : at + 1]) != _STOP:
        if code not in _COUNTED:
            known = [op.name for op in pickletools.opcodes if op.code.encode("latin-1") == code]
            raise ItemError(
                f"not a plain pickle: {short_name(name)}: {known[0] if known else 'no pickle'} at byte {at}"
            )
        width = _COUNTED[code]
        at = _end(data, at + 1 + width + int.from_bytes(data[at + 1 : at + 1 + width], "little"))
    try:
        return _Plain(io.BytesIO(data)).load()
    except Exception as error:  # bytes that are allowed one by one in an order that is not
        raise ItemError(f"not a plain pickle: {short_name(name)}: {error}") from None


def _end(data: bytes, start: int) -> int:
    """Where what is of fixed length ends."""
    match = _FIXED.match(data, start)
    assert match is not None, "nothing is of fixed length, too"
    return match.end()


class _Plain(pickle.Unpickler):
    """A pickle can build and call only what it has got by name, so nothing can be run where there are no names."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is not a list, dict, text or number")


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():  # before it is opened: a pipe would never end
            raise ItemError(f"no such pickle: {short_name(str(path))}")
        if (size := path.stat().st_size) > MAX_PICKLE:
            raise ItemError(
                f"pickle too large: {short_name(str(path))}: {size} bytes, at most {MAX_PICKLE} are read"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ItemError):
            raise
        raise ItemError(f"pickle not readable: {short_name(str(path))}: {error}") from None
