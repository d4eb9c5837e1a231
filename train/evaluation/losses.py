"""The loss by kind on a dataset, in units of `batch` packs: the same sums as while training."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unitoken.common.errors import ConfigError
from unitoken.dataset.manifest import load_vocabulary
from unitoken.dataset.record import Record
from unitoken.streaming_data.arrays import Integers
from unitoken.streaming_data.plan.lengths import read_lengths
from unitoken.streaming_data.plan.packing import pack
from unitoken.streaming_data.plan.recipe import Recipe
from unitoken.streaming_data.reading.batch import unpack
from unitoken.streaming_data.reading.collate import Collate
from unitoken.streaming_data.reading.shards import Shards
from unitoken.streaming_data.settings import DataConfig
from unitoken.streaming_data.sources import StreamSource, open_sources
from unitoken.train.accounting.step_sums import losses_by_kind, sum_by_kind
from unitoken.train.evaluation.config import TaskConfig
from unitoken.train.evaluation.model import EvaluatedModel
from unitoken.train.evaluation.task_folder import Line, UnitWork
from unitoken.train.generation.settings import check_trained_vocabulary


def prepare_losses(name: str, task: TaskConfig, model: EvaluatedModel) -> UnitWork:
    """Open a task's dataset, and cut its packs into units.

    Raises:
        ConfigError: the dataset is missing or damaged, of another vocabulary than the model, or no sample of
            it fits into a pack.
    """
    config = _data_config(task, model.config.data)
    (source,) = open_sources(config)
    vocabulary = load_vocabulary(source.folder)
    if model.vocabulary is not None:
        check_trained_vocabulary(vocabulary, model.vocabulary, f"tasks.{name}.dataset: the model")
    recipe = Recipe.of(config, [source], model.views)
    lengths = read_lengths(source, recipe, model.views).lengths
    samples = np.flatnonzero(lengths)[: task.limit]
    order, sizes = pack(lengths[samples], config.packed_length)
    packs = np.split(samples[order], np.cumsum(sizes)[:-1])
    collate = Collate(
        config.packed_length,
        model.views,
        recipe.continuous,
        vocabulary.separator,
        vocabulary.newline,
        model.config.compat == "unitoken",
        vocabulary_size=vocabulary.size,
    )
    units = [packs[first : first + task.batch] for first in range(0, len(packs), task.batch)]
    reader = _Reader(config, source)
    request = {
        "dataset": source.fingerprint,
        "samples": len(samples),
        **task.model_dump(mode="json", include={"held_out", "batch"}),
        "model": model.identity,
    }
    return UnitWork(request, len(units), functools.partial(_measure, model, collate, reader, units))


def _data_config(task: TaskConfig, trained: DataConfig) -> DataConfig:
    """Return the settings of a dataset that is read as the training data was."""
    settings: dict[str, Any] = {
        "streams": {"dataset": {"local": task.dataset, "held_out": task.held_out}},
        "split": "held_out" if task.held_out else "train",
        "packed_length": trained.packed_length,
        "global_batch": 1,
        "continuous": trained.continuous,
        "anyres": trained.anyres,
        "cache": trained.cache,
    }
    return DataConfig.model_validate(settings)


class _Reader:
    """Reads samples of a dataset by their numbers."""

    def __init__(self, config: DataConfig, source: StreamSource) -> None:
        self._shards = Shards(
            source.name, source.folder, source.shards, source.store, config.cache_folder / "shards"
        )
        self._ends = np.cumsum(self._shards.samples)

    def __call__(self, samples: Integers) -> list[Record]:
        shards = np.searchsorted(self._ends, samples, side="right")
        firsts = self._ends[shards] - self._shards.samples[shards]
        return [
            self._shards.record(int(shard), int(place))
            for shard, place in zip(shards, samples - firsts, strict=True)
        ]


@torch.no_grad()
def _measure(
    model: EvaluatedModel,
    collate: Collate,
    reader: _Reader,
    units: Sequence[Sequence[Integers]],
    unit: int,
) -> tuple[list[Line], dict[str, bytes]]:
    """Measure the losses of a unit's packs."""
    batch = collate([reader(samples) for samples in units[unit]])
    device = model.network.output_weight.device
    tensors = unpack({name: _on_device(value, device) for name, value in batch.items()})  # type: ignore[arg-type]
    try:
        loss = model.network(tensors)
    except torch.OutOfMemoryError:
        raise ConfigError(f"batch: the GPU has no memory for {len(units[unit])} packs: give less") from None
    sums, counts = sum_by_kind(loss.token_ce.double(), tensors)
    return [{"sums": sums.tolist(), "counts": counts.tolist()}], {}


def _on_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def score_losses(lines: Sequence[Line]) -> dict[str, float]:
    """Return the mean cross-entropy of all tokens that are trained on, by kind, and their perplexities."""
    sums = [math.fsum(values) for values in zip(*(line["sums"] for line in lines), strict=True)]
    counts = [sum(values) for values in zip(*(line["counts"] for line in lines), strict=True)]
    losses = {
        "loss": sum(sums) / sum(counts),
        **losses_by_kind(list(zip(sums, counts, strict=True))),
    }
    # Beyond any float the perplexity of an untrained model may be; JSON has no infinity.
    perplexities = {
        name.replace("loss", "perplexity"): math.exp(min(loss, 700.0)) for name, loss in losses.items()
    }
    return {**losses, **perplexities, "tokens": sum(counts)}
