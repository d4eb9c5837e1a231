"""Which tokenizers turn text and pictures into ids, and back."""

from typing import Literal

from pydantic import Field

from unitoken.common.config import Config, Name


class ImageTokenizerConfig(Config):
    kind: Literal["chameleon", "emu3", "janus"] = "chameleon"
    weights: Name
    """Folder, file or hub id."""
    batch_size: int = Field(default=8, ge=1, le=65536)
    """Images encoded at once."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """Changes codes; tf32 is what the reference runs with on a GPU."""
    compile: bool = False


FOLDERS_BEGIN_WITH = (".", "/", "~", "weights/")  # and ids of the hub do not


def how_to_get(name: str) -> str:
    """For the end of a message that `name` is not there: where what our own `yamls/` name comes from."""
    if not name.startswith("weights/"):
        return ""
    if name.startswith("weights/vqgan"):
        return "; Meta gives it on request, and `python -m unitoken.tokenize convert-vqgan FOLDER weights/vqgan` converts it"
    return "; `make weights` fetches it"


class CodecConfig(Config):
    tokenizer: Name
    """Folder or hub id of the text tokenizer."""
    vision: ImageTokenizerConfig
    """The image tokenizer."""
