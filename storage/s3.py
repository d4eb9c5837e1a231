"""Amazon's S3 and servers that speak its protocol."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from unitoken.storage.bucket import NO_ANSWER, Bucket

CONNECTIONS = 32  # to one server; more threads wait


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
            keys = {
                "aws_access_key_id": os.environ["GCS_KEY"],
                "aws_secret_access_key": os.environ["GCS_SECRET"],
            }
        options: dict[str, Any] = {
            "connect_timeout": self._timeouts[0],
            "read_timeout": self._timeouts[1],
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "max_pool_connections": CONNECTIONS,
        }
        if endpoint:  # other servers know few of Amazon's new checksums
            options |= {
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            }
        if keys:
            self._access = "with GCS_KEY and GCS_SECRET"
        elif (
            found := session.get_credentials()
        ) is not None:  # may ask the machine's metadata server: seconds
            self._access = f"with the credentials of boto3's '{found.method}'"  # env, shared-credentials-file, iam-role, ...
        else:
            self._access = (
                "without credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role"
            )
            options["signature_version"] = UNSIGNED  # a public bucket
        payers = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")
        self._extra = (
            {"RequestPayer": "requester"} if self._bucket in [name.strip() for name in payers] else {}
        )
        # By parts above 128 MiB: a shard is sent in one piece.
        self._parts = TransferConfig(
            multipart_threshold=1 << 27, multipart_chunksize=1 << 26, use_threads=False
        )
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
            if error.response.get("Error", {}).get("Code") in (
                "ExpiredToken",
                "InvalidToken",
            ):  # S3 answers 400
                return 401
            return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        if isinstance(
            error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.SSOError)
        ):
            return 401
        # They share no base. A connection that is refused is not one of HTTPClientError.
        no_answer = exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError
        return NO_ANSWER if isinstance(error, (*no_answer, exceptions.CredentialRetrievalError)) else None
