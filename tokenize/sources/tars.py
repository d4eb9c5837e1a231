"""WebDataset tars: files that share a name up to the first dot are one sample.

As for webdataset itself, names that begin with a dot, have no suffix, or are `__like_this__` are no samples. Links and
devices are passed over.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection, Iterator

from unitoken.codec.conversations import PICTURE_SUFFIXES, ItemError
from unitoken.common.errors import ConfigError
from unitoken.storage.store import StoreError
from unitoken.tokenize.sources.base import SourceFile, Span
from unitoken.tokenize.sources.pictures import MAX_ITEM_BYTES

TEXTS = (
    "txt",
    "text",
    "transcript",
    "caption",
    "cls",
    "url",
)  # what ends in .json is parsed, all else stays bytes
MAX_HEADER_BYTES = (
    1 << 20
)  # of a long name or a pax header, which tarfile reads whole: of 3 GB it made a hang and 6 GB of memory
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class BrokenError(ValueError):
    """How the tar breaks off."""


class _Member(tarfile.TarInfo):
    """Refuses what tarfile takes as it comes."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:  # type: ignore[override]
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise BrokenError("a file of a negative size")
        if member.type in HEADERS and member.size > MAX_HEADER_BYTES:
            raise BrokenError(f"a header of {member.size} bytes")
        return member


def tar_spans(file: SourceFile) -> Iterator[Span]:
    """One: the samples of a tar can not be found without reading it.

    Raises:
        ConfigError: the file is no tar.
    """
    try:
        tarfile.TarInfo.frombuf(file.read(0, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        pass  # a tar without files
    except tarfile.HeaderError as error:
        raise ConfigError(f"{file.shown}: not a tar: {error}") from None
    yield Span(0, file.size, None)


def tar_values(file: SourceFile, wanted: Collection[int] | None) -> Iterator[tuple[int, object]]:
    """Each sample as `{"__key__": "000012", "jpg": bytes, "txt": str, "json": object}`, numbered from 0.

    Where the tar breaks off, an ItemError takes the place of the sample that is perhaps not whole.
    """
    number, room = -1, 0
    key: str | None = None
    sample: dict[str, object] | ItemError = {}
    try:
        for member, tar in _members(file):
            name, suffix = key_of(member.name)
            if not is_of_a_sample(name, suffix):
                continue
            if name != key:
                if key is not None and (wanted is None or number in wanted):
                    yield number, checked(sample)
                number, key, sample, room = number + 1, name, {"__key__": name}, MAX_ITEM_BYTES
            if isinstance(sample, dict) and (wanted is None or number in wanted):
                # A sparse file's holes are bytes that stand nowhere: 5 kB of tar made 1 GB of zeros.
                room -= member.size if member.size <= file.size else MAX_ITEM_BYTES + 1
                sample = _with(sample, suffix, member, tar) if room >= 0 else _too_large(name)
    except BrokenError as error:
        number, key, sample = max(number, 0), "", ItemError(f"input cut: {error}")
    if key is not None and (wanted is None or number in wanted):
        yield number, checked(sample)


def _members(file: SourceFile) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The regular files in order. tarfile itself takes a broken header for the end."""
    end = 0
    try:
        with file.open() as stream, tarfile.open(fileobj=stream, mode="r:", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined] # else it keeps them all
                if tar.offset <= end:
                    raise BrokenError("a file of a negative size")  # would come round again for ever
                end = tar.offset
                if member.isfile():
                    yield member, tar
            end = tar.offset
    except StoreError:
        raise
    except Exception as error:  # tarfile raises all kinds for odd pax and sparse headers
        raise BrokenError(
            f"at byte {end} of {file.size}: {' '.join(str(error).split())[:200] or type(error).__name__}"
        ) from None
    if file.size - end < tarfile.BLOCKSIZE:
        raise BrokenError(f"at byte {end} of {file.size}: no end of the archive")
    for block in file.blocks(end, file.size):
        if block.lstrip(b"\0"):
            raise BrokenError(
                f"at byte {end} of {file.size}: expected a file or the end of the archive, found something else"
            )


def key_of(name: str) -> tuple[str, str]:
    """`a/000012.seg.PNG` -> (`a/000012`, `seg.png`)."""
    name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def is_of_a_sample(name: str, suffix: str) -> bool:
    file = name.rpartition("/")[2]
    return bool(file and suffix) and not (file.startswith("__") and file.endswith("__"))


def checked(sample: dict[str, object] | ItemError) -> dict[str, object] | ItemError:
    """`cat.000.png cat.000.txt cat.001.png ...` are one sample for WebDataset, and are not meant as one."""
    if not isinstance(sample, dict):
        return sample
    parts = [suffix.rpartition(".") for suffix in sample]
    described = {middle for middle, _, kind in parts if middle and (kind in TEXTS or kind == "json")}
    pairs = described & {middle for middle, _, kind in parts if middle and kind in PICTURE_SUFFIXES}
    plain = any(
        not middle and (kind in TEXTS or kind == "json") for middle, _, kind in parts
    )  # what describes all of them
    if not pairs or plain:
        return sample
    some = ", ".join(f"{sample['__key__']}.{middle}" for middle in sorted(pairs)[:2])
    return ItemError(
        f"bad sample: names hold dots: {some}, ... are one sample of {len(pairs)} pictures and texts, as a sample's name ends "
        "at the first dot; rename them"
    )


def _with(
    sample: dict[str, object], suffix: str, member: tarfile.TarInfo, tar: tarfile.TarFile
) -> dict[str, object] | ItemError:
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
        raise BrokenError(f"inside {name}.{suffix}: {' '.join(str(error).split())[:200]}") from None
    value = value_of(name, suffix, data)
    return value if isinstance(value, ItemError) else {**sample, suffix: value}


def value_of(name: str, suffix: str, data: bytes) -> object:
    """A file of a sample: text, what its JSON says, or its bytes. An ItemError for one that can not be read."""
    kind = suffix.rpartition(".")[2]
    try:
        text = (
            data.decode("utf-8-sig") if kind == "json" or kind in TEXTS else ""
        )  # without a byte order mark
        return json.loads(text) if kind == "json" else text if kind in TEXTS else data
    except UnicodeDecodeError as error:
        return ItemError(f"not UTF-8: {name}.{suffix}: byte {error.start} is {data[error.start]:#04x}")
    except (ValueError, RecursionError) as error:
        return ItemError(f"not readable as JSON: {name}.{suffix}: {error}")


def _too_large(name: str) -> ItemError:
    return ItemError(f"item too large: {name}: more than {MAX_ITEM_BYTES} bytes")
