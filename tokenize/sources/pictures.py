"""The bytes of an item's images, wherever they are: a file, an object store, the web, or the item itself."""

from __future__ import annotations

from pathlib import Path

from unitoken.codec.conversations import ItemError, inline, is_inline, shown
from unitoken.common.errors import ConfigError
from unitoken.storage.open import open_store
from unitoken.storage.store import MissingError, StoreError, is_url, join
from unitoken.storage.web import PrivateHostError, TooLargeError, Web, is_web

LFS_POINTER = "a pointer of Git LFS, not the file itself: git lfs pull"
MAX_ITEM_BYTES = 1 << 30  # of encoded images; a shard's offsets end at 4 GiB


class PictureReader:
    """Safe over threads.

    Args:
        allow_http: fetch what http:// and https:// name.
        allow_private: also from hosts of this machine and of private networks.
        timeout_seconds: for one such image, with all repetitions.
    """

    def __init__(self, allow_http: bool, allow_private: bool, timeout_seconds: float) -> None:
        self._allow_http = allow_http
        self._web = Web(timeout_seconds, public_only=not allow_private)

    def read(self, base: str, source: str | bytes, room: int) -> bytes:
        """An image's bytes, `room` at most. `base` is the folder or URL where relative names begin.

        Raises:
            ItemError: there is no such image, it can not or may not be read, or it is too large.
        """
        if isinstance(source, bytes):
            return _checked(source, shown(source), room)
        if is_inline(source):
            if len(source) * 3 // 4 > room + 1024:
                raise _too_large(shown(source), room)
            return _checked(inline(source), shown(source), room)
        where = join(base, source)
        try:
            if is_web(where):
                return self._fetch(where, room)
            data = _from_store(where, room) if is_url(where) else _from_file(Path(where), source, room)
        except MissingError:
            raise ItemError(f"no such image: {shown(source)}") from None
        except TooLargeError:
            raise _too_large(shown(source), room) from None
        return _checked(data, shown(source), room)

    def _fetch(self, url: str, room: int) -> bytes:
        if not self._allow_http:
            raise ItemError(f"image not allowed: {shown(url)}: allow_http=true fetches images from the web")
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
    parts = path.split("/", 2 if scheme == "azure" else 1)  # azure://account/container/...
    try:
        # From the bucket's root: a client for every folder would be too many. One byte more shows what is too large.
        store = open_store(f"{scheme}://{'/'.join(parts[:-1])}")
        return store.read_range(parts[-1], 0, room + 1)
    except MissingError:
        raise
    except StoreError as error:
        reason = "permission denied" if "permission denied" in str(error) else "the store does not answer"
        raise ItemError(f"image not reachable: {shown(url)}: {reason}") from None
    except ConfigError as error:
        raise ItemError(f"image not allowed: {error}") from None


def _from_file(file: Path, name: str, room: int) -> bytes:
    try:
        if not file.is_file():  # before it is opened: a pipe would never end
            raise ItemError(f"no such image: {shown(name)}")
        if file.stat().st_size > room:
            raise _too_large(shown(name), room)
        return file.read_bytes()
    except OSError as error:
        raise ItemError(f"image not reachable: {shown(name)}: {error.strerror}") from None


def is_lfs_pointer(data: bytes) -> bool:
    return data.startswith(b"version https://git-lfs.github.com/spec/")


def _checked(data: bytes, name: str, room: int) -> bytes:
    if is_lfs_pointer(data):
        raise ItemError(f"not downloaded: {name}: {LFS_POINTER}")
    if len(data) > room:
        raise _too_large(name, room)
    return data


def _too_large(name: str, room: int) -> ItemError:
    return ItemError(f"images too large: {name}: {room} bytes are left of {MAX_ITEM_BYTES} for an item")
