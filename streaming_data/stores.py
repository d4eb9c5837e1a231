"""Files in a folder of this machine or in an object store, by one small set of verbs.

    store = open_store("s3://bucket/folder")      # or gs://, az://container/folder, or a path
    store.write("index.json", data); store.read("index.json"); store.sizes("chunk-000000/")

Credentials come from where each cloud's own tools look for them: the AWS variables, profiles and roles (with
S3_ENDPOINT_URL for other servers), Google's application default credentials (STORAGE_EMULATOR_HOST for an emulator),
AZURE_ACCOUNT_NAME with AZURE_ACCOUNT_ACCESS_KEY: the variables that mosaicml-streaming reads, too. Requests that fail
on the way are repeated with growing pauses for RETRY_SECONDS in all.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.files import aside, write_aside

CLOUDS = ("s3", "gs", "az", "azure")  # azure:// is how mosaicml-streaming writes az://
RETRY_SECONDS = 120.0
CONNECT_SECONDS = 10.0
REQUEST_SECONDS = 60.0
PART_BYTES = 1 << 23  # a file is downloaded by parts of this size: each has REQUEST_SECONDS


class StoreError(OSError):
    """A file or bucket that can not be read or written, in words; MissingError where it is not there at all."""


class MissingError(StoreError):
    pass


class Store(Protocol):
    """Names are relative, with `/`, whatever the store. Every verb raises StoreError, or MissingError for no such file."""

    url: str

    def read(self, name: str) -> bytes: ...

    def read_range(self, name: str, start: int, end: int) -> bytes: ...

    def open(self, name: str) -> BinaryIO:
        """For reading, seekable."""
        ...

    def size(self, name: str) -> int: ...

    def version(self, name: str) -> str:
        """Changes when the file's content does, as far as the store can tell without reading it."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Every file whose name begins with `prefix`, by name, with its size."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """All of it or nothing: no reader sees a part."""
        ...

    def upload(self, path: Path, name: str) -> None:
        """As `write`, from a file of this machine; its size is checked at the other end."""
        ...

    def delete(self, name: str) -> None:
        """No error if it is not there."""
        ...


def is_url(name: str) -> bool:
    return "://" in name


def join(base: str, name: str) -> str:
    """`name` as seen from the folder or URL `base`; an absolute path or a URL stays what it is."""
    if is_url(name):
        return name
    if is_url(base):
        return f"{base.rstrip('/')}/{name}"
    return os.path.join(base, name)  # noqa: PTH118 - keeps what the user wrote; Path would drop './'


def split(name: str) -> tuple[str, str]:
    """A file's folder and its name there."""
    folder, _, file = name.rpartition("/")
    if not is_url(name):
        return (folder or ("/" if name.startswith("/") else ".")), file
    return folder, file


@functools.lru_cache(maxsize=256)
def open_store(url: str) -> Store:
    """The store behind a path or URL of a folder. Nothing is asked of a server yet.

    Raises:
        ConfigError: an unknown scheme, or settings from which no client can be made.
    """
    if not is_url(url):
        return Folder(Path(url))
    scheme = url.partition("://")[0]
    if scheme not in CLOUDS:
        raise ConfigError(f"{url}: expected a path or a URL that begins with s3://, gs:// or az://")
    return Bucket(url)


