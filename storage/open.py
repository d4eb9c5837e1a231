"""A path or URL of a folder -> its store."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from unitoken.common.errors import ConfigError
from unitoken.storage.azure import Azure
from unitoken.storage.bucket import Bucket
from unitoken.storage.folder import Folder
from unitoken.storage.google import Google
from unitoken.storage.huggingface import HuggingFace
from unitoken.storage.s3 import S3
from unitoken.storage.store import CLOUDS, RETRY_SECONDS, Store, is_url


def open_bucket(url: str, endpoint: str | None, patience: float) -> Bucket:
    """Raises:
    ConfigError: settings from which no client can be made.
    """
    scheme = url.partition("://")[0]
    if scheme == "hf":
        return HuggingFace(url, None, patience)
    if scheme in ("az", "azure"):
        return Azure(url, None, patience)
    if scheme == "gs" and not {"GCS_KEY", "GCS_SECRET"} <= os.environ.keys():
        return Google(url, None, patience)
    return S3(url, endpoint, patience)


@functools.lru_cache(maxsize=256)
def open_store(url: str, endpoint: str | None = None, patience: float = RETRY_SECONDS) -> Store:
    """The store behind a path or URL of a folder. Nothing is asked of a server yet.

    Args:
        endpoint: the S3 server; default S3_ENDPOINT_URL, or Amazon's.
        patience: seconds after which a server that does not answer, or not rightly, is an error.

    Raises:
        ConfigError: an unknown scheme, or settings from which no client can be made.
    """
    if not is_url(url):
        return Folder(Path(url))
    scheme = url.partition("://")[0]
    if scheme not in CLOUDS:
        raise ConfigError(f"{url}: expected a path or a URL that begins with s3://, gs://, az:// or hf://")
    return open_bucket(url, endpoint, patience)
