"""Checkpoint folders as tensors under our names: safetensors only, nothing is unpickled.

Names and shapes are read from the files' headers first, on every rank, so that what does not fit is an error before
anything is loaded, and before ranks wait for each other. Tensors are then read one by one: loading takes the model's own
memory in float32 and one tensor more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from unitoken.common.errors import ConfigError
from unitoken.train.checkpoint.integrity import check_finite, check_tensor_file
from unitoken.train.checkpoint.layouts import Stored, checkpoint_folder, stored_tensors

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

_HEAD_NORM = re.compile(r"\.[qk]_norm\.(weight|bias)$")


class TensorSource(NamedTuple):
    """Where weights come from."""

    where: str
    shapes: Shapes
    read: Callable[[Collection[str]], Tensors]  # the tensors of these names, in float32

    def load(self) -> Tensors:
        return self.read(self.shapes)


def decoder_source(source: str) -> TensorSource:
    """A Chameleon checkpoint: `model.*` and `lm_head.*`; `vit.*` and `adapter.*` too where it is UniToken's, or exported here.

    Without the VQ-VAE that transformers keeps in `model.vqmodel`, which has no part in training, and without the tower's
    pooling head, which UniToken's checkpoints carry along.
    """
    return _folder_source(
        source,
        lambda names: {name: name for name in names if not name.startswith(("model.vqmodel.", "vit.head."))},
    )


def vision_source(source: str) -> TensorSource:
    """A SigLIP checkpoint as `vit.*`: its vision tower, or a whole SigLIP, or a UniToken folder; without the pooling head."""
    return _folder_source(source, _vision_names)


def _vision_names(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    prefix = next(
        (prefix for prefix in ("vit.", "vision_model.") if any(name.startswith(prefix) for name in names)), ""
    )
    towers = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    return {f"vit.{ours}": name for ours, name in towers.items() if not ours.startswith("head.")}


def _folder_source(source: str, rename: Callable[[Iterable[str]], dict[str, str]]) -> TensorSource:
    """`rename`: the names in the files -> ours: theirs, of those that are wanted."""
    stored = stored_tensors(checkpoint_folder(source))
    theirs = rename(stored)
    return TensorSource(
        source,
        {ours: stored[name].shape for ours, name in theirs.items()},
        lambda names: _read({ours: (stored[theirs[ours]], theirs[ours]) for ours in names}),
    )


def _read(wanted: Mapping[str, tuple[Stored, str]]) -> Tensors:
    """Our name -> (where it is stored, its name there); gives copies, as a file may be replaced while a run goes on."""
    import torch
    from safetensors import SafetensorError, safe_open

    tensors: Tensors = {}
    for path in sorted({stored.path for stored, _ in wanted.values()}):
        check_tensor_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                for ours, (stored, name) in wanted.items():
                    if stored.path == path:
                        tensors[ours] = file.get_tensor(name).to(torch.float32, copy=True)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not readable as safetensors: {error}") from None
        names = [(name, tensors[ours]) for ours, (stored, name) in wanted.items() if stored.path == path]
        check_finite(names, str(path))
    return tensors


def fit_norms(source: TensorSource, expected: Shapes) -> TensorSource:
    """Gains and biases of queries' and keys' norms in the layout that is expected: one for all heads, or one a head.

    One for all is repeated for each head, which gives the same numbers. The way back needs equal rows.

    Raises:
        ConfigError: rows that differ where one is expected. Read now, as only the first rank loads the rest.
    """
    rows: dict[str, int] = {}  # name -> how many are expected
    for name, shape in source.shapes.items():
        other = expected.get(name, shape)
        if not _HEAD_NORM.search(name) or shape == other or len(shape) != len(other) or not shape[0]:
            continue
        if other[0] == 1 or other[0] % shape[0] == 0:
            rows[name] = other[0]  # where a row has another length, the shapes say so
    for name, tensor in source.read([name for name in rows if rows[name] == 1]).items():
        if not (tensor == tensor[:1]).all():
            raise ConfigError(
                f"{source.where}: {name} differs from head to head, the model has one for all (qk_norm: shared)"
            )

    def read(names: Collection[str]) -> Tensors:
        tensors = source.read(names)
        for name in rows.keys() & tensors.keys():
            tensor = tensors[name]
            tensors[name] = (
                tensor[:1].clone()
                if rows[name] == 1
                else tensor.repeat_interleave(rows[name] // len(tensor), dim=0)
            )
        return tensors

    shapes = {
        name: (rows[name], *shape[1:]) if name in rows else shape for name, shape in source.shapes.items()
    }
    return TensorSource(source.where, shapes, read)


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raises ConfigError that lists what is missing, what is extra and what has another shape."""
    if problem := misfits(found, expected, where):
        raise ConfigError(problem)


def misfits(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> str | None:
    """What does not fit, in one line."""
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"not part of this model: {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, the model needs {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    return (
        f"{where}: {len(problems)} tensors do not fit: {'; '.join(problems[:8])}{more}" if problems else None
    )
