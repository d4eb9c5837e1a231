"""Bad inputs, made from good ones: bytes cut, flipped, replaced; every value of a JSON file replaced by every lie."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

LIES: tuple[Any, ...] = (None, -1, 10**12, 0, 1.5, True, "", "x", "../x", [], {}, [None], "\ud800")


def damaged(content: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` or so: nothing, junk, cuts, flipped bits, bytes that are lost or put in, parts that are swapped."""
    choice = random.Random(seed)
    yield "empty", b""
    yield "junk", bytes(choice.randrange(256) for _ in range(200))
    yield "zeros", bytes(len(content))
    yield "text", b"<html>not here</html>"
    for number in range(max(0, count - 4)):
        at = choice.randrange(len(content))
        other = choice.randrange(len(content))
        kind = ("cut", "flip", "lost", "put in", "swapped", "zeroed")[number % 6]
        low, high = sorted((at, other))
        new = {
            "cut": content[:at],
            "flip": content[:at] + bytes([content[at] ^ (1 << choice.randrange(8))]) + content[at + 1 :],
            "lost": content[:at] + content[at + choice.randrange(1, 9) :],
            "put in": content[:at] + bytes(choice.randrange(256) for _ in range(8)) + content[at:],
            "swapped": content[:low] + content[high:] + content[low:high],
            "zeroed": content[:low] + bytes(min(16, high - low)) + content[min(high, low + 16) :],
        }[kind]
        yield f"{kind} {number}", new


def lies(content: bytes, most: int = 10**9, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Each value of a JSON file, once as each of `LIES`, once missing; `most` of them, drawn at random."""
    document = json.loads(content)
    found = []
    for path in _paths(document):
        found += [(path, lie) for lie in LIES] + [(path, "(missing)")]
    random.Random(seed).shuffle(found)
    for path, lie in found[:most]:
        other = copy.deepcopy(document)
        place = other
        for key in path[:-1]:
            place = place[key]
        if lie == "(missing)":
            del place[path[-1]]
        else:
            place[path[-1]] = lie
        yield f"{'.'.join(map(str, path))} = {lie!r}", json.dumps(other).encode()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    for key, part in items:
        yield (*path, key)
        yield from _paths(part, (*path, key))
