"""Amazon's S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage, by their vendors' own libraries; see hub.py, too.

These are the libraries that mosaicml-streaming installs and reads with, so that one set of credentials serves both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from unitoken.streaming_data.bucket import NO_ANSWER, Bucket
from unitoken.streaming_data.config import ConfigError
from unitoken.streaming_data.stores import open_store

CONNECTIONS = 32  # to one server; more threads wait


def open_bucket(url: str, endpoint: str | None, patience: float) -> Bucket:
    """
    Raises:
        ConfigError: settings from which no client can be made.
    """
    scheme, _, rest = url.rstrip("/").partition("://")
    account = ""
    if scheme == "azure":  # azure://account/container/folder, as streaming writes it; az://container/folder, as others do
        account, _, rest = rest.partition("/")
    name, _, folder = rest.partition("/")
    if not name:
        raise ConfigError(f"{url}: expected the name of a {'container' if scheme in ('az', 'azure') else 'bucket'} in it")
    if scheme == "hf":
        from unitoken.streaming_data.hub import Hub

        return Hub(url, name, folder, None, patience)
    if scheme in ("az", "azure"):
        return Azure(url, name, folder, account, patience)
    if scheme == "gs" and not {"GCS_KEY", "GCS_SECRET"} <= os.environ.keys():
        return Google(url, name, folder, None, patience)
    return S3(url, name, folder, endpoint, patience)


class S3(Bucket):
    """S3_ENDPOINT_URL for servers other than Amazon's, and Google's by GCS_KEY and GCS_SECRET, as streaming reads them."""

    def _connect(self) -> Any:
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore import UNSIGNED
        from botocore.config import Config

        session, endpoint, keys = boto3.Session(), self.endpoint or os.environ.get("S3_ENDPOINT_URL"), {}
        if self.url.startswith("gs://"):
            endpoint = "https://storage.googleapis.com"
            keys = {"aws_access_key_id": os.environ["GCS_KEY"], "aws_secret_access_key": os.environ["GCS_SECRET"]}
        options: dict[str, Any] = {
            "connect_timeout": self._timeouts[0],
            "read_timeout": self._timeouts[1],
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "max_pool_connections": CONNECTIONS,
        }
        if endpoint:  # other servers know few of Amazon's new checksums
            options |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        if keys:
            self._access = "with GCS_KEY and GCS_SECRET"
        elif (found := session.get_credentials()) is not None:  # may ask the machine's metadata server: seconds
            self._access = f"with the credentials of boto3's '{found.method}'"  # env, shared-credentials-file, iam-role, ...
        else:
            self._access = "without credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role"
            options["signature_version"] = UNSIGNED  # a public bucket
        payers = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")
        self._extra = {"RequestPayer": "requester"} if self._bucket in [name.strip() for name in payers] else {}
        # By parts above 128 MiB: a shard is sent in one piece.
        self._parts = TransferConfig(multipart_threshold=1 << 27, multipart_chunksize=1 << 26, use_threads=False)
        return session.client("s3", endpoint_url=endpoint, config=Config(**options), **keys)

    def _get(self, key: str, start: int, end: int | None) -> bytes:
        part = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
        answer = self._client.get_object(Bucket=self._bucket, Key=key, **part, **self._extra)
        with contextlib.closing(answer["Body"]) as body:
            return bytes(body.read())

    def _head(self, key: str) -> tuple[int, str]:
        head = self._client.head_object(Bucket=self._bucket, Key=key, **self._extra)
        return int(head["ContentLength"]), str(head["ETag"])

    def _list(self, prefix: str) -> Iterator[tuple[str, int]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix, **self._extra)
        for page in pages:
            for entry in page.get("Contents", ()):
                yield entry["Key"], int(entry["Size"])

    def _put(self, key: str, file: BinaryIO) -> None:
        self._client.upload_fileobj(file, self._bucket, key, ExtraArgs=self._extra, Config=self._parts)

    def _remove(self, key: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=key, **self._extra)

    def _status(self, error: Exception) -> int | None:
        from botocore import exceptions

        if isinstance(error, exceptions.ClientError):
            if error.response.get("Error", {}).get("Code") in ("ExpiredToken", "InvalidToken"):  # S3 answers 400
                return 401
            return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.SSOError)):
            return 401
        # They share no base. A connection that is refused is not one of HTTPClientError.
        no_answer = exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError
        return NO_ANSWER if isinstance(error, (*no_answer, exceptions.CredentialRetrievalError)) else None


class Google(Bucket):
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
            self._access = "without credentials: set GOOGLE_APPLICATION_CREDENTIALS, or GCS_KEY and GCS_SECRET"
            return Client.create_anonymous_client()  # a public bucket
        self._access = "with Google's application default credentials"
        return Client(credentials=credentials, project=project or "none")

    @property
    def _options(self) -> dict[str, Any]:
        return {"timeout": self._timeouts, "retry": None}

    def _blob(self, key: str) -> Any:
        return self._client.bucket(self._bucket).blob(key)

    def _get(self, key: str, start: int, end: int | None) -> bytes:
        return bytes(self._blob(key).download_as_bytes(start=start, end=None if end is None else end - 1, **self._options))

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


class Azure(Bucket):
    """AZURE_STORAGE_CONNECTION_STRING, or AZURE_ACCOUNT_NAME with AZURE_ACCOUNT_ACCESS_KEY or what azure-identity finds."""

    def __init__(self, url: str, container: str, folder: str, account: str, patience: float) -> None:
        self._account = os.environ.get("AZURE_ACCOUNT_NAME") or account.partition(".")[0]
        super().__init__(url, container, folder, None, patience)

    def __reduce__(self) -> Any:
        return open_store, (self.url, None, self.patience)

    def _connect(self) -> Any:
        from azure.storage.blob import BlobServiceClient

        options: dict[str, Any] = {
            "connection_timeout": self._timeouts[0],
            "read_timeout": self._timeouts[1],
            "retry_total": 0,
        }
        if connection := os.environ.get("AZURE_STORAGE_CONNECTION_STRING"):
            self._access = "with AZURE_STORAGE_CONNECTION_STRING"
            return BlobServiceClient.from_connection_string(connection, **options).get_container_client(self._bucket)
        if not self._account:
            raise ConfigError(f"{self.url}: AZURE_ACCOUNT_NAME is not set")
        address = f"https://{self._account}.blob.core.windows.net"
        return BlobServiceClient(address, credential=self._credential(), **options).get_container_client(self._bucket)

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
