"""Datasets on Hugging Face's hub, read-only: hf://datasets/owner/name/folder, or name@revision.

Plain HTTP, with the same requests that huggingface_hub sends for one file. HF_ENDPOINT is the server,
HF_TOKEN gives access to private datasets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import quote

from unitoken.common.errors import ConfigError
from unitoken.storage.bucket import NO_ANSWER, Bucket
from unitoken.storage.store import StoreError


class HuggingFace(Bucket):
    """A folder of a dataset repository; a `@revision` behind its name selects a branch, tag or commit."""

    kind = "dataset"

    def _locate(self, path: str) -> tuple[str, str]:
        kind, owner, name, folder = (path + "///").split("/", 3)
        name, _, revision = name.partition("@")
        if kind != "datasets" or not owner or not name:
            raise ConfigError(
                f"{self.url}: expected hf://datasets/owner/name or hf://datasets/owner/name/folder"
            )
        self._revision = quote(revision or "main", safe="")
        return f"datasets/{owner}/{name}", folder.strip("/")

    def _connect(self) -> Any:
        from unitoken.storage.web_session import WebSession

        self._server = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        session = WebSession(public_only=False)
        self._access = "without a token: set HF_TOKEN"
        if token := os.environ.get("HF_TOKEN"):
            self._access = "with HF_TOKEN"
            session.headers["Authorization"] = f"Bearer {token}"
        session.headers["Accept-Encoding"] = "identity"  # ranges count the file's own bytes
        return session

    def _send(self, method: str, address: str, **options: Any) -> Any:
        answer = self._client.request(
            method, address, timeout=self._timeouts, allow_redirects=True, **options
        )
        answer.raise_for_status()
        return answer

    def _address(self, key: str) -> str:
        return f"{self._server}/{self._bucket}/resolve/{self._revision}/{quote(key)}"

    def _get(self, key: str, start: int, end: int | None) -> bytes:
        headers = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
        answer = self._send("GET", self._address(key), headers=headers)
        data: bytes = answer.content
        return data if answer.status_code == 206 or end is None else data[start:end]

    def _head(self, key: str) -> tuple[int, str]:
        headers = self._send("HEAD", self._address(key)).headers
        return int(headers["Content-Length"]), str(headers.get("ETag", ""))

    def _list(self, prefix: str) -> Iterator[tuple[str, int]]:
        folder = prefix.rpartition("/")[0]
        address = f"{self._server}/api/{self._bucket}/tree/{self._revision}/{quote(folder)}?recursive=true"
        while address:
            answer = self._send("GET", address)
            for entry in answer.json():
                if entry["type"] == "file" and entry["path"].startswith(prefix):
                    yield entry["path"], int(entry["size"])
            address = answer.links.get("next", {}).get("url", "")

    def _put(self, key: str, file: BinaryIO) -> None:  # noqa: ARG002
        raise StoreError(
            f"{self.url}: the hub is for reading only; upload a finished folder with its own tools"
        )

    def _remove(self, key: str) -> None:  # noqa: ARG002
        raise StoreError(f"{self.url}: the hub is for reading only")

    def _status(self, error: Exception) -> int | None:
        from requests.exceptions import HTTPError, RequestException

        if isinstance(error, HTTPError):
            return int(error.response.status_code)
        return NO_ANSWER if isinstance(error, RequestException) else None
