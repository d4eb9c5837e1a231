"""How URLs are shown and stored: without user, password and query, as the query may hold a signature."""

from __future__ import annotations

import re

# scheme://[user:password@]host/path[?query][#fragment], up to a space, a quote or a bracket.
_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s/?#'\"<>]*@)?([^\s?#'\"<>]*)(\?[^\s#'\"<>]*)?(#[^\s'\"<>]*)?"
)


def without_secrets(text: str) -> str:
    """Reduce every URL in `text` to scheme, host and path.

    "https://me:secret@host/cat.jpg?sig=abc: timeout" -> "https://host/cat.jpg: timeout"

    In URLs of object stores a `?` that is not followed by a `=` is kept: it is part of a name or a glob.
    """
    return _URL.sub(_without_secrets, text) if "://" in text else text


def _without_secrets(match: re.Match[str]) -> str:
    scheme, _, host_and_path, query, fragment = match.groups(default="")
    tail = query + fragment
    if scheme.lower() in ("http", "https") or "=" in tail:
        tail = ":" if tail.endswith(":") else ""  # a colon at the end belongs to the sentence
    return f"{scheme}://{host_and_path}{tail}"
