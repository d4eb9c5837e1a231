"""Google Cloud Storage, by its own library or, with keys for interoperability, as an S3 server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from unitoken.storage.bucket import NO_ANSWER, Bucket
from unitoken.storage.s3 import S3


class Google(Bucket):
    """Uses STORAGE_EMULATOR_HOST, Google's application default credentials, or none for a public bucket."""

    def _connect(self) -> Any:
        from google.auth import default
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud.storage import Client

        if os.environ.get("STORAGE_EMULATOR_HOST"):
            self._access = "at STORAGE_EMULATOR_HOST"
            return Client.create_anonymous_client()
        try:
            credentials, project = default()
        except DefaultCredentialsError:
            self._access = (
                "without credentials: set GOOGLE_APPLICATION_CREDENTIALS, or GCS_KEY and GCS_SECRET"
            )
            return Client.create_anonymous_client()  # a public bucket
        self._access = "with Google's application default credentials"
        return Client(credentials=credentials, project=project or "none")

    @property
    def _options(self) -> dict[str, Any]:
        return {"timeout": self._timeouts, "retry": None}

    def _blob(self, key: str) -> Any:
        return self._client.bucket(self._bucket).blob(key)

    def _get(self, key: str, start: int, end: int | None) -> bytes:
        last = None if end is None else end - 1
        return bytes(self._blob(key).download_as_bytes(start=start, end=last, **self._options))

    def _head(self, key: str) -> tuple[int, str]:
        blob = self._blob(key)
        blob.reload(**self._options)
        return int(blob.size), str(blob.etag or blob.generation)

    def _list(self, prefix: str) -> Iterator[tuple[str, int]]:
        fields = "items(name,size),nextPageToken"
        for blob in self._client.list_blobs(self._bucket, prefix=prefix, fields=fields, **self._options):
            yield blob.name, int(blob.size)

    def _put(self, key: str, file: BinaryIO) -> None:
        self._blob(key).upload_from_file(file, rewind=True, checksum="crc32c", **self._options)

    def _remove(self, key: str) -> None:
        self._blob(key).delete(**self._options)

    def _status(self, error: Exception) -> int | None:
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError, TransportError
        from requests.exceptions import RequestException

        if isinstance(error, GoogleAPICallError):
            return int(error.code or NO_ANSWER)
        if isinstance(error, GoogleAuthError) and not isinstance(error, TransportError):
            return 401
        return NO_ANSWER if isinstance(error, (RequestException, TransportError)) else None


class GoogleS3(S3):
    """Google's buckets by the S3 protocol, with GCS_KEY and GCS_SECRET, as mosaicml-streaming reads them."""

    def _server(self) -> str | None:
        return "https://storage.googleapis.com"

    def _credentials(self, session: Any) -> dict[str, str] | None:  # noqa: ARG002
        self._access = "with GCS_KEY and GCS_SECRET"
        return {
            "aws_access_key_id": os.environ["GCS_KEY"],
            "aws_secret_access_key": os.environ["GCS_SECRET"],
        }
