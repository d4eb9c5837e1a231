"""Read tensors of checkpoint folders under our names: safetensors only, nothing is unpickled.

Names and shapes are read from the files' headers first, on every rank, so that weights that do not fit are an
error before anything is loaded and before ranks wait for each other. Tensors are then read one by one:
loading takes the model's own memory in float32 and that of one more tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.families import EMBEDDING, HEAD, decoder_names
from unitoken.train.checkpoint.integrity import check_finite, check_tensor_file
from unitoken.train.checkpoint.layouts import stored_tensors
from unitoken.train.checkpoint.locations import checkpoint_folder

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

HEAD_NORM = re.compile(r"\.[qk]_norm\.(weight|bias)$")
LISTED_PROBLEMS = 8  # the most tensors that a message names


class TensorSource(NamedTuple):
    """Weights that can be read.

    Attributes:
        where: the file or folder, for messages.
        shapes: shapes by our names.
        read: returns the tensors of given names, in float32.
    """

    where: str
    shapes: Shapes
    read: Callable[[Collection[str]], Tensors]

    def load(self) -> Tensors:
        """Read all tensors."""
        return self.read(self.shapes)


def parameter_shapes(model: nn.Module) -> Shapes:
    """Return the shapes of a model's parameters."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def open_decoder_folder(source: str) -> TensorSource:
    """Open a decoder's checkpoint.

    It has `model.*` and `lm_head.*`, and if it is UniToken's or exported by us also `vit.*` and `adapter.*`.

    Args:
        source: a folder or a hub id.
    """
    return _open_folder(source, decoder_names)


def open_vision_folder(source: str) -> TensorSource:
    """Open a SigLIP checkpoint as `vit.*`, without the pooling head.

    Args:
        source: a folder or a hub id, of a vision tower, a whole SigLIP, or a UniToken.
    """
    return _open_folder(source, _vision_names)


def _vision_names(stored: Iterable[str]) -> dict[str, str]:
    """Return the stored name of each of the tower's tensors, by our name."""
    stored = list(stored)
    prefixes = ("vit.", "vision_model.")
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in stored)), "")
    names = {name.removeprefix(prefix): name for name in stored if name.startswith(prefix)}
    return {f"vit.{ours}": name for ours, name in names.items() if not ours.startswith("head.")}


def _open_folder(source: str, select: Callable[[Iterable[str]], dict[str, str]]) -> TensorSource:
    """Open the tensors of a folder.

    Args:
        source: a folder or a hub id.
        select: returns the stored name by our name, of the tensors to read.
    """
    stored = stored_tensors(checkpoint_folder(source))
    stored_names = select(stored)

    def read(names: Collection[str]) -> Tensors:
        by_file: dict[Path, dict[str, str]] = {}
        for name in names:
            by_file.setdefault(stored[stored_names[name]].path, {})[name] = stored_names[name]
        tensors: Tensors = {}
        for path in sorted(by_file):
            tensors |= _read_file(path, by_file[path])
        return tensors

    return TensorSource(source, {ours: stored[name].shape for ours, name in stored_names.items()}, read)


def _read_file(path: Path, stored_names: Mapping[str, str]) -> Tensors:
    """Read tensors by our names, as float32 copies: the file may be replaced while a run goes on."""
    check_tensor_file(path)
    tensors: Tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for ours, name in stored_names.items():
                tensors[ours] = file.get_tensor(name).to(torch.float32, copy=True)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not readable as safetensors: {error}") from None
    check_finite(((name, tensors[ours]) for ours, name in stored_names.items()), str(path))
    return tensors


def fit_norms(source: TensorSource, expected: Shapes) -> TensorSource:
    """Convert the gains and biases of query and key norms to the layout that a model expects.

    A row for all heads is repeated for each head, which gives the same numbers. The way back needs equal
    rows.

    Args:
        source: the weights.
        expected: the shapes of the model's parameters.

    Raises:
        ConfigError: rows differ where one row is expected. They are compared now, as only the first rank
            loads weights.
    """
    rows: dict[str, int] = {}  # the rows that the model expects, by name
    for name, shape in source.shapes.items():
        needed = expected.get(name, shape)
        if not HEAD_NORM.search(name) or shape == needed or len(shape) != len(needed) or not shape[0]:
            continue
        if needed[0] == 1 or needed[0] % shape[0] == 0:
            rows[name] = needed[0]  # rows of another length are reported with the shapes
    for name, tensor in source.read([name for name in rows if rows[name] == 1]).items():
        if not (tensor == tensor[:1]).all():
            raise ConfigError(
                f"{source.where}: {name} differs from head to head, "
                "the model has one for all (qk_norm: layer_shared)"
            )

    def read(names: Collection[str]) -> Tensors:
        tensors = source.read(names)
        for name in rows.keys() & tensors.keys():
            tensor = tensors[name]
            if rows[name] == 1:
                tensors[name] = tensor[:1].clone()
            else:
                tensors[name] = tensor.repeat_interleave(rows[name] // len(tensor), dim=0)
        return tensors

    fitted = {name: (count, *source.shapes[name][1:]) for name, count in rows.items()}
    return TensorSource(source.where, source.shapes | fitted, read)


def drop_tied_head(source: TensorSource, expected: Shapes) -> TensorSource:
    """Leave out an output layer that is a copy of the embeddings, for a model that has one tensor for both.

    Args:
        source: the weights.
        expected: the shapes of the model's parameters.

    Raises:
        ConfigError: it is no copy. They are compared now, as only the first rank loads weights.
    """
    embedding = f"model.{EMBEDDING}"
    if HEAD not in source.shapes or HEAD in expected:
        return source
    tensors = source.read([HEAD, embedding])
    if not torch.equal(tensors[HEAD], tensors[embedding]):
        raise ConfigError(
            f"{source.where}: {HEAD} differs from {embedding}, the model has one tensor for both "
            "(tie_word_embeddings: true)"
        )
    return source._replace(shapes={name: shape for name, shape in source.shapes.items() if name != HEAD})


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raise ConfigError with the tensors that are missing, not part of the model, or of another shape."""
    problem = compare_shapes(found, expected, where)
    if problem:
        raise ConfigError(problem)


def compare_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> str | None:
    """Describe in one line the tensors that do not fit, or return None.

    Args:
        found: the shapes of the weights.
        expected: the shapes of the model's parameters.
        where: the file or folder of the weights, for the message.
    """
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"not part of this model: {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, the model needs {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if not problems:
        return None
    listed, unlisted = problems[:LISTED_PROBLEMS], len(problems) - LISTED_PROBLEMS
    more = f"; and {unlisted} more" if unlisted > 0 else ""
    return f"{where}: {len(problems)} tensors do not fit: {'; '.join(listed)}{more}"
