"""Whether the tokenizers that a stage's `codec` names are those that its data was made with. Torch is not needed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unitoken.codec.config import CodecConfig
from unitoken.codec.image_tokenizer.files import Weights, find_image_tokenizer
from unitoken.codec.text import check_tokenizer_folder, load_tokenizer
from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import MANIFEST, UNKNOWN, Manifest, load_manifest
from unitoken.dataset.vocabulary import Vocabulary
from unitoken.streaming_data.settings import DataConfig


def check_codec(codec: CodecConfig, vocabulary: Vocabulary, manifests: Iterable[Manifest]) -> list[str]:
    """All that can be said before the tokenizer is loaded: what is odd, a line each. Raises ConfigError."""
    check_tokenizer_folder(codec.tokenizer)
    return check_image_tokenizer(codec, find_image_tokenizer(codec.vision), vocabulary, manifests)


def check_image_tokenizer(
    codec: CodecConfig, found: Weights, vocabulary: Vocabulary, manifests: Iterable[Manifest]
) -> list[str]:
    """Raises ConfigError for another codebook; a line for other weights of that size, maybe a copy of the data's."""
    name, codes = codec.vision.weights, len(vocabulary.image_ids)
    if found.codebook_size != codes:
        raise ConfigError(
            f"codec.vision.weights: {name} has {found.codebook_size} image codes, the data's vocabulary has {codes}"
        )
    made_by = {manifest.vision.weights for manifest in manifests if manifest.images} - {
        UNKNOWN,
        found.fingerprint,
    }
    return [
        f"codec.vision.weights: {name} has fingerprint {found.fingerprint}, image codes of the data are of {other}"
        for other in sorted(made_by)
    ]


def checked_tokenizer(codec: CodecConfig, vocabulary: Vocabulary) -> Any:
    """The text tokenizer (transformers: seconds). Raises ConfigError where it gives another vocabulary than the data's."""
    tokenizer = load_tokenizer(codec.tokenizer)
    theirs = Vocabulary.from_tokens(tokenizer.get_vocab(), len(vocabulary.image_ids))
    if theirs.fingerprint != vocabulary.fingerprint:
        raise ConfigError(
            f"codec.tokenizer: {codec.tokenizer} gives a vocabulary with fingerprint {theirs.fingerprint} ({theirs.size} tokens), "
            f"the data is in {vocabulary.fingerprint} ({vocabulary.size} tokens)"
        )
    return tokenizer


def manifests_here(data: DataConfig) -> list[Manifest]:
    """Of the datasets that are still on this machine."""
    folders = [Path(stream.local) for stream in data.streams.values() if stream.local]
    return [load_manifest(folder) for folder in folders if (folder / MANIFEST).is_file()]
