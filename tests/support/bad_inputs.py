"""Bad inputs made from good ones: damaged bytes, and JSON files with wrong values."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

WRONG_VALUES: tuple[Any, ...] = (None, -1, 10**12, 0, 1.5, True, "", "x", "../x", [], {}, [None], "\ud800")


def damaged(content: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Damage `content` in about `count` ways.

    The first are empty or junk; in the others bytes are cut, flipped, lost, inserted, swapped or zeroed.
    """
    choice = random.Random(seed)
    yield "empty", b""
    yield "junk", bytes(choice.randrange(256) for _ in range(200))
    yield "zeros", bytes(len(content))
    yield "text", b"<html>not here</html>"
    for number in range(max(0, count - 4)):
        at = choice.randrange(len(content))
        low, high = sorted((at, choice.randrange(len(content))))
        kind = ("cut", "flip", "lost", "put in", "swapped", "zeroed")[number % 6]
        new = {
            "cut": content[:at],
            "flip": content[:at] + bytes([content[at] ^ (1 << choice.randrange(8))]) + content[at + 1 :],
            "lost": content[:at] + content[at + choice.randrange(1, 9) :],
            "put in": content[:at] + bytes(choice.randrange(256) for _ in range(8)) + content[at:],
            "swapped": content[:low] + content[high:] + content[low:high],
            "zeroed": content[:low] + bytes(min(16, high - low)) + content[min(high, low + 16) :],
        }[kind]
        yield f"{kind} {number}", new


def wrong_json(content: bytes, most: int = 10**9, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Replace each value of a JSON file by each wrong value, or remove it; `most` of these, at random."""
    document = json.loads(content)
    changes = []
    for path in _paths(document):
        changes += [(path, value) for value in WRONG_VALUES] + [(path, "(missing)")]
    random.Random(seed).shuffle(changes)
    for path, value in changes[:most]:
        changed = copy.deepcopy(document)
        place = changed
        for key in path[:-1]:
            place = place[key]
        if value == "(missing)":
            del place[path[-1]]
        else:
            place[path[-1]] = value
        yield f"{'.'.join(map(str, path))} = {value!r}", json.dumps(changed).encode()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value; of a list, the first three items."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:3])
    for key, part in items:
        yield (*path, key)
        yield from _paths(part, (*path, key))
