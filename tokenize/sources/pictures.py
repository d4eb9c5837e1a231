"""The bytes of an item's images: from a file, an object store, the web, or the item itself."""

from __future__ import annotations

from pathlib import Path

from unitoken.codec.conversations import ItemError, decode_data_url, is_data_url, short_name
from unitoken.common.errors import ConfigError
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, StoreError, is_url, join
from unitoken.storage.web import PrivateHostError, TooLargeError, Web, is_web

LFS_POINTER = "a pointer of Git LFS, not the file itself: git lfs pull"
MAX_ITEM_BYTES = 1 << 30
"""The most bytes of all encoded images of an item together: the offsets in a shard end at 4 GiB."""


class PictureReader:
    """Reads images. Threads may share one reader.

    Args:
        allow_http: whether to fetch http:// and https:// URLs.
        allow_private: whether to fetch also from this machine and from private networks.
        timeout_seconds: the limit for one image from the web, including all retries.
    """

    def __init__(self, allow_http: bool, allow_private: bool, timeout_seconds: float) -> None:
        self._allow_http = allow_http
        self._web = Web(timeout_seconds, public_only=not allow_private)

    def read(self, base: str, source: str | bytes, room: int) -> bytes:
        """Return an image's bytes.

        Args:
            base: the folder or URL to which relative names belong.
            source: a path, a URL (also `data:`), or the bytes themselves.
            room: the most bytes that the image may have.

        Raises:
            ItemError: the image does not exist, cannot be read, must not be read, or is too large.
        """
        if isinstance(source, bytes):
            return _checked(source, short_name(source), room)
        if is_data_url(source):
            if len(source) * 3 // 4 > room + 1024:
                raise _images_too_large(short_name(source), room)
            return _checked(decode_data_url(source), short_name(source), room)
        where = join(base, source)
        try:
            if is_web(where):
                return self._fetch(where, room)
            data = _from_store(where, room) if is_url(where) else _from_file(Path(where), source, room)
        except MissingError:
            raise ItemError(f"no such image: {short_name(source)}") from None
        except TooLargeError:
            raise _images_too_large(short_name(source), room) from None
        return _checked(data, short_name(source), room)

    def _fetch(self, url: str, room: int) -> bytes:
        if not self._allow_http:
            raise ItemError(
                f"image not allowed: {short_name(url)}: allow_http=true fetches images from the web"
            )
        try:
            return self._web.read(url, room)
        except (MissingError, TooLargeError):
            raise
        except PrivateHostError as error:
            raise ItemError(f"image not allowed: {error}: allow_private=true fetches from there") from None
        except StoreError as error:
            raise ItemError(f"image not reachable: {error}") from None


def _from_store(url: str, room: int) -> bytes:
    scheme, _, path = url.partition("://")
    # One client for the whole bucket: one for each folder would be too many. azure://account/container/name
    depth = 2 if scheme == "azure" else 1
    *bucket, name = path.split("/", depth)
    try:
        store = open_store(f"{scheme}://{'/'.join(bucket)}")
        return store.read_range(name, 0, room + 1)  # one byte more, so that the caller sees what is too large
    except MissingError:
        raise
    except StoreError as error:
        reason = "permission denied" if "permission denied" in str(error) else "the store does not answer"
        raise ItemError(f"image not reachable: {short_name(url)}: {reason}") from None
    except ConfigError as error:
        raise ItemError(f"image not allowed: {error}") from None


def _from_file(file: Path, name: str, room: int) -> bytes:
    try:
        if not file.is_file():  # checked before opening: reading a pipe would never end
            raise ItemError(f"no such image: {short_name(name)}")
        if file.stat().st_size > room:
            raise _images_too_large(short_name(name), room)
        return file.read_bytes()
    except OSError as error:
        raise ItemError(f"image not reachable: {short_name(name)}: {error.strerror}") from None


def is_lfs_pointer(data: bytes) -> bool:
    """Return whether `data` is the small text file that Git LFS leaves in place of a large file."""
    return data.startswith(b"version https://git-lfs.github.com/spec/")


def _checked(data: bytes, name: str, room: int) -> bytes:
    """Return `data`, or raise ItemError where it is a Git LFS pointer or larger than `room`."""
    if is_lfs_pointer(data):
        raise ItemError(f"not downloaded: {name}: {LFS_POINTER}")
    if len(data) > room:
        raise _images_too_large(name, room)
    return data


def _images_too_large(name: str, room: int) -> ItemError:
    return ItemError(f"images too large: {name}: {room} bytes are left of {MAX_ITEM_BYTES} for an item")
