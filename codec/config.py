"""Settings of the tokenizers that turn text and pictures into ids, and back."""

from typing import Literal

from pydantic import Field

from unitoken.common.config import Config, Name


class ImageTokenizerConfig(Config):
    """The image tokenizer: its weights and how it runs."""

    kind: Literal["chameleon", "emu3", "janus"] = "chameleon"
    """Whose network it is."""
    weights: Name
    """Folder, file or hub id."""
    batch_size: int = Field(default=8, ge=1, le=65536)
    """Images encoded at once."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """Changes codes; tf32 is what the reference runs with on a GPU."""
    compile: bool = False
    """Compile the encoder with torch.compile, which takes some minutes at the start."""


class CodecConfig(Config):
    """The two tokenizers that a dataset was made with."""

    tokenizer: Name
    """Folder or hub id of the text tokenizer."""
    vision: ImageTokenizerConfig
    """The image tokenizer."""


FOLDERS_BEGIN_WITH = (".", "/", "~", "weights/")
"""A name that begins with one of these is a folder; no hub id does."""


OPEN_WEIGHTS = ("Qwen/Qwen3-0.6B", "deepseek-community/Janus-Pro-1B", "google/siglip-base-patch16-224")
"""What `yamls/open/` begins with: a language model, an image tokenizer and a vision tower."""
CHAMELEON_WEIGHTS = ("Alpha-VLLM/Lumina-mGPT-7B-512", "google/siglip-so400m-patch14-384")
"""What `yamls/stage1.yaml` begins with; Meta gives the image tokenizer on request."""


def how_to_get(name: str) -> str:
    """Return how to get a missing file or folder that our own `yamls/` name, as the end of an error message.

    Returns "" for all other names.
    """
    if name.startswith("weights/vqgan"):
        return (
            "; Meta gives it on request, and `unitoken convert-vqgan FOLDER weights/vqgan` converts it; or "
            "begin with yamls/open/, whose weights `unitoken weights open` fetches"
        )
    for command, ids in (("open", OPEN_WEIGHTS), ("chameleon", CHAMELEON_WEIGHTS)):
        if any(name.startswith(f"weights/{hub_id.split('/')[1]}") for hub_id in ids):
            return f"; `unitoken weights {command}` fetches it"
    return ""
