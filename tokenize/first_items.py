"""Try the first items before the work begins: if none can be used, the settings or the whole input are wrong.

Nothing is written, so a corrected command finds the output as it was. Which items are tried depends on the
input alone.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter

from unitoken.codec.conversations import Conversation, ItemError, parse, refuse_empty
from unitoken.codec.sequence import check_system_turn
from unitoken.common.errors import ConfigError
from unitoken.dataset.image_files import ImageError
from unitoken.dataset.images import decoded
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.tokenize.config import TokenizeConfig
from unitoken.tokenize.rejects import CURES, kind_of
from unitoken.tokenize.sources import reader
from unitoken.tokenize.sources.adapters import ADAPTERS, Adapter, find_adapter, prepends_system
from unitoken.tokenize.sources.pictures import MAX_ITEM_BYTES, PictureReader

COUNT = 200
SECONDS = 60.0  # for pictures behind a slow network; the run itself finds what is not seen by then


def check_first_items(config: TokenizeConfig, input: reader.Input, vocabulary: Vocabulary) -> None:
    """Check that at least one of the first `COUNT` items can be used.

    An input of fewer items is begun, unless another adapter reads more of them: it is soon done, and its
    rejects tell more.

    Raises:
        ConfigError: all would be rejected. It names the commonest reason, and an adapter that reads more.
    """
    pieces = (reader.read_piece(input, piece) for piece in range(len(input.pieces)))
    items = itertools.islice(itertools.chain.from_iterable(pieces), COUNT)
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    tried: list[reader.RawItem] = []
    adapter = find_adapter(config.adapter)
    pictures = PictureReader(config.allow_http, config.allow_private, config.timeout_seconds)
    end = time.monotonic() + SECONDS
    for item in items:
        try:
            conversation = _parse_value(adapter, item.value, config, vocabulary)
            for source in conversation.images:
                if time.monotonic() > end:
                    return
                with decoded(pictures.read(reader.folder_of(input, item.file), source, MAX_ITEM_BYTES)):
                    pass
            return
        except (ItemError, ImageError) as error:
            kind = kind_of(str(error))
            reasons[kind] += 1
            examples.setdefault(kind, f"{input.files[item.file].name} item {item.position}: {error}")
            tried.append(item)
    hint = adapter_hint(config, [item.value for item in tried], vocabulary) if tried else ""
    if len(tried) == COUNT or hint:
        (kind, count), *_ = reasons.most_common(1)
        which = f"first {COUNT}" if len(tried) == COUNT else str(len(tried))
        raise ConfigError(
            f"none of the {which} items can be used; {count} times: {examples[kind]}"
            f"{CURES.get(kind, '')}{hint}"
        )


def _parse_value(
    adapter: Adapter, value: object, config: TokenizeConfig, vocabulary: Vocabulary
) -> Conversation:
    if isinstance(value, ItemError):
        raise value
    prepends = prepends_system(config, vocabulary)
    conversation = parse(adapter(value), "", prepends)  # type: ignore[arg-type]
    check_system_turn(conversation, vocabulary)
    if config.compat is None:
        refuse_empty(conversation)
    return conversation


def adapter_hint(config: TokenizeConfig, values: list[object], vocabulary: Vocabulary) -> str:
    """Return the end of a sentence that names the adapter reading the most items; "" if it is configured."""

    def count_readable(name: str) -> int:
        adapter, count = find_adapter(name), 0
        settings = config.model_copy(update={"adapter": name})
        for value in values:
            with contextlib.suppress(ItemError):
                _parse_value(adapter, value, settings, vocabulary)
                count += 1
        return count

    counts = {name: count_readable(name) for name in dict.fromkeys((config.adapter, *ADAPTERS))}
    best = max(counts, key=lambda name: counts[name])  # the first of equals: the configured one
    return f". adapter={best} reads {counts[best]} of them" if best != config.adapter else ""
