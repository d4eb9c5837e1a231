"""Settings of the tokenizers that turn text and pictures into ids, and back."""

from typing import Literal

from pydantic import Field

from unitoken.common.config import Config, Name


class ImageTokenizerConfig(Config):
    """The image tokenizer: its weights and how it runs."""

    kind: Literal["chameleon", "emu3", "janus"] = "chameleon"
    weights: Name
    """Folder, file or hub id."""
    batch_size: int = Field(default=8, ge=1, le=65536)
    """Images encoded at once."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """Changes codes; tf32 is what the reference runs with on a GPU."""
    compile: bool = False


class CodecConfig(Config):
    """The two tokenizers that a dataset was made with."""

    tokenizer: Name
    """Folder or hub id of the text tokenizer."""
    vision: ImageTokenizerConfig
    """The image tokenizer."""


FOLDERS_BEGIN_WITH = (".", "/", "~", "weights/")
"""A name that begins with one of these is a folder; no hub id does."""


def how_to_get(name: str) -> str:
    """Return how to get a missing file or folder that our own `yamls/` name, as the end of an error message.

    Returns "" for all other names.
    """
    if name.startswith("weights/vqgan"):
        return "; Meta gives it on request, and `unitoken convert-vqgan FOLDER weights/vqgan` converts it"
    return "; `make weights` fetches it" if name.startswith("weights/") else ""
