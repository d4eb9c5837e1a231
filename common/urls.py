"""How URLs are shown and stored: never with a user, a password or a query, which may be a signature."""

from __future__ import annotations

import re

# scheme://[user:password@]host/path[?query][#fragment], up to a space, a quote or a bracket.
_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s/?#'\"<>]*@)?([^\s?#'\"<>]*)(\?[^\s#'\"<>]*)?(#[^\s'\"<>]*)?"
)


def without_secrets(text: str) -> str:
    """`text` with every URL in it cut to scheme, host and path.

    "https://me:secret@host/cat.jpg?sig=abc: timeout" -> "https://host/cat.jpg: timeout"

    In the URLs of object stores a `?` without `=` behind it stays: it is a part of a name, or of a glob.
    """
    return _URL.sub(_shown, text) if "://" in text else text


def _shown(match: re.Match[str]) -> str:
    scheme, _, place, query, fragment = match.groups(default="")
    tail = query + fragment
    if scheme.lower() in ("http", "https") or "=" in tail:
        tail = ":" if tail.endswith(":") else ""  # the sentence's own colon
    return f"{scheme}://{place}{tail}"
