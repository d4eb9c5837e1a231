"""Checkpoint folders as tensors under our names: safetensors only, nothing is unpickled.

Names and shapes are read from the files' headers first, on every rank, so that what does not fit is an error before
anything is loaded, and before ranks wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor

from unitoken.streaming_data.config import ConfigError
from unitoken.train.folders import checkpoint_folder, tensor_files, tensor_shapes

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
V = TypeVar("V")


class Source(NamedTuple):
    """Where weights come from."""

    where: str
    shapes: Shapes
    load: Callable[[], Tensors]


def decoder_source(source: str) -> Source:
    """A Chameleon checkpoint: `model.*` and `lm_head.*`; `vit.*` and `adapter.*` too where it is UniToken's."""
    folder = checkpoint_folder(source)
    return Source(source, _decoder_names(tensor_shapes(folder)), lambda: _decoder_names(load_folder(folder)))


def vision_source(source: str) -> Source:
    """A SigLIP checkpoint: `vit.*`."""
    folder = checkpoint_folder(source)
    return Source(source, _vision_names(tensor_shapes(folder)), lambda: _vision_names(load_folder(folder)))


def _decoder_names(named: Mapping[str, V]) -> dict[str, V]:
    """Without the VQ-VAE that transformers keeps in `model.vqmodel`: it has no part in training."""
    return {name: value for name, value in named.items() if not name.startswith("model.vqmodel.")}


def _vision_names(named: Mapping[str, V]) -> dict[str, V]:
    """Without the pooling head, and without the text tower of a whole SigLIP."""
    if any(name.startswith("vision_model.") for name in named):
        named = {name.removeprefix("vision_model."): value for name, value in named.items() if name.startswith("vision_model.")}
    return {f"vit.{name}": value for name, value in named.items() if not name.startswith("head.")}


def load_folder(folder: Path) -> Tensors:
    """Every tensor of a checkpoint folder, in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in tensor_files(folder):
        try:
            tensors |= {name: tensor.float() for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not readable as safetensors: {error}") from None
    return tensors


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises ConfigError that lists what is missing, what is extra and what has another shape."""
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"not part of this model: {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, the model needs {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConfigError(f"{where}: {len(problems)} tensors do not fit: {'; '.join(problems[:8])}{more}")
