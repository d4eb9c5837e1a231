"""The store behind the path or URL of a folder. No other module decides by the scheme of a URL."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from unitoken.common.errors import ConfigError
from unitoken.storage import retry
from unitoken.storage.azure import Azure
from unitoken.storage.bucket import Bucket
from unitoken.storage.folder import Folder
from unitoken.storage.google import Google, GoogleS3
from unitoken.storage.huggingface import HuggingFace
from unitoken.storage.s3 import S3
from unitoken.storage.store import Store, is_url

_BUCKETS: dict[str, type[Bucket]] = {
    "s3": S3,
    "gs": Google,
    "az": Azure,
    "azure": Azure,  # as mosaicml-streaming writes it
    "hf": HuggingFace,
}


def open_bucket(url: str, endpoint: str | None = None, patience: float | None = None) -> Bucket:
    """Create a client for the URL of a folder in a bucket; arguments and errors are as in `open_store`."""
    scheme = url.partition("://")[0]
    bucket = _BUCKETS.get(scheme)
    if bucket is None:
        raise ConfigError(f"{url}: expected a path or a URL that begins with s3://, gs://, az:// or hf://")
    if bucket is Google and {"GCS_KEY", "GCS_SECRET"} <= os.environ.keys():
        bucket = GoogleS3
    return bucket(url, endpoint, retry.RETRY_SECONDS if patience is None else patience)


@functools.lru_cache(maxsize=256)
def open_store(url: str, endpoint: str | None = None, patience: float | None = None) -> Store:
    """Return the store behind the path or URL of a folder. No request is sent yet.

    Args:
        url: a path, or a URL of a folder in a bucket.
        endpoint: the address of the S3 server; None takes S3_ENDPOINT_URL, or else Amazon's.
        patience: seconds for which a failing request is repeated; None takes `retry.RETRY_SECONDS`.

    Raises:
        ConfigError: an unknown scheme, or settings that no client can be created from.
    """
    return open_bucket(url, endpoint, patience) if is_url(url) else Folder(Path(url))
