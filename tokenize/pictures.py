"""The bytes of an item's images, wherever they are."""

from __future__ import annotations

MAX_ITEM_BYTES = 1 << 30  # of encoded images; a shard's offsets end at 4 GiB
