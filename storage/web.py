"""Files behind http:// and https:// URLs, for reading: the input's, and its images."""

from __future__ import annotations

import threading
import time
from typing import Any

from unitoken.storage.store import MissingError, StoreError

WEB = ("http://", "https://")
SOURCE_SECONDS = 120.0
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
FIRST_PAUSE = 0.5
BLOCK_BYTES = 1 << 16
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses after which the same request may be answered


def is_web(name: str) -> bool:
    return name.lower().startswith(WEB)


class PrivateHostError(StoreError):
    """The host is of this machine or of a private network, and is not to be asked."""


class TooLargeError(StoreError):
    """The file has more bytes than are wanted."""


class _PassingError(StoreError):
    """Worth another try. The words are the same in each run: no times, no addresses."""


class Web:
    """In the spirit of `stores.Store`, as far as reading goes; a name is a whole URL. Safe over threads.

    Args:
        seconds: for a request with all its repetitions.
        public_only: refuse hosts of this machine and of private networks, also behind a redirect.
    """

    def __init__(self, seconds: float = SOURCE_SECONDS, public_only: bool = False) -> None:
        self._seconds, self._public_only = seconds, public_only
        self._threads = threading.local()

    def read(self, url: str, limit: int) -> bytes:
        """Raises TooLargeError for more than `limit` bytes."""
        return self._repeat(url, {}, limit)[0]

    def read_range(self, url: str, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        return self._repeat(url, {"Range": f"bytes={start}-{end - 1}"}, end - start)[0]

    def size(self, url: str) -> int:
        return self._head(url)[0]

    def version(self, url: str) -> str:
        size, version = self._head(url)
        return f"{size}-{version}"

    def _head(self, url: str) -> tuple[int, str]:
        """By a GET for one byte: signed URLs allow no HEAD."""
        _, headers = self._repeat(url, {"Range": "bytes=0-0"}, 1)
        size = headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdigit():
            raise StoreError(f"{url}: the server does not say how long the file is")
        return int(size), headers.get("ETag") or headers.get("Last-Modified") or ""

    def _repeat(self, url: str, headers: dict[str, str], limit: int) -> tuple[bytes, Any]:
        end, pause = time.monotonic() + self._seconds, FIRST_PAUSE
        while True:
            try:
                return self._get(url, headers, limit, end)
            except _PassingError as error:
                if time.monotonic() + pause > end:
                    raise StoreError(str(error)) from None
            time.sleep(pause)
            pause *= 2

    def _get(self, url: str, headers: dict[str, str], limit: int, end: float) -> tuple[bytes, Any]:
        from requests import exceptions
        from urllib3.exceptions import HTTPError

        from unitoken.storage.web_session import PrivateAddressError

        left = max(0.1, end - time.monotonic())
        timeout = (min(CONNECT_SECONDS, left), min(READ_SECONDS, left))
        try:
            with self._session().get(url, headers=headers, stream=True, timeout=timeout) as answer:
                if answer.status_code == 416 and answer.headers.get("Content-Range", "").endswith("/0"):
                    return b"", answer.headers  # an empty file has no first byte
                _check_status(url, answer.status_code, partial="Range" in headers)
                return _body(url, answer, limit, end), answer.headers
        except PrivateAddressError:
            raise PrivateHostError(f"{url}: its host is of this machine or of a private network") from None
        except exceptions.SSLError:
            raise StoreError(f"{url}: bad certificate") from None
        except exceptions.TooManyRedirects:
            raise StoreError(f"{url}: too many redirects") from None
        except exceptions.Timeout:
            raise _PassingError(f"{url}: timeout") from None
        except (
            exceptions.ConnectionError,
            exceptions.ChunkedEncodingError,
            exceptions.ContentDecodingError,
            HTTPError,
        ):
            raise _PassingError(f"{url}: no connection, or one that broke off") from None
        except (
            exceptions.RequestException,
            ValueError,
        ):  # requests lets some of urllib3's and idna's through
            raise StoreError(f"{url}: not a URL that can be fetched, or it leads to one") from None

    def _session(self) -> Any:
        from unitoken.storage.web_session import WebSession

        if not hasattr(self._threads, "session"):
            session = WebSession(self._public_only)
            session.max_redirects = 5  # and only to http:// and https://: a session knows nothing else
            session.headers["Accept-Encoding"] = "identity"  # ranges are of the file itself
            session.headers["User-Agent"] = "unitoken-streaming"
            self._threads.session = session
        return self._threads.session


def _check_status(url: str, status: int, partial: bool) -> None:
    if status in (404, 410):
        raise MissingError(f"{url}: not there")
    if status in (401, 403):
        raise StoreError(f"{url}: permission denied")
    if status in PASSING:
        raise _PassingError(f"{url}: HTTP {status}")
    if partial and status == 200:
        raise StoreError(f"{url}: the server sends no parts of files (HTTP ranges): download it first")
    if status != (206 if partial else 200):
        raise StoreError(f"{url}: HTTP {status}")


def _body(url: str, answer: Any, limit: int, end: float) -> bytes:
    length = answer.headers.get("Content-Length", "")
    if length.isdigit() and int(length) > limit:
        raise TooLargeError(f"{url}: {length} bytes")
    data = bytearray()
    # read1 returns what has come: a server that sends a byte now and then would keep read() for ever.
    while block := answer.raw.read1(BLOCK_BYTES, decode_content=True):
        data += block
        if len(data) > limit:
            raise TooLargeError(f"{url}: more than {limit} bytes")
        if time.monotonic() > end:
            raise StoreError(f"{url}: timeout")
    return bytes(data)
