"""A look at the first items before the work begins: where none of them can be used, something is wrong with all.

Nothing is written, so that a corrected command finds the output as it was. What is looked at depends on the input alone.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections import Counter

from unitoken.codec.conversations import Conversation, ItemError, parse, refuse_empty
from unitoken.common.errors import ConfigError
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import decoded
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.sources import reader
from unitoken.tokenize.sources.adapters import ADAPTERS, Adapter, find_adapter
from unitoken.tokenize.sources.pictures import MAX_ITEM_BYTES, PictureReader

COUNT = 200
SECONDS = 60.0  # for pictures that are far away; what is not seen by then is left to the work


def check_first_items(config: TokenizeConfig, input: reader.Input) -> None:
    """Raises ConfigError where the first `COUNT` items would all be rejected: with the commonest reason, and the adapter that
    takes more of them.
    """
    adapter, pictures = (
        find_adapter(config.adapter),
        PictureReader(config.allow_http, config.allow_private, config.timeout_seconds),
    )
    items = itertools.chain.from_iterable(
        reader.read_piece(input, piece) for piece in range(len(input.pieces))
    )
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    seen: list[reader.Item] = []
    end = time.monotonic() + SECONDS
    for item in itertools.islice(items, COUNT):
        try:
            conversation = _conversation(adapter, item, config.compat is not None)
            for source in conversation.images:
                if time.monotonic() > end:
                    return
                with decoded(pictures.read(reader.folder_of(input, item.file), source, MAX_ITEM_BYTES)):
                    pass
            return  # one that can be used is enough
        except (ItemError, ImageError) as error:
            kind = str(error).partition(": ")[0]
            reasons[kind] += 1
            examples.setdefault(kind, f"{input.files[item.file].name} item {item.position}: {error}")
            seen.append(item)
    if len(seen) < COUNT:  # so few are soon done, and their rejects tell more
        if seen and (hint := _likelier(config, seen)):
            print(f"none of the {len(seen)} items can be used{hint}", file=sys.stderr)
        return
    (kind, count), *_ = reasons.most_common(1)
    raise ConfigError(
        f"none of the first {COUNT} items can be used; {count} times: {examples[kind]}{_likelier(config, seen)}"
    )


def _conversation(adapter: Adapter, item: reader.Item, compat: bool) -> Conversation:
    if isinstance(item.value, ItemError):
        raise item.value
    conversation = parse(adapter(item.value), "")  # type: ignore[arg-type]
    if not compat:
        refuse_empty(conversation)
    return conversation


def _likelier(config: TokenizeConfig, items: list[reader.Item]) -> str:
    def taken(name: str) -> int:
        adapter, count = find_adapter(name), 0
        for item in items:
            with contextlib.suppress(ItemError):
                _conversation(adapter, item, config.compat is not None)
                count += 1
        return count

    counts = {name: taken(name) for name in dict.fromkeys((config.adapter, *ADAPTERS))}
    best = max(counts, key=lambda name: counts[name])  # the first of equals: the one that was asked for
    return f". adapter={best} reads {counts[best]} of them" if best != config.adapter else ""
