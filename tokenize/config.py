"""The settings of a tokenization. `yamls/tokenize/chameleon.yaml` explains each for those who fill it in."""

from __future__ import annotations

from typing import Literal

import pydantic
from pydantic import Field

from unitoken.codec.config import ImageTokenizerConfig
from unitoken.common.config import Config, Name


class TokenizeConfig(Config):
    """The settings' YAML file of `unitoken tokenize`."""

    tokenizer: Name
    """Folder or Hugging Face hub id of the text tokenizer."""
    vision: ImageTokenizerConfig
    """The image tokenizer."""
    layout: Name = "chameleon"
    """How conversations and images become tokens: `chameleon`, `chat_template` (the tokenizer's), `emu3`, or
    the YAML file of a layout of your own."""
    system: Literal["reject", "prepend"] | None = None
    """What becomes of an item with a system turn: `prepend` puts its text before the first question. By
    default the layout decides; where it has no system turns, `adapter: standard` rejects the item and the
    other adapters prepend."""
    adapter: Name = "standard"
    """What turns your items into standard ones: a name (standard, sharegpt, messages, caption, drawing,
    caption_or_drawing, editing), or path/to/file.py:function."""
    target_size: int = Field(default=512, ge=2, le=2**14)
    """Pixels of a side of the square; a multiple of 2 latents of the image tokenizer."""
    crop: Literal["square", "aspect"] = "square"
    """How an image is cut: to a square, or to the rectangle of about `target_size` squared pixels that keeps
    most of it."""
    crop_position: Literal["center", "random"] = "center"
    """Where an image is cut; `random` depends on `seed` and the item's id alone."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of random crops, together with the item's id."""
    allow_http: bool = False
    """Fetch images named by http:// and https:// URLs."""
    allow_private: bool = False
    """Fetch them also from loopback, private and link-local addresses."""
    timeout_seconds: float = Field(default=30.0, gt=0, le=86400)
    """For an image over http, with its retries."""
    max_tokens: int | None = Field(default=None, ge=1, le=2**24)
    """Longer items are rejected."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of each process that fetch and decode images; None: by the number of cores."""
    chunk_size: int = Field(default=1000, ge=1, le=10**7)
    """Items of a chunk: what each process loses at most when a run is killed."""
    max_reject_fraction: float = Field(default=0.01, ge=0, le=1)
    """The run ends with status 1 if a larger fraction of the items is rejected."""
    compat: Literal["unitoken"] | None = None
    """Repeat the reference's rules, also where ours differ; for the layout `chameleon`."""

    @pydantic.model_validator(mode="after")
    def _compat_has_the_layout_of_the_reference(self) -> TokenizeConfig:
        if self.compat is not None and self.layout != "chameleon":
            raise ValueError(f"layout: compat 'unitoken' needs 'chameleon', found '{self.layout}'")
        return self