class Folder:
    """A folder of this machine, made when the first file is written."""

    def __init__(self, path: Path) -> None:
        self.url = str(path)
        self._path = path

    def read(self, name: str) -> bytes:
        with _os_errors():
            return (self._path / name).read_bytes()

    def read_range(self, name: str, start: int, end: int) -> bytes:
        with _os_errors(), open(self._path / name, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def open(self, name: str) -> BinaryIO:
        with _os_errors():
            return open(self._path / name, "rb")

    def size(self, name: str) -> int:
        with _os_errors():
            return (self._path / name).stat().st_size

    def version(self, name: str) -> str:
        with _os_errors():
            status = (self._path / name).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found: dict[str, int] = {}
        start = self._path / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(start):
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(self._path).as_posix()
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    if relative.startswith(prefix):
                        found[relative] = path.stat().st_size
        return dict(sorted(found.items()))

    def write(self, name: str, data: bytes) -> None:
        with _os_errors():
            (self._path / name).parent.mkdir(parents=True, exist_ok=True)
            write_aside(self._path / name, data)

    def upload(self, path: Path, name: str) -> None:
        target = self._path / name
        with _os_errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = aside(target)
            try:
                shutil.copyfile(path, temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        with _os_errors():
            (self._path / name).unlink(missing_ok=True)


class Bucket:
    """A folder of an object store, by obstore. Safe over threads; a process that was forked makes its own client."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._clients: dict[int, Any] = {os.getpid(): _client(self.url)}  # so that a wrong setting shows here

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.url,)

    @property
    def _client(self) -> Any:
        if os.getpid() not in self._clients:
            self._clients[os.getpid()] = _client(self.url)
        return self._clients[os.getpid()]

    def read(self, name: str) -> bytes:
        with self._errors(name):
            result = self._client.get(name)
            return bytes(result.bytes())

    def read_range(self, name: str, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        from obstore.exceptions import BaseError

        with self._errors(name):
            try:
                return bytes(self._client.get_range(name, start=start, end=end))
            except BaseError as error:
                if "NotPartial" not in str(error):
                    raise
                # Some servers (rclone's) answer a range with status 200 instead of 206, which obstore takes for the whole.
                return self._cut(name, start, end)

    def _cut(self, name: str, start: int, end: int) -> bytes:
        """The range out of the whole file, read as far as the range goes."""
        parts, at = [], 0
        for part in self._client.get(name).stream():
            parts.append(bytes(part)[max(0, start - at) : max(0, end - at)])
            at += len(part)
            if at >= end:
                break
        return b"".join(parts)

    def open(self, name: str) -> BinaryIO:
        with self._errors(name):
            return io.BufferedReader(_Ranges(self, name, self.size(name)), PART_BYTES)

    def size(self, name: str) -> int:
        with self._errors(name):
            return int(self._client.head(name)["size"])

    def version(self, name: str) -> str:
        with self._errors(name):
            head = self._client.head(name)
        return f"{head['size']}-{head['e_tag'] or head['last_modified'].isoformat()}"

    def sizes(self, prefix: str = "") -> dict[str, int]:
        # Object stores list by whole folders: what the last part of the prefix narrows down is done here.
        folder = prefix.rpartition("/")[0]
        with self._errors(prefix or "."):
            pages = list(self._client.list(prefix=folder or None))
        entries = {entry["path"]: int(entry["size"]) for page in pages for entry in page}
        return {name: size for name, size in sorted(entries.items()) if name.startswith(prefix)}

    def write(self, name: str, data: bytes) -> None:
        with self._errors(name):
            self._client.put(name, data)

    def upload(self, path: Path, name: str) -> None:
        with self._errors(name):
            self._client.put(name, path)
        size, expected = self.size(name), path.stat().st_size
        if size != expected:
            self.delete(name)
            raise StoreError(f"{self.url}/{name}: {size} bytes arrived of {expected}")

    def delete(self, name: str) -> None:
        with contextlib.suppress(MissingError), self._errors(name):
            self._client.delete(name)

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError

        where = f"{self.url}/{name}"
        try:
            yield
        except StoreError:
            raise
        except (NotFoundError, FileNotFoundError):
            raise MissingError(f"{where}: not there") from None
        except (PermissionDeniedError, UnauthenticatedError):
            raise StoreError(f"{where}: permission denied") from None
        except (BaseError, OSError, ValueError) as error:
            # obstore's message goes on with the whole request; its first words say what happened.
            raise StoreError(f"{where}: {' '.join(str(error).split())[:200]}") from None


def _client(url: str) -> Any:
    from obstore.store import AzureStore, GCSStore, S3Store

    scheme = url.partition("://")[0]
    options: dict[str, Any] = {
        "client_options": {"timeout": timedelta(seconds=REQUEST_SECONDS), "connect_timeout": timedelta(seconds=CONNECT_SECONDS)},
        "retry_config": {"max_retries": 10, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
    }
    environment = os.environ
    try:
        if scheme == "s3":
            if endpoint := environment.get("S3_ENDPOINT_URL"):
                options["endpoint"] = endpoint
                options["client_options"]["allow_http"] = endpoint.startswith("http://")
            if "AWS_ACCESS_KEY_ID" not in environment:  # profiles and roles, which obstore does not read by itself
                import boto3

                session = boto3.Session()
                if session.get_credentials() is None:
                    options["skip_signature"] = True  # a public bucket, as streaming reads it
                else:
                    from obstore.auth.boto3 import Boto3CredentialProvider

                    options["credential_provider"] = Boto3CredentialProvider(session)
            return S3Store.from_url(url, **options)
        if scheme == "gs":
            if emulator := environment.get("STORAGE_EMULATOR_HOST"):
                options["base_url"] = emulator if is_url(emulator) else f"http://{emulator}"
                options["bearer_token"] = "none"  # noqa: S105 - else writing asks Google for one
                options["client_options"]["allow_http"] = True
            return GCSStore.from_url(url, **options)
        if account := environment.get("AZURE_ACCOUNT_NAME"):
            options["account_name"] = account
        if key := environment.get("AZURE_ACCOUNT_ACCESS_KEY"):
            options["account_key"] = key
        return AzureStore.from_url(url.replace("azure://", "az://", 1), **options)
    except Exception as error:  # obstore's, boto's and google's errors share no base
        raise ConfigError(f"{url}: {' '.join(str(error).split())[:200]}") from None


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError(f"{error.filename}: not there") from None
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(error.errno, f"{error.filename}: {error.strerror}") from None


class _Ranges(io.RawIOBase):
    """An object as a seekable file; BufferedReader asks for PART_BYTES at a time."""

    def __init__(self, bucket: Bucket, name: str, size: int) -> None:
        self._bucket, self._name, self._size, self._at = bucket, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._bucket.read_range(self._name, self._at, min(self._size, self._at + len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
