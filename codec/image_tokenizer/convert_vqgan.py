"""Meta's `vqgan.ckpt` -> `vqgan.safetensors`.

    convert_vqgan(Path("chameleon/tokenizer"), Path("weights/vqgan"))     # copies vqgan.yaml, too

The pickled file is read with `weights_only`: no code in it runs. The converted weights give the same codes
and keep the fingerprint that is stored in datasets.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from unitoken.codec.config import ImageTokenizerConfig
from unitoken.codec.image_tokenizer.chameleon import meta_name
from unitoken.codec.image_tokenizer.files import (
    CONVERTED_FROM,
    CONVERTED_TO,
    Parameters,
    data_sha256,
    find_image_tokenizer,
)
from unitoken.codec.image_tokenizer.network import load_network
from unitoken.common.errors import ConfigError
from unitoken.common.files import AsideFolder

CHECKPOINT, CONVERTED = "vqgan.ckpt", "vqgan.safetensors"


def convert_vqgan(source: Path, out: Path) -> str:
    """Convert a checkpoint.

    Args:
        source: the folder with vqgan.yaml and vqgan.ckpt.
        out: the folder to write, which must not exist.

    Returns:
        The weights' fingerprint.

    Raises:
        ConfigError: a file is missing or does not fit. Nothing is written then.
    """
    if out.exists():
        raise ConfigError(f"{out}: it is there already")
    checkpoint = source / CHECKPOINT
    if not checkpoint.is_file():
        raise ConfigError(f"{source}: no {CHECKPOINT} in it")
    weights = find_image_tokenizer(ImageTokenizerConfig(weights=str(checkpoint)))
    assert isinstance(weights.shape, Parameters)
    levels = len(weights.shape.ddconfig.ch_mult)
    tensors = {
        meta_name(name, levels): tensor.contiguous()
        for name, tensor in load_network("chameleon", weights).state_dict().items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with AsideFolder(out) as folder:
        (folder.path / "vqgan.yaml").write_bytes(checkpoint.with_suffix(".yaml").read_bytes())
        target = folder.path / CONVERTED
        target.write_bytes(save(tensors))
        metadata = {"format": "pt", CONVERTED_FROM: weights.fingerprint, CONVERTED_TO: data_sha256(target)}
        target.write_bytes(save(tensors, metadata))
        folder.publish()
    return weights.fingerprint
