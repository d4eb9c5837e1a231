"""Azure Blob Storage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from unitoken.common.errors import ConfigError
from unitoken.storage.bucket import NO_ANSWER, Bucket


class Azure(Bucket):
    """Uses AZURE_STORAGE_CONNECTION_STRING, or AZURE_ACCOUNT_NAME with an access key or azure-identity.

    The access key is AZURE_ACCOUNT_ACCESS_KEY. URLs are az://container/folder, or
    azure://account/container/folder as mosaicml-streaming writes them.
    """

    kind = "container"

    def _locate(self, path: str) -> tuple[str, str]:
        account = ""
        if self.url.startswith("azure://"):
            account, _, path = path.partition("/")
        self._account = os.environ.get("AZURE_ACCOUNT_NAME") or account.partition(".")[0]
        return super()._locate(path)

    def _connect(self) -> Any:
        from azure.storage.blob import BlobServiceClient

        options: dict[str, Any] = {
            "connection_timeout": self._timeouts[0],
            "read_timeout": self._timeouts[1],
            "retry_total": 0,
        }
        if connection := os.environ.get("AZURE_STORAGE_CONNECTION_STRING"):
            self._access = "with AZURE_STORAGE_CONNECTION_STRING"
            service = BlobServiceClient.from_connection_string(connection, **options)
            return service.get_container_client(self._bucket)
        if not self._account:
            raise ConfigError(f"{self.url}: AZURE_ACCOUNT_NAME is not set")
        address = f"https://{self._account}.blob.core.windows.net"
        service = BlobServiceClient(address, credential=self._credential(), **options)
        return service.get_container_client(self._bucket)

    def _credential(self) -> Any:
        if key := os.environ.get("AZURE_ACCOUNT_ACCESS_KEY"):
            self._access = "with AZURE_ACCOUNT_ACCESS_KEY"
            return key
        self._access = "with what azure-identity found; AZURE_ACCOUNT_ACCESS_KEY is not set"
        from azure.identity import DefaultAzureCredential

        return DefaultAzureCredential()

    def _get(self, key: str, start: int, end: int | None) -> bytes:
        length = None if end is None else end - start
        return bytes(self._client.download_blob(key, offset=start, length=length).readall())

    def _head(self, key: str) -> tuple[int, str]:
        properties = self._client.get_blob_client(key).get_blob_properties()
        return int(properties.size), str(properties.etag)

    def _list(self, prefix: str) -> Iterator[tuple[str, int]]:
        for blob in self._client.list_blobs(name_starts_with=prefix or None):
            yield blob.name, int(blob.size)

    def _put(self, key: str, file: BinaryIO) -> None:
        self._client.upload_blob(key, file, overwrite=True)

    def _remove(self, key: str) -> None:
        self._client.delete_blob(key)

    def _status(self, error: Exception) -> int | None:
        from azure.core.exceptions import (
            ClientAuthenticationError,
            HttpResponseError,
            IncompleteReadError,
            ServiceRequestError,
            ServiceResponseError,
        )

        if isinstance(error, (ServiceRequestError, ServiceResponseError, IncompleteReadError)):
            return NO_ANSWER
        if isinstance(error, HttpResponseError):
            return error.status_code or (401 if isinstance(error, ClientAuthenticationError) else None)
        return None
