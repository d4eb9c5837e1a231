"""Check that the tokenizers in a stage's `codec` are those of its data. Torch is not needed."""

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


def describe_vocabulary(vocabulary: Vocabulary) -> str:
    """Return a vocabulary's fingerprint, size and layout, as "0123456789abcdef (65536 tokens)"."""
    layout = "" if vocabulary.layout is None else f" in the layout '{vocabulary.layout_name}'"
    return f"{vocabulary.fingerprint} ({vocabulary.size} tokens{layout})"


def check_codec(codec: CodecConfig, vocabulary: Vocabulary, manifests: Iterable[Manifest]) -> list[str]:
    """Check all that can be checked without loading the text tokenizer.

    Args:
        codec: the stage's tokenizers.
        vocabulary: the vocabulary of the stage's datasets.
        manifests: of the datasets.

    Returns:
        Warnings.

    Raises:
        ConfigError: no such tokenizer, or another codebook than the data's.
    """
    check_tokenizer_folder(codec.tokenizer)
    return check_image_tokenizer(codec, find_image_tokenizer(codec.vision), vocabulary, manifests)


def check_image_tokenizer(
    codec: CodecConfig, weights: Weights, vocabulary: Vocabulary, manifests: Iterable[Manifest]
) -> list[str]:
    """Check that an image tokenizer has the codebook of the data.

    Args:
        codec: the stage's tokenizers.
        weights: the weights that `codec.vision` names.
        vocabulary: the vocabulary of the stage's datasets.
        manifests: of the datasets.

    Returns:
        A warning for each of the data's fingerprints that differs; the weights may be a copy in another
        format.

    Raises:
        ConfigError: the codebook has another size.
    """
    name, codes = codec.vision.weights, len(vocabulary.image_ids)
    if weights.codebook_size != codes:
        raise ConfigError(
            f"codec.vision.weights: {name} has {weights.codebook_size} image codes, "
            f"the data's vocabulary has {codes}"
        )
    fingerprints = {manifest.vision.weights for manifest in manifests if manifest.images}
    return [
        f"codec.vision.weights: {name} has fingerprint {weights.fingerprint}, "
        f"image codes of the data are of {other}"
        for other in sorted(fingerprints - {UNKNOWN, weights.fingerprint})
    ]


def load_checked_tokenizer(codec: CodecConfig, vocabulary: Vocabulary) -> Any:
    """Load the text tokenizer, which takes transformers seconds.

    Raises:
        ConfigError: its vocabulary is not the data's.
    """
    tokenizer = load_tokenizer(codec.tokenizer)
    loaded = vocabulary.from_tokenizer(tokenizer.get_vocab(), len(vocabulary.image_ids))
    if loaded.fingerprint != vocabulary.fingerprint:
        raise ConfigError(
            f"codec.tokenizer: {codec.tokenizer} gives a vocabulary with fingerprint "
            f"{describe_vocabulary(loaded)}, the data is in {describe_vocabulary(vocabulary)}"
        )
    return tokenizer


def read_local_manifests(data: DataConfig) -> dict[str, Manifest]:
    """Read the manifests of the datasets that are on this machine, by the name of their stream."""
    folders = {name: Path(stream.local) for name, stream in data.streams.items() if stream.local}
    return {name: load_manifest(folder) for name, folder in folders.items() if (folder / MANIFEST).is_file()}
