"""Amazon's S3 and other servers with its protocol."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from unitoken.storage.bucket import NO_ANSWER, Bucket

CONNECTIONS = 32  # to one server; more threads wait


class S3(Bucket):
    """Uses boto3 and its credentials; S3_ENDPOINT_URL names a server other than Amazon's."""

    def _server(self) -> str | None:
        """Return the address of the server; None is Amazon's."""
        return self.endpoint or os.environ.get("S3_ENDPOINT_URL")

    def _credentials(self, session: Any) -> dict[str, str] | None:
        """Set `_access`, and return keys for the client: {} if it finds them itself, None for no keys."""
        found = session.get_credentials()  # may send a request to the machine's metadata server: seconds
        if found is not None:
            # The method is env, shared-credentials-file, iam-role, ...
            self._access = f"with the credentials of boto3's '{found.method}'"
            return {}
        self._access = (
            "without credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role"
        )
        return None

    def _connect(self) -> Any:
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore import UNSIGNED
        from botocore.config import Config

        options: dict[str, Any] = {
            "connect_timeout": self._timeouts[0],
            "read_timeout": self._timeouts[1],
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "max_pool_connections": CONNECTIONS,
        }
        server = self._server()
        if server:  # few other servers know Amazon's new checksums
            options["request_checksum_calculation"] = "when_required"
            options["response_checksum_validation"] = "when_required"
        payers = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")
        requester_pays = self._bucket in [name.strip() for name in payers]
        self._extra = {"RequestPayer": "requester"} if requester_pays else {}
        # A shard is sent in one request: only files above 128 MiB are sent in parts.
        self._parts = TransferConfig(
            multipart_threshold=1 << 27, multipart_chunksize=1 << 26, use_threads=False
        )
        session = boto3.Session()
        keys = self._credentials(session)
        if keys is None:
            options["signature_version"] = UNSIGNED  # a public bucket
        return session.client("s3", endpoint_url=server, config=Config(**options), **(keys or {}))

    def _get(self, key: str, start: int, end: int | None) -> bytes:
        part = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
        answer = self._client.get_object(Bucket=self._bucket, Key=key, **part, **self._extra)
        with contextlib.closing(answer["Body"]) as body:
            return bytes(body.read())

    def _head(self, key: str) -> tuple[int, str]:
        head = self._client.head_object(Bucket=self._bucket, Key=key, **self._extra)
        return int(head["ContentLength"]), str(head["ETag"])

    def _list(self, prefix: str) -> Iterator[tuple[str, int]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=prefix, **self._extra
        )
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
            if error.response.get("Error", {}).get("Code") in ("ExpiredToken", "InvalidToken"):
                return 401  # S3 itself answers 400
            return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        no_credentials = (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.SSOError,
        )
        if isinstance(error, no_credentials):
            return 401
        # These share no base class; a refused connection, for one, is not an HTTPClientError.
        no_answer = (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            exceptions.IncompleteReadError,
            exceptions.CredentialRetrievalError,
        )
        return NO_ANSWER if isinstance(error, no_answer) else None
