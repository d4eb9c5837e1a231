"""Files behind http:// and https:// URLs, read-only: sources of conversations, and images."""

from __future__ import annotations

import threading
import time
from typing import Any

from unitoken.storage.retry import RETRY_SECONDS, pauses_until, retry
from unitoken.storage.store import MissingError, StoreError

WEB = ("http://", "https://")
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0  # the longest timeouts of one request
BLOCK_BYTES = 1 << 16
TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)  # the same request may succeed later


def is_web(name: str) -> bool:
    """Return whether a name is an http:// or https:// URL."""
    return name.lower().startswith(WEB)


class PrivateHostError(StoreError):
    """The host is this machine or in a private network, and must not be contacted."""


class TooLargeError(StoreError):
    """The file is larger than the limit."""


class _TransientWebError(StoreError):
    """Worth another try. The message is the same in every run: no times, no addresses."""


class Web:
    """The reading methods of `store.Store`; a name is a complete URL. Thread-safe.

    Args:
        seconds: for a request with all its retries.
        public_only: refuse hosts of this machine and of private networks, also behind a redirect.
    """

    def __init__(self, seconds: float = RETRY_SECONDS, public_only: bool = False) -> None:
        self._seconds, self._public_only = seconds, public_only
        self._threads = threading.local()

    def read(self, url: str, limit: int) -> bytes:
        """Return the content of a file. Raises TooLargeError if it has more than `limit` bytes."""
        return self._get(url, {}, limit)[0]

    def read_range(self, url: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`, fewer if the file ends before."""
        if start >= end:
            return b""
        return self._get(url, {"Range": f"bytes={start}-{end - 1}"}, end - start)[0]

    def size(self, url: str) -> int:
        """Return the size of a file in bytes."""
        return self._head(url)[0]

    def version(self, url: str) -> str:
        """Return a text that changes with the content of a file."""
        size, version = self._head(url)
        return f"{size}-{version}"

    def _head(self, url: str) -> tuple[int, str]:
        """Return the size and version of a file, by a GET for one byte: signed URLs do not allow HEAD."""
        _, headers = self._get(url, {"Range": "bytes=0-0"}, 1)
        size = headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdigit():
            raise StoreError(f"{url}: the server does not say how long the file is")
        return int(size), headers.get("ETag") or headers.get("Last-Modified") or ""

    def _get(self, url: str, headers: dict[str, str], limit: int) -> tuple[bytes, Any]:
        """Return the body and the headers of an answer; retry transient errors until the time is over."""
        deadline = time.monotonic() + self._seconds
        try:
            return retry(
                lambda: self._get_once(url, headers, limit, deadline),
                lambda error: isinstance(error, _TransientWebError),
                pauses_until(deadline),
            )
        except _TransientWebError as error:
            raise StoreError(str(error)) from None

    def _get_once(self, url: str, headers: dict[str, str], limit: int, deadline: float) -> tuple[bytes, Any]:
        from requests import exceptions
        from urllib3.exceptions import HTTPError

        from unitoken.storage.web_session import PrivateAddressError

        remaining = max(0.1, deadline - time.monotonic())
        timeout = (min(CONNECT_SECONDS, remaining), min(READ_SECONDS, remaining))
        try:
            with self._session().get(url, headers=headers, stream=True, timeout=timeout) as answer:
                if answer.status_code == 416 and answer.headers.get("Content-Range", "").endswith("/0"):
                    return b"", answer.headers  # an empty file has no first byte
                _check_status(url, answer.status_code, partial="Range" in headers)
                return _read_body(url, answer, limit, deadline), answer.headers
        except PrivateAddressError:
            raise PrivateHostError(f"{url}: its host is of this machine or of a private network") from None
        except exceptions.SSLError:
            raise StoreError(f"{url}: bad certificate") from None
        except exceptions.TooManyRedirects:
            raise StoreError(f"{url}: too many redirects") from None
        except exceptions.Timeout:
            raise _TransientWebError(f"{url}: timeout") from None
        except (
            exceptions.ConnectionError,
            exceptions.ChunkedEncodingError,
            exceptions.ContentDecodingError,
            HTTPError,
        ):
            raise _TransientWebError(f"{url}: no connection, or one that broke off") from None
        except (exceptions.RequestException, ValueError):  # ValueError: some of urllib3's and idna's errors
            raise StoreError(f"{url}: not a URL that can be fetched, or it leads to one") from None

    def _session(self) -> Any:
        from unitoken.storage.web_session import WebSession

        if not hasattr(self._threads, "session"):
            session = WebSession(self._public_only)
            session.max_redirects = 5  # only to http:// and https://, as a session supports no other scheme
            session.headers["Accept-Encoding"] = "identity"  # ranges count the file's own bytes
            session.headers["User-Agent"] = "unitoken-streaming"
            self._threads.session = session
        return self._threads.session


def _check_status(url: str, status: int, partial: bool) -> None:
    if status in (404, 410):
        raise MissingError(f"{url}: not there")
    if status in (401, 403):
        raise StoreError(f"{url}: permission denied")
    if status in TRANSIENT_STATUSES:
        raise _TransientWebError(f"{url}: HTTP {status}")
    if partial and status == 200:
        raise StoreError(f"{url}: the server sends no parts of files (HTTP ranges): download it first")
    if status != (206 if partial else 200):
        raise StoreError(f"{url}: HTTP {status}")


def _read_body(url: str, answer: Any, limit: int, deadline: float) -> bytes:
    length = answer.headers.get("Content-Length", "")
    if length.isdigit() and int(length) > limit:
        raise TooLargeError(f"{url}: {length} bytes")
    data = bytearray()
    # read1 returns what has arrived; read() would wait for ever if the server sends a byte now and then.
    while block := answer.raw.read1(BLOCK_BYTES, decode_content=True):
        data += block
        if len(data) > limit:
            raise TooLargeError(f"{url}: more than {limit} bytes")
        if time.monotonic() > deadline:
            raise StoreError(f"{url}: timeout")
    return bytes(data)
