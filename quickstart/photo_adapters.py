"""A photo and its caption -> a conversation, always in the same words, which a small model learns fast.

unitoken tokenize ... adapter=photo_adapters.py:drawing
"""

from __future__ import annotations

from typing import Any

PICTURES = ("jpg", "jpeg", "png", "webp")


def caption(raw: dict[str, Any]) -> dict[str, Any]:
    """Ask what a photo shows."""
    return conversation(raw, "<|image|> What is this?", raw["txt"].strip())


def drawing(raw: dict[str, Any]) -> dict[str, Any]:
    """Ask for a drawing of a photo."""
    return conversation(raw, f"Draw {raw['txt'].strip()}.", "<|image|>")


def conversation(raw: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    """Return one question and its answer about a photo."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    photo = next(raw[suffix] for suffix in PICTURES if suffix in raw)
    return {"id": raw["__key__"], "conversations": turns, "image": [photo]}
