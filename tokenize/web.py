"""Files behind http:// and https:// URLs, for reading."""

from __future__ import annotations

from typing import BinaryIO

WEB = ("http://", "https://")


def is_web(name: str) -> bool:
    return name.lower().startswith(WEB)


class Web:
    """In the spirit of `stores.Store`, as far as reading goes; a name is a whole URL."""

    def read_range(self, name: str, start: int, end: int) -> bytes:
        raise NotImplementedError

    def open(self, name: str) -> BinaryIO:
        raise NotImplementedError

    def size(self, name: str) -> int:
        raise NotImplementedError

    def version(self, name: str) -> str:
        raise NotImplementedError
