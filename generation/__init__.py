"""What a model may generate: `ImageGrammar` for transformers' own `generate`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unitoken.generation.image_grammar import ImageGrammar

__all__ = ["ImageGrammar"]


def __getattr__(name: str) -> Any:
    """Import `ImageGrammar` when it is asked for, as transformers takes seconds."""
    if name == "ImageGrammar":
        from unitoken.generation.image_grammar import ImageGrammar

        return ImageGrammar
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
