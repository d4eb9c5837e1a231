"""WebDataset tars: files that share a name up to the first dot are one sample.

As in webdataset itself, files whose names begin with a dot, have no suffix, or are `__like_this__` belong to
no sample. Links and devices are passed over.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator

from unitoken.codec.conversations import PICTURE_SUFFIXES, ItemError
from unitoken.common.errors import ConfigError, one_line
from unitoken.storage.store import StoreError
from unitoken.tokenize.sources.base import SourceFile, Span, item_too_large

TEXT_SUFFIXES = ("txt", "text", "transcript", "caption", "cls", "url")
"""Files with these endings are decoded as text, those in .json are parsed, and all others stay bytes."""
DESCRIPTIONS = (*TEXT_SUFFIXES, "json")
# tarfile reads a long name or a pax header whole: one of 3 GB made it hang, with 6 GB of memory.
MAX_HEADER_BYTES = 1 << 20
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)

Sample = dict[str, object]
"""`{"__key__": "000012", "jpg": bytes, "txt": str, "json": object}`"""


class BrokenTarError(ValueError):
    """How a tar breaks off."""


class _Member(tarfile.TarInfo):
    """A header that refuses sizes which tarfile would accept."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:  # type: ignore[override]
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise BrokenTarError("a file of a negative size")
        if member.type in HEADERS and member.size > MAX_HEADER_BYTES:
            raise BrokenTarError(f"a header of {member.size} bytes")
        return member


def tar_spans(file: SourceFile) -> Iterator[Span]:
    """Cut a tar into one span: its samples cannot be found without reading it.

    Raises:
        ConfigError: the file is not a tar.
    """
    try:
        tarfile.TarInfo.frombuf(file.read(0, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        pass  # a tar without files
    except tarfile.HeaderError as error:
        raise ConfigError(f"{file.shown}: not a tar: {error}") from None
    yield Span(0, file.size, None)


def tar_values(file: SourceFile, selected: Collection[int] | None) -> Iterator[tuple[int, object]]:
    """Read the samples of a tar.

    Where the tar breaks off, an ItemError takes the place of the last sample, which may not be whole.
    """
    number, room = -1, 0
    key: str | None = None
    sample: Sample | ItemError = {}
    try:
        for member, tar in _members(file):
            name, suffix = key_of(member.name)
            if not is_of_a_sample(name, suffix):
                continue
            if name != key:
                if key is not None and (selected is None or number in selected):
                    yield number, refuse_dotted_names(sample)
                number, key, sample, room = number + 1, name, {"__key__": name}, file.max_item_bytes
            if isinstance(sample, dict) and (selected is None or number in selected):
                # The holes of a sparse file have a size but no bytes: 5 kB of tar became 1 GB of zeros.
                room -= member.size if member.size <= file.size else file.max_item_bytes + 1
                if room >= 0:
                    sample = _add_file(sample, suffix, member, tar)
                else:
                    sample = item_too_large(f"{name}: ", file.max_item_bytes)
    except BrokenTarError as error:
        number, key, sample = max(number, 0), "", ItemError(f"input cut: {error}")
    if key is not None and (selected is None or number in selected):
        yield number, refuse_dotted_names(sample)


def _members(file: SourceFile) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the regular files in order; raise BrokenTarError where tarfile would just see the end."""
    end = 0
    try:
        with file.open() as stream, tarfile.open(fileobj=stream, mode="r:", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined] # tarfile would keep them all in memory
                if tar.offset <= end:  # it would read the same header for ever
                    raise BrokenTarError("a file of a negative size")
                end = tar.offset
                if member.isfile():
                    yield member, tar
            end = tar.offset
    except StoreError:
        raise
    except Exception as error:  # tarfile raises all kinds for odd pax and sparse headers
        raise BrokenTarError(f"at byte {end} of {file.size}: {one_line(error, 200)}") from None
    if file.size - end < tarfile.BLOCKSIZE:
        raise BrokenTarError(f"at byte {end} of {file.size}: no end of the archive")
    for block in file.blocks(end, file.size):
        if block.lstrip(b"\0"):
            raise BrokenTarError(
                f"at byte {end} of {file.size}: "
                "expected a file or the end of the archive, found something else"
            )


def key_of(name: str) -> tuple[str, str]:
    """Return the key and the suffix in a file's name: `a/000012.seg.PNG` -> (`a/000012`, `seg.png`)."""
    name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def is_of_a_sample(key: str, suffix: str) -> bool:
    """Return whether a file with this key and suffix belongs to a sample."""
    stem = key.rpartition("/")[2]
    return bool(stem and suffix) and not (stem.startswith("__") and stem.endswith("__"))


def refuse_dotted_names(sample: Sample | ItemError) -> Sample | ItemError:
    """Return an ItemError for a sample in which several pictures have a text each.

    For WebDataset `cat.000.png cat.000.txt cat.001.png ...` are one sample, which nobody means who names
    files so. A text that describes all of them together, `cat.txt`, says that they are one sample.
    """
    if not isinstance(sample, dict):
        return sample
    names = [suffix.rpartition(".") for suffix in sample]
    described = {middle for middle, _, kind in names if kind in DESCRIPTIONS}
    pictures = {middle for middle, _, kind in names if kind in PICTURE_SUFFIXES}
    pairs = (described & pictures) - {""}
    if not pairs or "" in described:
        return sample
    some = ", ".join(f"{sample['__key__']}.{middle}" for middle in sorted(pairs)[:2])
    return ItemError(
        f"bad sample: names hold dots: {some}, ... are one sample of {len(pairs)} pictures and texts, "
        "as a sample's name ends at the first dot; rename them"
    )


def _add_file(
    sample: Sample, suffix: str, member: tarfile.TarInfo, tar: tarfile.TarFile
) -> Sample | ItemError:
    """Return the sample with one more file in it."""
    name = key_of(member.name)[0]
    if suffix in sample:
        return ItemError(f"bad sample: {name}: two files that end in .{suffix}")
    content = tar.extractfile(member)
    assert content is not None
    try:
        data = content.read()
    except StoreError:
        raise
    except Exception as error:
        raise BrokenTarError(f"inside {name}.{suffix}: {one_line(error, 200)}") from None
    value = value_of(name, suffix, data)
    return value if isinstance(value, ItemError) else {**sample, suffix: value}


def value_of(key: str, suffix: str, data: bytes) -> object:
    """Return a file of a sample as text, parsed JSON or bytes, or an ItemError where it cannot be read."""
    kind = suffix.rpartition(".")[2]
    if kind not in DESCRIPTIONS:
        return data
    try:
        text = data.decode("utf-8-sig")  # without a byte order mark
        return json.loads(text) if kind == "json" else text
    except UnicodeDecodeError as error:
        return ItemError(f"not UTF-8: {key}.{suffix}: byte {error.start} is {data[error.start]:#04x}")
    except (ValueError, RecursionError) as error:
        return ItemError(f"not readable as JSON: {key}.{suffix}: {error}")
